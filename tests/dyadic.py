"""Problems whose scores are exact in fp32, so that masks must agree bit for bit everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from pst_kernels import reference

SHAPES = [(1, 1), (7, 33), (33, 65), (96, 384)]


def grid(*shape: int, unit: int = 64, reach: int = 16) -> Tensor:
    """Random multiples of 1 / unit."""
    return torch.randint(-reach, reach + 1, shape).float() / unit


def problem(
    rows: int, columns: int, rank: int, dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32
) -> list[Tensor]:
    """weight, U, V, A, B, R, C on dyadic grids; heavy ties come with so few distinct values."""
    weight = grid(rows, columns, unit=256, reach=200).to(dtype)
    factors = [grid(rows, rank), grid(rank, columns), grid(rows, rank), grid(rank, columns), grid(rows), grid(columns)]
    return [weight, *(f.to(factor) for f in factors)]


def exact_scores(tensors: list[Tensor]) -> Tensor:
    return reference.scores(*(t.double() for t in tensors))


def no_guess() -> Tensor:
    return torch.full((4,), torch.nan)


def guess_at(scores: Tensor, k: int, margin: float, reach: float = 0.005) -> Tensor:
    """The state after a step whose threshold was the k-th of these scores."""
    ordered = scores.flatten().sort().values
    near = max(1, int(ordered.numel() * reach))
    low, high = max(0, k - 1 - near), min(ordered.numel() - 1, k - 1 + near)
    slope = (ordered[high] - ordered[low]) / (high - low) * ordered.numel()
    return torch.tensor([ordered[k - 1].item(), slope.item(), k / ordered.numel(), margin])
