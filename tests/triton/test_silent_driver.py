"""How often a step launches kernels, counted without a GPU."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from silent_driver import silent  # noqa: E402
from triton.runtime import driver  # noqa: E402

import pst_kernels as pst  # noqa: E402

SEARCH = {"bracket_kernel", "gather_kernel", "refine_kernel", "mask_kernel"}
GRADIENTS = {"factor_gradients_kernel": 1, "add_partials_kernel": 1}


def test_launches_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that makes its mask, and of one whose mask is still right. M * W' is kept: the library multiplies."""
    layer = pst.PSTLinear(64, 64, bias=False, dtype=torch.bfloat16, config=pst.PSTConfig(sparsity=0.5))
    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    before = driver._active
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    with silent(90) as launches:
        layer(x).sum().backward()
        first = dict(launches)
        launches.clear()
        layer(x).sum().backward()
    assert launches == GRADIENTS
    assert first == GRADIENTS | dict.fromkeys(SEARCH, 1)
    assert driver._active is before


@triton.jit
def add_kernel(p_x, p_y, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(p_y + i, tl.load(p_x + i, mask=i < count) + 1, mask=i < count)


def test_a_kernel_is_compiled_once_for_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next launches find it, also after those for another target, and none of them writes."""
    x, targets = torch.zeros(64), []
    listener = lambda *, metadata, **_: targets.append(metadata["target"].arch)  # noqa: E731
    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    for arch in (90, 80, 90, 80):
        with silent(arch) as launches:
            for count in (33, 35):
                add_kernel[(1,)](x, x, count, BLOCK=64)
        assert launches == {"add_kernel": 2}
    assert targets == [90, 80]
    assert not x.any()
