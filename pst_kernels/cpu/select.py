"""Exact selection on the CPU: the k smallest of many scores, which are neither sorted nor stored if a guess is right.

Guess, verify, refine. A bracket [lower, upper] that should hold the k-th smallest score comes from the last step or
from a sample. One look at all scores counts what lies below it and gathers what lies inside it; if the count proves
that the k-th is inside, it is selected exactly among those few. If not, the next bracket is tried. Where all brackets
miss, everything is stored and sorted, so that the search ends whatever the distribution.

Order: (score, flat index), NaN last, -0.0 equal to 0.0; that of `torch.argsort(scores.flatten(), stable=True)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from ..masks.guess import Bracket, Candidates, Selection

ScoreChunks = Callable[[], Iterator[tuple[int, np.ndarray]]]  # yields (first flat index, 1-d fp32 scores), in order


class Scores(Protocol):
    """Scores to search, and a mask over them that follows the search."""

    def gather(self, bracket: Bracket) -> Candidates:
        """Look at all scores: what lies below the bracket is pruned, the rest kept for now, NaN with it."""

    def prune(self, found: Candidates, value: float, count: int) -> int:
        """Prune the first `count` candidates by (score, index) as well, of which the last has this value.

        Returns the flat index of the last.
        """

    def drop(self, index: np.ndarray) -> None:
        """Prune the scores at these flat indices as well."""

    def all(self) -> np.ndarray:
        """Every score, fp32 (numel,); none is pruned any more."""


def select(scores: Scores, numel: int, k: int, brackets: Iterable[Bracket | None]) -> Selection:
    """The k-th smallest of `numel` scores, k from 1; just the k smallest are pruned then."""
    for bracket in brackets:
        if bracket is not None:
            found = scores.gather(bracket)
            if found.below < k <= found.below + found.scores.size:
                return _refine(scores, found, bracket, k, numel)
    return _sort(scores, k)


class ChunkedScores:
    """Scores that come a chunk at a time from `chunks`.

    `kept`, flat bool, is the mask, if one is wanted. `masked`, flat, holds a number for each score, which `chunks`
    writes as the flags in `kept` say when the next chunk is asked for; what is dropped later gets a zero there.
    Where no mask is wanted, `look` may gather in the place of NumPy.
    """

    def __init__(
        self, chunks: ScoreChunks, kept: np.ndarray | None = None, masked: np.ndarray | None = None,
        look: Callable[[Bracket], Candidates] | None = None,
    ):  # fmt: skip
        self.chunks, self.kept, self.masked, self.look = chunks, kept, masked, look

    def gather(self, bracket: Bracket) -> Candidates:
        if self.look is not None:
            return self.look(bracket)
        return _gather(self.chunks, bracket, self.kept)

    def prune(self, found: Candidates, value: float, count: int) -> int:
        ties = np.flatnonzero(found.scores == value)
        pruned_ties = count - int(np.count_nonzero(found.scores < value))
        if self.kept is not None or self.masked is not None:
            pruned = found.scores <= value
            pruned[ties[pruned_ties:]] = False
            self.drop(found.index[pruned])
        return int(found.index[ties[pruned_ties - 1]])

    def drop(self, index: np.ndarray) -> None:
        for flat in (self.kept, self.masked):
            if flat is not None:
                flat[index] = 0

    def all(self) -> np.ndarray:
        if self.kept is not None:
            self.kept[:] = True
        return np.concatenate([chunk.copy() for _, chunk in self.chunks()])


def _gather(chunks: ScoreChunks, bracket: Bracket, kept: np.ndarray | None) -> Candidates:
    lower, upper = np.float32(bracket.lower), np.float32(bracket.upper)
    below, scores, index = 0, [], []
    flags = np.empty((2, 0), bool)
    for start, chunk in chunks():
        if flags.shape[1] < chunk.size:
            flags = np.empty((2, chunk.size), bool)
        inside, low = flags[0, : chunk.size], flags[1, : chunk.size]
        np.less_equal(chunk, upper, out=inside)
        np.less(chunk, lower, out=low)
        if kept is not None:
            np.logical_not(low, out=kept[start : start + chunk.size])  # for now, what is inside is kept; NaN is anyway
        below += int(np.count_nonzero(low))
        where = np.flatnonzero(np.not_equal(inside, low, out=inside))  # low implies at or below upper
        scores.append(chunk[where])
        where += start
        index.append(where)
    return Candidates(below, np.concatenate(scores), np.concatenate(index))


def _refine(scores: Scores, found: Candidates, bracket: Bracket, k: int, numel: int) -> Selection:
    rank, n = k - found.below - 1, found.scores.size
    value = float(np.partition(found.scores, rank)[rank])
    last = scores.prune(found, value, rank + 1)
    # an end at infinity says nothing of the density; the candidates' own spread does
    width = bracket.upper - bracket.lower
    if not math.isfinite(width):
        width = float(found.scores.max()) - float(found.scores.min())
    return Selection(value, last, width * numel / n)


def _sort(scores: Scores, k: int) -> Selection:
    everything = scores.all()
    order = np.argsort(everything, kind="stable")
    scores.drop(order[:k])
    return Selection(float(everything[order[k - 1]]), int(order[k - 1]), 0.0)
