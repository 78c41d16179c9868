"""Where the k-th smallest score should lie: a bracket from the last step's threshold, or from a sample.

What finds the threshold on a CPU or over many processes starts with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

SAMPLE = 16384
NARROW, WIDE = 0.002, 0.04  # margins either side of a guess, as fractions of all scores


class Bracket(NamedTuple):
    lower: float
    upper: float


@dataclass(frozen=True)
class Candidates:
    """What a look at all scores found: how many lie below the bracket, and those inside it by ascending flat index."""

    below: int
    scores: np.ndarray  # fp32
    index: np.ndarray  # int64, flat


@dataclass(frozen=True)
class Selection:
    """The k-th smallest score as (value, flat index), and how many scores a unit of score spans around it."""

    value: float
    index: int
    slope: float  # score per fraction of all scores, near the threshold


class Guess(NamedTuple):
    """Where the last threshold was, kept between steps as four fp32 numbers; `value` is NaN when there was none."""

    value: float
    slope: float
    fraction: float  # k / numel it was found for
    margin: float  # fraction of all scores to search on either side

    @classmethod
    def load(cls, state: Tensor) -> Guess:
        return cls(*state.tolist())

    def bracket(self, fraction: float) -> Bracket | None:
        """The bracket for the k-th score at `fraction`, following the slope when the sparsity has moved."""
        if math.isnan(self.value):
            return None
        moved = fraction - self.fraction
        centre, half = self.value + self.slope * moved, self.slope * (self.margin + 0.25 * abs(moved))
        return Bracket(centre - half, centre + half)

    def update(self, state: Tensor, chosen: Selection, fraction: float) -> None:
        """Write the next guess: its margin is twice what this guess was off by, between NARROW and WIDE."""
        margin = WIDE
        if not math.isnan(self.value) and chosen.slope > 0.0:
            centre = self.value + self.slope * (fraction - self.fraction)
            margin = min(max(2.0 * abs(chosen.value - centre) / chosen.slope, NARROW), WIDE)
        state.numpy()[:] = chosen.value, chosen.slope, fraction, margin


def sample_bracket(sample: np.ndarray, fraction: float) -> Bracket | None:
    """A bracket that holds the score at `fraction` of the whole with near certainty, from a random sample.

    The rank of the answer in a sample of n is binomial; the bracket reaches five standard deviations to either side.
    """
    n = sample.size
    spread = 5.0 * math.sqrt(n * fraction * (1.0 - fraction)) + 2.0
    first, last = math.floor(n * fraction - spread), math.ceil(n * fraction + spread)
    part = np.partition(sample, [min(max(i, 0), n - 1) for i in (first, last)])
    lower = float(part[first]) if first >= 0 else -math.inf
    upper = float(part[last]) if last < n else math.inf
    return Bracket(lower, upper) if lower <= upper else None  # None: NaN in the sample
