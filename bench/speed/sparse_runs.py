"""A whole run of `python -m bench sparse`, preset by preset: the schedule from its first sparsity to the last step.

A run has few steps, and its schedule goes as fast: what a step takes depends on how far the schedule is, not on how
long it took to come there. Contestants take turns step by step; a run's time is that of all its steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

import pst_kernels as pst

from .modes import LEARNING_RATE
from .sparse_row import DENSE, Budget, Row, seconds_of
from .sparse_steps import MODEL_CASE, minilm_and_loss

PRESETS = ("paper", "accurate", "fast")
RUN_SPARSITIES = (0.5, 0.9)
STEPS, RUNS = 12, 2
HEAD = ("classifier", "pooler")


def run_rows(budget: Budget) -> Iterator[Row]:
    """However much time there is: of fewer steps the schedule would have too few places."""
    base, loss = minilm_and_loss()
    for sparsity in RUN_SPARSITIES:
        runs = [_one_run(base, loss, sparsity, budget) for _ in range(RUNS)]
        dense = [sum(run[DENSE]) for run in runs]
        for name in PRESETS:
            own = [sum(run[name]) for run in runs]
            ratios = [mine / its for mine, its in zip(own, dense, strict=True)]
            yield Row(
                MODEL_CASE, f"a run of {STEPS} steps, preset {name}", sparsity,
                1e3 * median(own) / STEPS, 1e3 * median(dense) / STEPS, median(ratios), min(own) / min(dense),
            )  # fmt: skip


def _one_run(base: Any, loss: Callable[[Any], Tensor], sparsity: float, budget: Budget) -> dict[str, list[float]]:
    steps = {name: _step(name, copy.deepcopy(base), loss, sparsity) for name in (DENSE, *PRESETS)}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEPS):
        for name, step in steps.items():
            taken[name].append(seconds_of(step, budget.clock))
    return taken


def _step(name: str, model: Any, loss: Callable[[Any], Tensor], sparsity: float) -> Callable[[], None]:
    schedule, groups = None, [{"params": list(model.parameters()), "lr": LEARNING_RATE}]
    if name != DENSE:
        saved = HEAD if name == "paper" else (*HEAD, "LayerNorm")
        model = pst.replace_linear(model, pst.PSTConfig.preset(name, sparsity=sparsity, modules_to_save=saved))
        groups, schedule = pst.parameter_groups(model, LEARNING_RATE), pst.SparsitySchedule(model, STEPS)
    optimizer = torch.optim.AdamW(groups)

    def call() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()

    return call
