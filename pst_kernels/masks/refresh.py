"""The one way in which a layer's mask is made: looked at before every forward, eager or compiled, made when due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..operands import Factors, Scales
from . import due
from .patterns import parse


class MaskState(NamedTuple):
    """A layer's mask, and what says when the next one is due."""

    num_pruned: Tensor  # int64, 0-d
    mask: Tensor  # packed, see packing.py
    guess: Tensor  # fp32 (4,): where the last threshold lay
    seen: Tensor  # int64, on the CPU: see due.py
    interval: int  # optimizer steps from one mask to the next
    pattern: str


class Weights(NamedTuple):
    """What a mask is made of."""

    weight: Tensor
    factors: Factors
    scales: Scales


def refresh(
    kernels: Any, weights: Weights, state: MaskState, room: Callable[[], Tensor | None] | None = None,
    watched: Sequence[Tensor] | None = None,
) -> Tensor | None:  # fmt: skip
    """Make the mask if it is due, by the functions of `kernels` (cpu/, triton/, or those of a sharded weight).

    A mask that is made brings M * W' from the same pass where `room` returns a tensor (out, in) for it, and the pattern
    allows; returns it then. `watched` are the tensors whose changes make a mask due, if not the weights themselves.
    """
    weight, factors, _ = weights
    if not due.is_due(state.seen, state.num_pruned, watched or (weight, *factors), state.interval):
        return None
    if any(factor.device != weight.device for factor in factors):
        due.mark_stale(state.seen)  # the forward is about to say which tensor has to be moved
        return None
    pattern = parse(state.pattern)
    masked = room() if room is not None and pattern.with_masked_weight else None
    state.mask.copy_(pattern.prune(kernels, *weights, state.num_pruned, state.guess, masked))
    return masked
