"""PSTCallback: the sparsity schedule for `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .schedule import SparsitySchedule


class PSTCallback(TrainerCallback):
    """Sets the sparsity from the trainer's global step, so a resumed run goes on where it stopped, and logs it.

    Example:
        trainer = Trainer(model=replace_linear(model, PSTConfig()), ..., callbacks=[PSTCallback()])
    """

    def __init__(self) -> None:
        self.schedule: SparsitySchedule | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.schedule = SparsitySchedule(model, state.max_steps, step_count=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.go_to(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if logs is None or self.schedule is None:
            return
        logs["sparsity"] = round(self.schedule.sparsity, 4)
        if state.log_history:
            state.log_history[-1]["sparsity"] = logs["sparsity"]
