"""Random problems for numerical tests: a weight, its factors, and the shapes and options they run over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pst_kernels.masks import patterns
from pst_kernels.operands import Factors, MaskedWeight, Scales

SHAPES = [(1, 1), (7, 33), (129, 65), (96, 384), (300, 1000)]
SPARSITIES = [0.0, 0.5, 0.9, 0.99]
PATTERNS = ["block:16", "block:32", "block:64", "block:128", "2:4", "3:7", "5:20"]
SCALES = {"beta": 0.75, "alpha1": 0.5, "alpha2": 2.0}


class Problem(NamedTuple):
    weight: Tensor  # (out, in)
    factors: list[Tensor]  # U, V, A, B, R, C

    @property
    def num_weights(self) -> int:
        return self.weight.numel()

    def requires_grad(self) -> Problem:
        return Problem(self.weight, [f.detach().clone().requires_grad_() for f in self.factors])

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(self.weight.to(dtype), [f.to(dtype) for f in self.factors])


def make_problem(
    out: int, columns: int, *, rank: int = 5, score_rank: int | None = None, seed: int = 0,
    weight_dtype: torch.dtype = torch.float64, factor_dtype: torch.dtype = torch.float64, dyadic: bool = False,
) -> Problem:  # fmt: skip
    """Factors of the size they have in training. `dyadic`: multiples of 1/64, for scores exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    score_rank = rank if score_rank is None else score_rank

    def normal(*shape: int, scale: float = 0.3) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return (values * 64).round() / 64 if dyadic else values

    weight = normal(out, columns, scale=1.0).to(weight_dtype)
    shapes = [(out, rank), (rank, columns), (out, score_rank), (score_rank, columns), (out,), (columns,)]
    return Problem(weight, [normal(*shape).to(factor_dtype) for shape in shapes])


def relative_error(value: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of the exact result, in float64."""
    value, exact = value.double(), exact.double()
    return ((value - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def mask_by_definition(scores: Tensor, pattern: patterns.Pattern, num_pruned: int) -> Tensor:
    """The mask of a pattern in loops, from nothing but the definition."""
    kept = torch.ones(scores.shape, dtype=torch.bool)
    out, columns = scores.shape
    if isinstance(pattern, patterns.Blocks):
        size = pattern.size
        corners = [(r, c) for r in range(0, out, size) for c in range(0, columns, size)]
        means = torch.stack([scores[r : r + size, c : c + size].double().mean() for r, c in corners])
        for i in torch.argsort(means, stable=True)[:num_pruned].tolist():
            r, c = corners[i]
            kept[r : r + size, c : c + size] = False
        return kept
    of_group = next(k for k in range(pattern.group) if pattern._count((out, columns), k) == num_pruned)
    for row in range(out):
        for start in range(0, columns, pattern.group):
            group = scores[row, start : start + pattern.group]
            surplus = len(group) - (pattern.group - of_group)
            kept[row, start + torch.argsort(group, stable=True)[: max(0, surplus)]] = False
    return kept


def grouped(tensors: Sequence[Tensor], scales: Sequence[float] = (1.0, 1.0, 1.0)) -> tuple[Tensor, Factors, Scales]:
    """(weight, U, V, A, B, R, C) as the rooms of the package take them."""
    weight, *factors = tensors
    return weight, Factors(*factors), Scales(*scales)


def masked_weight(tensors: Sequence[Tensor], mask: Tensor, scales: Sequence[float] = (1.0, 1.0, 1.0)) -> MaskedWeight:
    """M * W' of such tensors."""
    weight, factors, named = grouped(tensors, scales)
    return MaskedWeight(weight, factors, mask, named)
