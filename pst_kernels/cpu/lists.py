"""When a layer in training multiplies with lists of its kept weights instead of M * W', and the lists for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks.patterns import num_pruned_at
from .sparse_rows import DTYPES, SparseRows, compiled_passes

# From so many pruned of all weights on, and so many weights, forward, dx and the making of the lists take less time
# than the dense products and M * W', with AVX2 alone too. `python -m bench sparse` measures both ways there. Dense
# products in bf16 are quicker than in fp32 where the processor has instructions for them, and many times slower where
# PyTorch has AVX2 alone.
LEAST_PRUNED, LEAST_PRUNED_OF_BF16, LEAST_WEIGHTS = 0.3, 0.8, 1 << 16


def serve(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are products with lists for a weight, and x in this dtype."""
    return weight.dtype in DTYPES and dtype in DTYPES and weight.numel() > 0 and compiled_passes(weight) is not None


def pay(weight: Tensor, dtype: torch.dtype, num_pruned: int) -> bool:
    """Whether they are the faster ones."""
    quick = dtype is torch.bfloat16 and torch.backends.cpu.get_cpu_capability() != "AVX2"
    least = LEAST_PRUNED_OF_BF16 if quick else LEAST_PRUNED
    wanted = weight.numel() >= LEAST_WEIGHTS and num_pruned >= num_pruned_at(weight.numel(), least)
    return wanted and serve(weight, dtype)  # last: it may say that Numba is not there, which matters where it is wanted


def make(masked: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, offsets and pointers of M * W' (out, in), see sparse_rows.py."""
    return SparseRows.from_mask(masked, mask)[:3]
