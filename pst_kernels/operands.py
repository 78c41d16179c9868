"""The tensors and numbers of one layer, as named tuples: what every level of the package passes on.

They are splatted into the flat schemas of the ops (`ops.scores(weight, *factors, *scales)`), and put together again on
the other side. Their shapes, dtypes and devices are checked here.

    W' = W + beta U V        S = |W'| + alpha1 A B + alpha2 (R + C)        y = x (M * W')^T + bias
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What W', S and gradients are computed in: fp32, or float64 for a float64 weight."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zeros_at_once(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of the shapes of these and of the first one's dtype, parts of one: on a GPU a launch is all that so few
    numbers cost.
    """
    sizes = [tensor.numel() for tensor in tensors]
    parts = tensors[0].new_zeros(sum(sizes)).split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def integers_on(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """int64 on a device, from pinned memory where it is a GPU, so that the host does not wait for it."""
    there = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=there).to(device, non_blocking=there)


class Factors(NamedTuple):
    """The six trainable tensors of a layer with weight (out, in); r1 is `weight_rank`, r2 `score_rank`."""

    U: Tensor  # (out, r1)
    V: Tensor  # (r1, in)
    A: Tensor  # (out, r2)
    B: Tensor  # (r2, in)
    R: Tensor  # (out,)
    C: Tensor  # (in,)

    @property
    def weight_rank(self) -> int:
        return self.V.shape[0]

    @property
    def score_rank(self) -> int:
        return self.B.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Factors:
        return Factors(*map(change, self))

    def of_expert(self, number: int) -> Factors:
        """Those of one weight of a stack."""
        return Factors(*(factor[number] for factor in self))

    def check(self, weight: Tensor) -> None:
        """Raise ValueError or TypeError that names the tensor whose shape, dtype or device does not fit the weight."""
        if weight.dim() != 2:
            raise ValueError(f"weight must be 2-d (out, in), got shape {tuple(weight.shape)}")
        out, columns = weight.shape
        for name, tensor in (("V", self.V), ("B", self.B)):
            if tensor.dim() != 2:
                raise ValueError(f"{name} must have shape (rank, {columns}), got {tuple(tensor.shape)}")
        shapes = factor_shapes((out, columns), self.weight_rank, self.score_rank)
        for name, tensor, shape in zip(self._fields, self, shapes, strict=True):
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} must have shape {shape} for weight {(out, columns)}, got {tuple(tensor.shape)}"
                )
            if tensor.device != weight.device:
                raise ValueError(
                    f"{name} is on {tensor.device} but weight is on {weight.device}; move them to one device"
                )
        for name, tensor in zip(("weight", *self._fields), (weight, *self), strict=True):
            if tensor.dtype not in FLOATING:
                raise TypeError(f"{name} must be one of float32, float16, bfloat16 or float64, got {tensor.dtype}")


def factor_shapes(shape: Sequence[int], weight_rank: int, score_rank: int) -> tuple[tuple[int, ...], ...]:
    """Of U, V, A, B, R and C for a weight (out, in), or a stack of them (experts, out, in)."""
    *stack, out, columns = shape
    single = (out, weight_rank), (weight_rank, columns), (out, score_rank), (score_rank, columns), (out,), (columns,)
    return tuple((*stack, *one) for one in single)


class Scales(NamedTuple):
    """The constant factors of W' and S."""

    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0


class MaskedWeight(NamedTuple):
    """M * W', as what it is made of."""

    weight: Tensor  # (out, in), of any strides
    factors: Factors
    mask: Tensor  # int32 (out, ceil(in / 32)), see masks/packing.py
    scales: Scales

    @property
    def flat(self) -> tuple[Tensor | float, ...]:
        """The arguments of an op's schema, in its order."""
        return self.weight, *self.factors, self.mask, *self.scales

    @classmethod
    def of(cls, *flat: Any) -> MaskedWeight:
        """The inverse of `flat`."""
        weight, *factors = flat[:7]
        return cls(weight, Factors(*factors), flat[7], Scales(*flat[8:]))


def scaled(weight: Tensor, factors: Factors, p: Tensor, q: Tensor) -> tuple[Tensor, Factors]:
    """p W q, and p U and V q among the factors, in the dtype of p (out, 1) and q (in,): their W' is p W' q."""
    U, V = factors.U.to(p.dtype) * p, factors.V.to(p.dtype) * q
    return torch.mul(weight, p).mul_(q), factors._replace(U=U, V=V)


class Weighing(NamedTuple):
    """How |W'| is weighed in the score, p |W'| q (layers/fisher.py), and what a backward sums up of G^2 for it."""

    p: Tensor  # (out, 1)
    q: Tensor  # (in,)
    of_rows: Tensor  # (out,), is filled
    of_columns: Tensor  # (in,), is added to


class Needs(NamedTuple):
    """Which gradients a backward shall compute; the others come back empty."""

    input: bool
    factors: bool
