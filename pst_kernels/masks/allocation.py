"""How many weights each matrix loses under one threshold for all: by two histograms of the scores' bits.

Pruned are the `count` smallest scores of all matrices by (score, matrix, flat index), but of each matrix at most a
given number, so that none vanishes: its largest scores are left out of the order. Counts stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..operands import integers_on
from .sharded_selection import ordered

HALF = 16  # bits of a key that one histogram tells apart


def global_counts(scores_of: Callable[[int], Tensor], most: Sequence[int], count: int) -> Tensor:
    """int64 (matrices,): how many weights each loses.

    Args:
        scores_of: the fp32 scores of a matrix; called twice for each, so that one matrix's exist at a time.
        most: how many each may lose.
        count: how many all lose together, at most the sum of `most`.
    """
    if not 0 <= count <= sum(most):
        raise ValueError(f"count must be in [0, {sum(most)}], which is what all matrices may lose, got {count}")
    matrices = range(len(most))
    high = torch.stack([_histogram(ordered(scores_of(i)).flatten() >> HALF) for i in matrices])
    limits = integers_on(most, high.device)[:, None]
    chosen, below = _first_reaching(high, torch.zeros_like(limits), limits, count)
    low = torch.stack([_of_bin(ordered(scores_of(i)).flatten(), chosen) for i in matrices])
    chosen, below = _first_reaching(low, below, limits, count)
    ties = low.gather(1, chosen.expand(len(most), 1))
    certain = torch.minimum(below, limits)
    room = (torch.minimum(below + ties, limits) - certain).flatten()
    before = room.cumsum(0) - room
    of_ties = torch.minimum((count - certain.sum() - before).clamp(min=0), room)
    return certain.flatten() + of_ties


def _histogram(bins: Tensor) -> Tensor:
    counts = torch.zeros(1 << HALF, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))


def _of_bin(keys: Tensor, chosen: Tensor) -> Tensor:
    """Of the lower bits of those keys whose upper bits are `chosen`."""
    counts = torch.zeros(1 << HALF, dtype=torch.int64, device=keys.device)
    return counts.scatter_add_(0, keys & ((1 << HALF) - 1), (keys >> HALF == chosen).to(torch.int64))


def _first_reaching(histograms: Tensor, below: Tensor, limits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first bin (0-d) up to which all matrices lose `count` together, and what lies below it in each (n, 1)."""
    up_to = below + histograms.cumsum(1)
    reached = torch.minimum(up_to, limits).sum(0)
    chosen = (reached < count).sum().clamp(max=histograms.shape[1] - 1)  # rising, so the first that is not below
    place = chosen.expand(len(histograms), 1)
    return chosen, up_to.gather(1, place) - histograms.gather(1, place)
