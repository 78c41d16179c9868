"""How a layer's mask is made: looked at before a forward, eager or compiled, made when due."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..operands import Factors, Scales
from .due import Watch, count_of, total_of
from .patterns import parse

making = threading.RLock()  # of two threads at a first forward one makes the mask, and the other waits for it


class MaskState(NamedTuple):
    """A layer's mask, and what says when the next one is due."""

    num_pruned: Tensor  # int64, 0-d
    mask: Tensor  # packed, see packing.py
    guess: Tensor  # fp32 (4,): where the last threshold lay
    interval: int  # optimizer steps from one mask to the next
    pattern: str


class Weights(NamedTuple):
    """What a mask is made of."""

    weight: Tensor
    factors: Factors
    scales: Scales


def refresh(
    kernels: Any, weights: Weights, state: MaskState, watch: Watch, room: Callable[[], Tensor | None] | None = None,
    sharded: Sequence[Tensor] | None = None,
) -> Tensor | None:  # fmt: skip
    """Make the mask if it is due, by the functions of `kernels` (cpu/, triton/, or those of a sharded weight).

    A mask that is made brings M * W' from the same pass where `room` returns a tensor (out, in) for it, and the pattern
    allows; returns it then. Of weights that are shards, `sharded` are the tensors whose changes make a mask due.
    """
    weight, factors, _ = weights
    watched = sharded or (weight, *factors)
    # Shards are made by all processes at once, and they may be threads of this one.
    with making if sharded is None else contextlib.nullcontext():
        count, total = count_of(state.num_pruned), total_of(watched)
        if watch.is_fresh_at(count, total):
            return None
        if not watch.is_due_at(count, state.interval):
            watch.note_look(count, total, tuple(watched), made=False)
            watch.looks += 1
            return None
        if any(factor.device != weight.device for factor in factors):
            return None  # the forward is about to say which tensor has to be moved
        pattern = parse(state.pattern)
        masked = room() if room is not None and pattern.with_masked_weight else None
        for part in _single(weights, state, masked):
            part.mask.copy_(pattern.prune(kernels, *part.weights, state.num_pruned, part.guess, part.masked))
        if pattern.block_size is not None and weight.dim() == 2 and hasattr(kernels, "keep_lists"):
            kernels.keep_lists(state.mask, weight.shape, pattern.block_size, written=True)
        watch.note_look(count, total, tuple(watched), made=True, mask=state.mask)
        watch.looks += 1
        return masked


class _Single(NamedTuple):
    """One weight (out, in), and where its mask goes."""

    weights: Weights
    mask: Tensor
    guess: Tensor
    masked: Tensor | None


def _single(weights: Weights, state: MaskState, masked: Tensor | None) -> list[_Single]:
    """A weight by itself; of a stack (experts, out, in) each one, which has a threshold of its own."""
    weight, factors, scales = weights
    if weight.dim() == 2:
        return [_Single(weights, state.mask, state.guess, masked)]
    return [
        _Single(
            Weights(weight[i], factors.of_expert(i), scales), state.mask[i], state.guess[i],
            None if masked is None else masked[i],
        )
        for i in range(len(weight))
    ]  # fmt: skip
