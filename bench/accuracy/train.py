"""One cell, start to end: convert a fresh model, train it, judge it on validation, and in a final cell on the test."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..tables import rows as results
from . import final, methods, overlap
from .methods import Method, Plan
from .record import FINAL, Cell, Row
from .tasks import Batch, Task

LARGEST_GRADIENT = 1.0  # norm to which gradients are clipped, for every method
LOOKED_AT_EVERY = 10  # steps: a GPU need not be waited for at each


@dataclass
class Trained:
    model: Any
    loss: float  # mean of the last tenth of the steps
    seconds: float

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)


def run(
    cell: Cell, task: Task, method: Method, masks_folder: Path | None = None, teacher: nn.Module | None = None
) -> Row:
    """Train the cell. Masks of final cells go into `masks_folder`, from which overlaps are counted.

    `teacher`: the dense model that a method with distillation learns from.
    """
    trained = train(cell, task, method, teacher)
    model, validation, test = trained.model, None, None
    if not trained.diverged:
        validation = task.judge(model, task.validation_texts())
        if cell.stage == FINAL:
            test = final.judge(model, task)
            if masks_folder is not None and method.sparse:
                overlap.save(masks_folder, cell, methods.masks(model))
    return Row(
        cell, task.metric, validation, test, None if trained.diverged else trained.loss, sparsity_of(model),
        sum(p.numel() for p in model.parameters() if p.requires_grad), trained.seconds, results.machine(),
        torch.get_num_threads(), results.versions(), results.today(), results.commit(),
    )  # fmt: skip


def train(cell: Cell, task: Task, method: Method, teacher: nn.Module | None = None) -> Trained:
    """Linear decay of all learning rates, and the cubic schedule of `PSTConfig` for all that prune gradually; PST's own
    settings may say otherwise.

    Stops within a few steps of the first loss that is not finite.
    """
    start = time.perf_counter()
    # One seed before the model: every method starts from the same head and sees the same batches.
    transformers.set_seed(cell.seed)
    model: Any = task.model()
    method.convert(model, Plan(task, cell.sparsity, cell.seed))
    setting = cell.rates
    optimizer = torch.optim.AdamW(methods.groups(model, task, setting), weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / cell.steps)
    trainable = [p for p in model.parameters() if p.requires_grad]
    go_to = methods.pruning(model, cell.steps)
    losses: list[Tensor] = []
    model.train()
    for step, batch in enumerate(task.batches(cell.seed)):
        go_to(step)
        loss, wanted = _losses(model, batch, task, method, teacher)
        total = wanted + _penalty(model, setting, methods.progress_at(step, cell.steps))
        total.backward()
        losses.append(loss.detach())
        if step % LOOKED_AT_EVERY == 0 and not math.isfinite(losses[-1]):
            break
        nn.utils.clip_grad_norm_(trainable, LARGEST_GRADIENT)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    go_to(cell.steps)
    last = [float(loss) for loss in losses[-max(1, cell.steps // 10) :]]
    return Trained(model, sum(last) / len(last), time.perf_counter() - start)


def _losses(
    model: nn.Module, batch: Batch, task: Task, method: Method, teacher: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """The task's loss, and what is minimised."""
    if method.distillation is None:
        loss = task.loss(model, batch)
        return loss, loss
    if teacher is None:
        raise ValueError(f"{method.name} learns from a dense model; pass it as teacher")
    with torch.no_grad():
        shown = task.outputs(teacher, batch)
    own = task.outputs(model, batch)
    return own.loss, method.distillation(own, shown, real=own.real)


def _penalty(model: nn.Module, setting: methods.Setting, progress: float) -> Tensor | float:
    """The penalty's factor rises along the same schedule, as for soft movement pruning."""
    if "penalty" not in setting:
        return 0.0
    term = methods.penalty(model)
    if term is None:
        raise ValueError(f"setting {setting} has a penalty, but no layer of the model has one")
    return setting["penalty"] * progress * term


def sparsity_of(model: nn.Module) -> float:
    """Share of the prunable weights that is zero."""
    masks = methods.masks(model).values()
    return 1.0 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks) if masks else 0.0
