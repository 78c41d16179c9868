"""`python -m bench training`: whole runs of MiniLM by methods of the study, beside dense fine-tuning: time and memory.

Once without dropout, as the study trains every method, and once with the dropout that BERT comes with, which the
presets "fast" and "accurate" take away. A run has few steps, and its schedule goes as fast: what a step takes depends
on how far the schedule is, not on how long it took to come there. Contestants take turns step by step; a run's time is
that of all its steps. Memory is the most that tensors hold at one time in a run of its own, from the model's copy on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..accuracy import methods
from ..accuracy.catalogue import METHODS, tuned_as
from ..accuracy.tasks import Size, Topic
from ..tables.report import Report, measured_on
from .measure import peak_bytes
from .sparse_row import DENSE, INSTRUCTIONS, LORA, Clock, seconds_of
from .sparse_steps import BATCH, LENGTH, minilm_and_loss

PRUNING = ("magnitude", "PST", "PST, accurate", "PST, fast")
SPARSITIES = (0.5, 0.8, 0.9)
DROPOUTS = (0.0, methods.BERT_DROPOUT)  # of the model that is given
STEPS = 20  # enough for a schedule's parts to have their share
WATCHED_STEPS = 4  # of a run whose memory is followed: each takes several times as long


@dataclasses.dataclass
class Row:
    """Times in ms a step, of a whole run; memory in bytes."""

    method: str
    sparsity: float
    ms: float
    dense_ms: float
    ratio: float
    memory: int
    dense_memory: int
    trainable: int
    dropout: float
    instructions: str = INSTRUCTIONS


def _cells(row: Row) -> list[str]:
    pruned = f"{100 * row.sparsity:g} %" if row.sparsity else "-"
    times = [f"{row.ms:.0f}", f"{row.dense_ms:.0f}", f"{row.ratio:.2f}"]
    memory = f"{row.memory / row.dense_memory:.2f}"
    return [row.method, pruned, f"{row.dropout:g}", *times, memory, f"{row.trainable:,}"]


REPORT = Report(
    "training", Row, "whole runs of MiniLM: ratios to dense fine-tuning, step by step in turn",
    ("method", "pruned", "dropout given", "ms a step", "dense, ms", "ratio", "memory over dense", "trained numbers"),
    _cells,
    lambda under: (
        f"{measured_on(under)} fp32, {INSTRUCTIONS}, {BATCH} x {LENGTH} tokens; {STEPS} steps from the first sparsity"
        f" to the last. Memory: the most that tensors hold at one time in a run of {WATCHED_STEPS} steps, weights and"
        " AdamW's state included. Magnitude pruning multiplies densely; this package selects its mask, in every step."
    ),
)  # fmt: skip


class Contestant:
    """A copy of the model, what a method made of it, and how far its run is."""

    def __init__(self, name: str, base: Any, loss: Callable[[Any], Tensor], sparsity: float, steps: int) -> None:
        method, topic = METHODS[name], Topic(Size())
        setting = tuned_as(method).grid[0]  # no rate changes a time
        self.name, self.model, self.loss, self.done = name, copy.deepcopy(base), loss, 0
        torch.manual_seed(0)
        method.convert(self.model, methods.Plan(topic, sparsity, 0))
        self.optimizer = torch.optim.AdamW(methods.groups(self.model, topic, setting), weight_decay=0.0)
        self.go_to = methods.pruning(self.model, steps)

    def step(self) -> None:
        self.go_to(self.done)
        self.loss(self.model).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1

    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    REPORT.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    REPORT.run(options, lambda: list(rows(time.perf_counter)))
    return 0


def rows(clock: Clock) -> Iterator[Row]:
    for dropout in DROPOUTS:
        base, loss = minilm_and_loss()
        methods.set_dropout(base, dropout)
        yield from _rows_of(base, loss, dropout, clock)


def _rows_of(base: Any, loss: Callable[[Any], Tensor], dropout: float, clock: Clock) -> Iterator[Row]:
    dense_memory = _memory(DENSE, base, loss, 0.0)
    for sparsity in SPARSITIES:
        # LoRA has no zeros: one row of it is enough
        names = ([LORA] if sparsity == SPARSITIES[0] else []) + list(PRUNING)
        # before the clock starts: what is made once has been made then
        memory = {name: _memory(name, base, loss, sparsity) for name in names}
        contestants = [Contestant(name, base, loss, sparsity, STEPS) for name in (DENSE, *names)]
        seconds = _in_turn(contestants, clock)
        for contestant in contestants[1:]:
            own, dense, name = seconds[contestant.name], seconds[DENSE], contestant.name
            yield Row(
                name, 0.0 if name == LORA else sparsity, 1e3 * own / STEPS, 1e3 * dense / STEPS, own / dense,
                memory[name], dense_memory, contestant.trainable(), dropout,
            )  # fmt: skip


def _memory(name: str, base: Any, loss: Callable[[Any], Tensor], sparsity: float) -> int:
    def run() -> None:
        contestant = Contestant(name, base, loss, sparsity, WATCHED_STEPS)
        for _ in range(WATCHED_STEPS):
            contestant.step()

    return peak_bytes(run, "cpu")


def _in_turn(contestants: list[Contestant], clock: Clock) -> dict[str, float]:
    """Seconds of all steps of each."""
    taken = {contestant.name: 0.0 for contestant in contestants}
    for _ in range(STEPS):
        for contestant in contestants:
            taken[contestant.name] += seconds_of(contestant.step, clock)
    return taken
