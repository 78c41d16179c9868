"""The ops for one small layer whose tensors stay where they are, which need not be looked at again at every call."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..operands import Factors, MaskedWeight, Needs, Scales
from . import lists, ops, small


def bound_to(operands: MaskedWeight, dtype: torch.dtype) -> SmallLayer | None:
    """For a layer with these operands and products in `dtype`; None where this room's own functions serve."""
    weight, factors, _, scales = operands
    if dtype is not torch.float32 or not ops.is_small(weight):
        return None
    passes = small.compiled(weight, factors, scales)
    return None if passes is None else SmallLayer(passes)


_room: Any = sys.modules[__package__]


class SmallLayer:
    """A room of the layer's own, with the functions of cpu/."""

    lists = lists
    forward_scratch = staticmethod(ops.forward_scratch)
    linear_forward = staticmethod(ops.linear_forward)
    split_for = staticmethod(ops.split_for)

    def __init__(self, passes: Any) -> None:
        self.passes = passes  # compiled/small_launch.Bound

    def prune_mask(
        self, weight: Tensor, factors: Factors, scales: Scales, num_pruned: Tensor, guess: Tensor,
        masked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        count = int(num_pruned)
        # Who has put something in the place of the room's function, to count masks for instance, gets every call.
        as_ever = _room.prune_mask is ops.prune_mask
        plain = masked is None or masked.dtype is torch.float32
        if as_ever and count and plain and self.passes.holds(weight, factors):
            return self.passes.prune(count, masked)
        return _room.prune_mask(weight, factors, scales, num_pruned, guess, masked)

    def linear_backward(
        self, gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs: Needs, split: None = None
    ) -> tuple[Tensor, ...]:
        moved = not self.passes.holds(operands.weight, operands.factors)
        if moved or needs.input or not needs.factors or gy.dtype is not torch.float32:
            return ops.linear_backward(gy, x, operands, through_magnitude, needs)
        return x, *self.passes.factor_gradients(torch.mm(gy.t(), x), operands.mask, through_magnitude)
