"""What watches a training run: step times and memory into the trainer's log, a progress bar, and whole checkpoints."""

from __future__ import annotations

import collections
import datetime
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

from .measure import memory_mb

COMPLETE = "complete"
WARMUP_STEPS = 3  # the first steps of a process allocate memory and pick kernels; they are not timed
RECENT_STEPS = 50  # of which the progress bar takes the mean


class Recorder(TrainerCallback):
    """Adds `step_ms` and `peak_mb` to the trainer's log, which a checkpoint carries into the resumed run."""

    def __init__(self) -> None:
        self.seen, self.times, self.started = 0, list[float](), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen > min(WARMUP_STEPS, state.max_steps - 1):
            self.times.append(1e3 * (time.perf_counter() - self.started))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and self.times:
            state.log_history[-1] |= {"step_ms": statistics.median(self.times), "peak_mb": memory_mb(peak=True)}
            self.times.clear()

    @staticmethod
    def entries(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [entry for entry in log if "step_ms" in entry]


class Progress(TrainerCallback):
    """A bar with loss, sparsity, validation accuracy, tokens a second and the time left; where there is no terminal, a
    line per evaluation.

    Tokens are those of an average step of the training texts, without padding: asking the device for them would make
    it wait. Time is that of the last steps, without evaluations and checkpoints between them.
    """

    def __init__(self, method: str, tokens_a_step: float = 0.0) -> None:
        self.method, self.tokens_a_step = method, tokens_a_step
        self.values: dict[str, Any] = {
            "loss": "-", "sparsity": "0 %", "validation": "-", "tokens/s": "-", "time left": "-"
        }  # fmt: skip
        self.seconds: collections.deque[float] = collections.deque(maxlen=RECENT_STEPS)
        self.since: float | None = None  # when the last step ended, or what came after it
        self.console = Console()
        told = [f"{name} {{task.fields[values][{name}]}}" for name in self.values]
        text = "  ".join(told[:3]) + "\n" + "  ".join(told[3:])  # in two lines it fits into 80 columns
        self.bar = Bar(
            TextColumn("{task.description:5}"), BarColumn(14), MofNCompleteColumn(), TextColumn(text),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(
            self.method, total=state.max_steps, completed=state.global_step, values=self.values
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.since is not None:
            self.seconds.append(now - self.since)
        self.since = now
        if self.seconds:
            a_step = max(statistics.fmean(self.seconds), 1e-9)
            self.values["tokens/s"] = f"{self.tokens_a_step / a_step:,.0f}"
            self.values["time left"] = str(
                datetime.timedelta(seconds=round(a_step * (state.max_steps - state.global_step)))
            )
        self.bar.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    on_save = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.values["loss"] = f"{float(logs['loss']):.3f}"
        if "sparsity" in logs:
            self.values["sparsity"] = f"{100 * logs['sparsity']:.1f} %"
        if "eval_accuracy" in logs:
            self.values["validation"] = f"{100 * logs['eval_accuracy']:.1f} %"
            if not self.console.is_terminal:
                told = ", ".join(f"{name} {value}" for name, value in self.values.items())
                print(f"{self.method}: step {state.global_step} of {state.max_steps}, {told}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        self.bar.stop()


class StopOnNaN(TrainerCallback):
    """A loss that is not finite ends the run: what follows would be noise."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = float((logs or {}).get("loss", 0.0))
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise RuntimeError(f"the loss is {loss} at step {state.global_step}; lower the learning rates")


class MarkComplete(TrainerCallback):
    """Marks a checkpoint of the trainer, which writes it in place, once it is whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE).touch()


def newest_checkpoint(folder: Path, steps: int) -> str | None:
    """The last whole checkpoint of a run of `steps` steps, or None; all later ones are removed.

    Later are the half-written one of a killed run, and that of the very last step: from there the trainer would
    make one step more before it notices that it is done.
    """
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for step in sorted(found, reverse=True):
        if step < steps and (found[step] / COMPLETE).is_file():
            return str(found[step])
        shutil.rmtree(found[step])
    return None
