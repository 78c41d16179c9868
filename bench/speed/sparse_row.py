"""A row of `python -m bench sparse`: one product, or one training step, beside the dense one in the same rounds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from pst_kernels.cpu.compiled.vectors import LANES

from .measure import Timing, interleaved

SHAPES = ((768, 3072), (3072, 768))  # in -> out
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
TOKENS = 1024
Clock = Callable[[], float]
INSTRUCTIONS = {16: "AVX-512", 8: "AVX2"}[LANES]
DENSE, OURS, CSR, PROP, LORA = "dense", "ours", "torch CSR", "SparseProp's loop", "LoRA"


class Run(NamedTuple):
    """What is timed; of a call that takes several steps, the time is that of one."""

    call: Callable[[], Any]
    steps: int = 1


Runs = Mapping[str, Callable[[], Any] | Run]


class Budget(NamedTuple):
    seconds: float
    clock: Clock

    def times(self, factor: float) -> Budget:
        return self._replace(seconds=self.seconds * factor)


@dataclasses.dataclass
class Row:
    """One product or step. Times in ms are medians; `ratio` is the median over rounds, `lowest` that of the lowest."""

    case: str
    what: str
    sparsity: float
    ms: float
    dense_ms: float
    ratio: float
    lowest: float
    csr: float | None = None  # torch's CSR product over dense
    prop: float | None = None  # SparseProp's loop over dense
    of_peak: float | None = None  # kept multiply-adds a second over those a register loop reaches, lowest times
    instructions: str = INSTRUCTIONS
    own_time: bool = False  # processor time of one thread, not time on the wall


def rows(
    case: str, what: dict[str, str], sparsity: float, contestants: Runs, budget: Budget,
    ideal_seconds: float | None = None,
) -> list[Row]:  # fmt: skip
    """A row for each contestant that `what` names, all from the same rounds."""
    timers: dict[str, Clock] = {name: partial(seconds_of, run, budget.clock) for name, run in contestants.items()}
    timings = interleaved(timers, budget.seconds, reference=DENSE, min_rounds=3, max_rounds=400)

    def ratio(name: str) -> float | None:
        return timings[name].ratio_to(timings[DENSE]).median if name in timings else None

    return [
        Row(
            case, text, sparsity, 1e3 * timings[name].quantiles.median, 1e3 * timings[DENSE].quantiles.median,
            ratio(name) or 0.0, _lowest(timings[name]) / _lowest(timings[DENSE]),
            ratio(CSR), ratio(PROP), None if ideal_seconds is None else ideal_seconds / _lowest(timings[name]),
            own_time=budget.clock is time.thread_time,
        )
        for name, text in what.items()
    ]  # fmt: skip


def _lowest(timing: Timing) -> float:
    return min(s for s in timing.seconds if s == s)


def seconds_of(run: Callable[[], Any] | Run, clock: Clock) -> float:
    """Of one step of it."""
    call, steps = run if isinstance(run, Run) else (run, 1)
    start = clock()
    call()
    return (clock() - start) / steps
