"""Sums that several programs have made for the same outputs, added up in a fixed order: the same bits in every run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles.targets import cdiv

ADDED = 512  # outputs of a program


@triton.jit(do_not_specialize=["numel", "splits", "has_bias"])
def add_sums_kernel(p_sums, p_bias, p_y, numel, width, splits, has_bias, BLOCK: tl.constexpr):
    """y (numel / width, width) = bias + the sums of each split, from the first to the last."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < numel
    b_y = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        b_y += tl.load(p_sums + i, mask=m, other=0.0)
        p_sums += numel
    b_y += tl.load(p_bias + i % width, mask=m & (has_bias != 0), other=0.0).to(tl.float32)
    tl.store(p_y + i, b_y.to(p_y.dtype.element_ty), mask=m)


def rooms(x: Tensor, width: int, splits: int) -> tuple[Tensor, Tensor]:
    """y (T, width) for x (T, ...), and where its programs put their sums, fp32: y itself without splits."""
    y = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    return y, y if splits == 1 else torch.empty((splits, *y.shape), dtype=torch.float32, device=x.device)


def add_sums(sums: Tensor, bias: Tensor, y: Tensor, has_bias: int) -> Tensor:
    """y (T, width) = bias + sums (splits, T, width), fp32; without `has_bias` nothing is read of the bias."""
    grid = (cdiv(y.numel(), ADDED),)
    add_sums_kernel[grid](sums, bias, y, y.numel(), y.shape[1], sums.shape[0], has_bias, BLOCK=ADDED, num_warps=4)
    return y
