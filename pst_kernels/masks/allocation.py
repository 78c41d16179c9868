"""How many weights each matrix loses under one threshold for all.

Pruned are the `count` smallest scores of all matrices by (score, matrix, flat index), but of each matrix at most a
given number, so that none vanishes: its largest scores are left out of the order. Two histograms of the scores' bits
find them, and the counts stay on the device. On a CPU one look at the scores is enough where the threshold is near the
last one: what lies below a bracket is counted, what lies inside it is sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..operands import integers_on
from .guess import Bracket, Guess, Selection
from .sharded_selection import ordered, score_of

HALF = 16  # bits of a key that one histogram tells apart
ScoresOf = Callable[[int], Tensor]  # the fp32 scores of a matrix; called for one after another, up to three times


class OneThreshold:
    """Finds the counts again at each step. What it remembers makes it faster and changes no count."""

    def __init__(self) -> None:
        self.state = torch.full((4,), torch.nan)  # the guess; none, unless scores are on a CPU
        self.numel = 0  # of all matrices

    def counts(self, scores_of: ScoresOf, most: Sequence[int], count: int) -> Tensor:
        """int64 (matrices,): how many weights each loses.

        Args:
            most: how many each may lose.
            count: how many all lose together, at most the sum of `most`.
        """
        if not 0 <= count <= sum(most):
            raise ValueError(f"count must be in [0, {sum(most)}], which is what all matrices may lose, got {count}")
        bracket = Guess.load(self.state).bracket(count / self.numel) if self.numel else None
        if bracket is not None and (found := _near(scores_of, most, count, bracket)) is not None:
            counts, value, near = found
            self._remember(value, (bracket.upper - bracket.lower) * self.numel / near, count)
            return torch.from_numpy(counts)
        return self._by_histograms(scores_of, most, count)

    def _by_histograms(self, scores_of: ScoresOf, most: Sequence[int], count: int) -> Tensor:
        matrices = range(len(most))
        high = torch.stack([_histogram(ordered(scores_of(i)).flatten() >> HALF) for i in matrices])
        limits = integers_on(most, high.device)[:, None]
        leading, below = _first_reaching(high, torch.zeros_like(limits), limits, count)
        low = torch.stack([_of_bin(ordered(scores_of(i)).flatten(), leading) for i in matrices])
        chosen, below = _first_reaching(low, below, limits, count)
        ties = low.gather(1, chosen.expand(len(most), 1))
        certain = torch.minimum(below, limits)
        room = (torch.minimum(below + ties, limits) - certain).flatten()
        before = room.cumsum(0) - room
        of_ties = torch.minimum((count - certain.sum() - before).clamp(min=0), room)
        if high.device.type == "cpu":
            self.numel, first = int(high.sum()), int(leading) << HALF
            width = score_of(first + (1 << HALF) - 1) - score_of(first)
            self._remember(score_of(first + int(chosen)), width * self.numel / max(1, int(low.sum())), count)
        return certain.flatten() + of_ties

    def _remember(self, value: float, slope: float, count: int) -> None:
        fraction = count / max(1, self.numel)
        Guess.load(self.state).update(self.state, Selection(value, 0, slope), fraction)


def _near(
    scores_of: ScoresOf, most: Sequence[int], count: int, bracket: Bracket
) -> tuple[np.ndarray, float, int] | None:
    """The counts, the threshold, and how many scores in the bracket may go; None if the threshold is not among them."""
    lower, upper = np.float32(bracket.lower), np.float32(bracket.upper)
    below, limits = np.zeros(len(most), np.int64), np.array(most, np.int64)
    parts = []
    for i in range(len(most)):
        scores = scores_of(i).numpy().ravel()
        low = scores < lower
        below[i] = np.count_nonzero(low)
        parts.append(scores[np.not_equal(scores <= upper, low)])  # what is below the one is below the other
    inside = np.array([len(part) for part in parts])
    certain = np.minimum(below, limits)
    wanted = count - int(certain.sum())
    if not 0 < wanted <= int((np.minimum(below + inside, limits) - certain).sum()):
        return None
    candidates, owners = np.concatenate(parts), np.repeat(np.arange(len(most)), inside)
    order = np.argsort(candidates, kind="stable")  # of equals the first matrix's, then its first
    owners = owners[order]
    by_matrix = np.argsort(owners, kind="stable")
    place = np.arange(len(order)) - np.repeat(inside.cumsum() - inside, inside)  # within the matrix, in that order
    may_go = np.empty(len(order), bool)
    may_go[by_matrix] = place < np.repeat(limits - certain, inside)
    gone = np.flatnonzero(may_go)[:wanted]
    counts = certain + np.bincount(owners[gone], minlength=len(most))
    return counts, float(candidates[order[gone[-1]]]), int(may_go.sum())


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
