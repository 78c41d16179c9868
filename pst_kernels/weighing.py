"""What computes a score that weighs |W'| (layers/fisher.py): p and q of sums of G^2, and the passes of a room.

As p |W'| q = |p W q + beta (p U) (V q)|, the passes that make any mask make this one, of p W q, which exists for one
layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operands import Factors, MaskedWeight, Needs, Scales, Weighing, compute_dtype, scaled


def weighings(moments: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """p (out, 1) and q (in,) of sums of G^2 over rows, then over columns; ones as long as there are none."""
    sums = moments.to(compute_dtype(weight.dtype)).split(list(weight.shape))
    p, q = (torch.where((mean := part.mean()) > 0, part / mean, 1.0).sqrt() for part in sums)
    return p[:, None], q


def weighed(weight: Tensor, factors: Factors, moments: Tensor) -> tuple[Tensor, Factors]:
    """Plain scores of these are the weighed ones."""
    return scaled(weight, factors, *weighings(moments, weight))


class WeighedRoom:
    """A room for one layer whose score weighs |W'|; what does not depend on it is the room's own.

    `moments()` are the sums of G^2 as they are then.
    """

    def __init__(self, kernels: Any, moments: Callable[[], Tensor]):
        self.kernels, self.moments = kernels, moments

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def scores(self, weight: Tensor, factors: Factors, scales: Scales) -> Tensor:
        return self.kernels.scores(*weighed(weight, factors, self.moments()), scales)

    def prune_mask(
        self, weight: Tensor, factors: Factors, scales: Scales, num_pruned: Tensor, guess: Tensor,
        masked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        packed = self.kernels.prune_mask(*weighed(weight, factors, self.moments()), scales, num_pruned, guess)
        if masked is not None:
            masked.copy_(self.kernels.masked_weight(MaskedWeight(weight, factors, packed, scales), masked.dtype))
        return packed

    def forward_scratch(self, *_: Any) -> None:
        """No pass makes mask and M * W' together."""

    def backward(
        self, gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs: Needs, split: Any = None
    ) -> tuple[Tensor, ...]:
        """The gradients of `linear_backward`, then the sums of G^2 over rows, over columns, and a one, fp32.

        No sums where no factor needs a gradient.
        """
        if not needs.factors:
            found = self.kernels.linear_backward(gy, x, operands, through_magnitude, needs, split)
            return *found, found[0].new_empty(0, dtype=torch.float32)
        p, q = weighings(self.moments(), operands.weight)
        weighing = Weighing(p, q, p.new_empty(len(p)), torch.zeros_like(q))
        found = self.kernels.weighed_backward(gy, x, operands, through_magnitude, needs.input, weighing)
        one = weighing.of_rows.new_ones(1)
        return *found, torch.cat([weighing.of_rows, weighing.of_columns, one]).to(torch.float32)
