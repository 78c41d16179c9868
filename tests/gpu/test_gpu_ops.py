"""Every op on the device: PyTorch's checks of an op, equal bits in two runs, and no wait for the device."""

from __future__ import annotations

import pytest
import torch
from op_samples import samples
from places import Place
from torch import Tensor

from pst_kernels import ops

MAY_WAIT = ("kept_blocks_forward", "kept_blocks_backward")  # PyTorch's block-sparse product, on a GPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_opcheck(gpu: Place, dtype: torch.dtype) -> None:
    checked = set()
    for name, arguments in samples(dtype, gpu.device):
        op = getattr(torch.ops.pst_kernels, name).default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        checked.add(name)
    assert checked == set(ops.NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_op_waits(gpu: Place, dtype: torch.dtype) -> None:
    """Also where it writes into its arguments, which are compared as well."""
    for name, arguments in samples(dtype, gpu.device):
        if name in MAY_WAIT:
            continue
        gpu.twice(lambda name=name, arguments=arguments: called(name, arguments))


def called(name: str, arguments: tuple) -> list[Tensor]:
    """What the op returns, and its tensors after it; it gets copies."""
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    found = getattr(torch.ops.pst_kernels, name).default(*copies)
    returned = [] if found is None else [found] if isinstance(found, Tensor) else list(found)
    return [*returned, *(a for a in copies if isinstance(a, Tensor))]
