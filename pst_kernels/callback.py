"""PSTCallback: the sparsity schedule for `transformers.Trainer`."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .events import rewinding
from .model import pst_layers, trainable_summary
from .schedule import SparsitySchedule

logger = logging.getLogger("pst_kernels")


class PSTCallback(TrainerCallback):
    """Sets the sparsity from the trainer's global step, so a resumed run goes on where it stopped, and logs it.

    Warns when training ends before the sparsity has reached its end, and when `load_best_model_at_end` has brought back
    a model from before that.

    Args:
        restart: as of `SparsitySchedule`: let a model that was trained before fall back to the schedule's start.
        kind, first, events: as of `SparsitySchedule`.
        rewind: with kind="events", let the trainer's learning rate start anew at each event (see `RewindLR`), whatever
            its `lr_scheduler_type`.

    Example:
        trainer = Trainer(model=replace_linear(model, PSTConfig()), ..., callbacks=[PSTCallback()])
    """

    def __init__(
        self, restart: bool = False, *, kind: str = "cubic", first: float = 0.7, events: int = 4, rewind: bool = True
    ) -> None:
        self.settings: dict[str, Any] = {"restart": restart, "kind": kind, "first": first, "events": events}
        self.rewind = rewind
        self.schedule: SparsitySchedule | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.schedule = SparsitySchedule(model, state.max_steps, step_count=state.global_step, **self.settings)
        if self.schedule.events is not None and self.rewind:
            _rewind(kwargs.get("lr_scheduler"), self.schedule)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.go_to(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        best = state.best_model_checkpoint
        if self.schedule is None:
            return
        if not self.schedule.ended:
            logger.warning(
                "training ended at step %d of %d with sparsity %.4g, below the target %.4g; to finish, train on to the"
                " last step (resume_from_checkpoint), or set `layer.sparsity` of the layers and train at that",
                state.global_step, self.schedule.total_steps, self.schedule.sparsity, self.schedule.config.sparsity,
            )  # fmt: skip
        if not args.load_best_model_at_end or best is None:
            return
        layers = [layer for _, layer in pst_layers(model)]
        pruned = sum(int(layer.pst_num_pruned) for layer in layers)
        if pruned < sum(layer.num_pruned_at(layer.config.sparsity) for layer in layers):
            now = trainable_summary(model)
            logger.warning(
                "the best model, %s, has sparsity %.2f, below the target %.2f: it was saved before the schedule's end;"
                " compare models of the last %.0f %% of the steps only, or leave load_best_model_at_end off",
                best, now.sparsity, now.target_sparsity, 100 * self.schedule.config.cooldown,
            )  # fmt: skip

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if logs is None or self.schedule is None:
            return
        logs["sparsity"] = round(self.schedule.sparsity, 4)
        if state.log_history:
            state.log_history[-1]["sparsity"] = logs["sparsity"]


def _rewind(scheduler: Any, schedule: SparsitySchedule) -> None:
    """Let the trainer's own scheduler follow the events: the one that it made is the one that it saves and steps."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"a {type(scheduler).__name__} cannot be rewound at events; use lr_scheduler_type='linear', or"
            " PSTCallback(rewind=False)"
        )
    scheduler.lr_lambdas = [rewinding(schedule)] * len(scheduler.lr_lambdas)
    factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = rate * factor
