"""When a layer in training multiplies with lists of its kept weights instead of M * W', and the lists for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .sparse_rows import DTYPES, SparseRows, compiled_passes

# From so many pruned of all weights on, and so many weights, forward, dx and the making of the lists take less time
# than the dense products and M * W'. `python -m bench sparse` measures them. In bf16 it depends on what a processor's
# own products do, so "auto" leaves it dense.
LEAST_PRUNED, LEAST_WEIGHTS = 0.5, 1 << 16


def serve(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are products with lists for a weight, and x in this dtype."""
    return weight.dtype in DTYPES and dtype in DTYPES and weight.numel() > 0 and compiled_passes(weight) is not None


def pay(weight: Tensor, dtype: torch.dtype, num_pruned: int) -> bool:
    """Whether they are the faster ones."""
    wanted = weight.numel() >= LEAST_WEIGHTS and num_pruned >= LEAST_PRUNED * weight.numel()
    return wanted and dtype is torch.float32 and serve(weight, dtype)


def make(masked: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, offsets and pointers of M * W' (out, in), see sparse_rows.py."""
    return SparseRows.from_mask(masked, mask)[:3]
