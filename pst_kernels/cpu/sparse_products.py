"""Products with a weight of which only lists of kept weights are stored: y = x W^T + bias, and gy^T x where it is kept.

A NaN or an infinity of x reaches the outputs whose weight for that column is kept, as in a dense product, and no other:
there a dense product makes NaN of 0 * inf, and the compiled passes do not look. Without them (no Numba, other dtypes)
the product is a dense one.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import scratch
from .sparse_rows import DTYPES, SparseRows, compiled_passes


def multiply(x: Tensor, lists: SparseRows, bias: Tensor | None = None) -> Tensor:
    """y (T, rows) = x (T, columns) W^T + bias in x's dtype, rounded once; x and the values fp32 or bf16, on a CPU.

    With the transposed lists it is dx = gy W. The bits do not depend on the number of threads.
    """
    _check("x", x, lists.columns)
    if bias is not None and bias.shape != (lists.rows,):
        raise ValueError(f"bias must have shape ({lists.rows},), got {tuple(bias.shape)}")
    passes = compiled_passes(x, lists.values)
    return _multiply_dense(x, lists, bias) if passes is None else multiply_by(passes, x, lists, bias)


def multiply_by(passes: ModuleType, x: Tensor, lists: SparseRows, bias: Tensor | None) -> Tensor:
    """`multiply` by the compiled passes, of operands that fit."""
    y = x.new_empty((x.shape[0], lists.rows))
    if y.numel() == 0 or lists.columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    if bias is not None and not _fits(bias):
        bias = bias.detach().to(torch.float32).contiguous()
    return passes.multiply(_by_rows(x), lists, bias, y, scratch.get)


def multiply_ready(
    passes: ModuleType, x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None
) -> Tensor | None:
    """`multiply_by`, where an earlier call with as many tokens has left its own ready; else None."""
    if bias is not None and not _fits(bias):
        return None
    call = passes.find_ready(x, values, offsets, pointers, bias)
    return None if call is None else call(x, x.new_empty((x.shape[0], call.rows)), scratch.get)


def sampled(gy: Tensor, x: Tensor, lists: SparseRows) -> Tensor:
    """G = gy^T x at the kept weights: fp32 (kept,), in the order of the lists, whose values have no part in it.

    gy (T, rows) and x (T, columns), fp32 or bf16, on a CPU.
    """
    _check("gy", gy, lists.rows)
    _check("x", x, lists.columns)
    if len(gy) != len(x):
        raise ValueError(f"gy has {len(gy)} rows but x has {len(x)}; pass the same tokens")
    out = torch.empty(lists.offsets.shape, dtype=torch.float32, device=x.device)
    if len(x) == 0 or out.numel() == 0:
        return out.zero_()
    passes = compiled_passes(gy, x)
    if passes is None:
        return _sampled_dense(gy, x, lists)
    return passes.sampled(_by_rows(gy), _by_rows(x), lists, out, scratch.get)


def _multiply_dense(x: Tensor, lists: SparseRows, bias: Tensor | None) -> Tensor:
    """By a dense weight."""
    return linear(x.float(), lists.to_dense().float(), None if bias is None else bias.float()).to(x.dtype)


def _sampled_dense(gy: Tensor, x: Tensor, lists: SparseRows) -> Tensor:
    return (gy.float().T @ x.float())[lists.places()]


def _fits(bias: Tensor) -> bool:
    """As the passes read it."""
    return bias.dtype is torch.float32 and bias.is_contiguous()


def _by_rows(tensor: Tensor) -> Tensor:
    """With rows of stride 1, as the passes read them; the rows themselves may lie anywhere."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.detach().contiguous()


def _check(name: str, tensor: Tensor, features: int) -> None:
    if tensor.dim() != 2 or tensor.shape[1] != features:
        raise ValueError(f"{name} must have shape (T, {features}), got {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        raise TypeError(
            f"{name} must be float32 or bfloat16 on a CPU, got {tensor.dtype} on {tensor.device};"
            " cast it, or multiply by lists.to_dense()"
        )
