"""The progress of a fine-tuning job, fed the states that a trainer would feed it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
from rich.console import Console

from pst_kernels.finetune import callbacks
from pst_kernels.finetune.callbacks import RECENT_STEPS, Progress

STEPS = 100


class Run:
    """A trainer's calls, with a clock that the test turns."""

    def __init__(self, progress: Progress, monkeypatch, first: int = 0) -> None:
        self.progress, self.now = progress, 1000.0
        self.state = SimpleNamespace(global_step=first, max_steps=STEPS)
        monkeypatch.setattr(callbacks.time, "perf_counter", lambda: self.now)
        self.tell("on_train_begin")

    def tell(self, event: str, **settings) -> None:
        getattr(self.progress, event)(None, self.state, None, **settings)

    def step(self, seconds: float, **logs: float) -> None:
        self.now += seconds
        self.state.global_step += 1
        self.tell("on_step_end")
        if logs:
            self.tell("on_log", logs=logs)

    def evaluate(self, seconds: float, accuracy: float) -> None:
        self.now += seconds
        self.tell("on_log", logs={"eval_accuracy": accuracy})
        self.tell("on_evaluate")


def test_a_line_per_evaluation_without_a_terminal(monkeypatch, capsys):
    run = Run(Progress("pst", tokens_a_step=320.0), monkeypatch)
    run.step(7.0, loss=2.0, sparsity=0.1)  # the first one, which nobody timed
    assert run.progress.values["tokens/s"] == run.progress.values["time left"] == "-"
    for _ in range(9):
        run.step(0.5, loss=1.25, sparsity=0.4567)
    run.evaluate(30.0, 0.75)
    assert capsys.readouterr().out == (
        "pst: step 10 of 100, loss 1.250, sparsity 45.7 %, validation 75.0 %, tokens/s 640, time left 0:00:45\n"
    )


def test_evaluations_and_checkpoints_are_no_part_of_a_step(monkeypatch, capsys):
    run = Run(Progress("dense", tokens_a_step=100.0), monkeypatch, first=40)
    run.step(1.0)
    run.step(1.0)
    run.evaluate(500.0, 0.5)
    run.now += 90.0
    run.tell("on_save")
    run.step(1.0)
    assert run.progress.values["tokens/s"] == "100"
    assert run.progress.values["time left"] == "0:00:57"
    for _ in range(RECENT_STEPS):  # and the earlier steps are forgotten
        run.step(0.1)
    assert run.progress.values["tokens/s"] == "1,000"
    assert run.progress.values["time left"] == "0:00:01"
    assert run.progress.values["sparsity"] == "0 %"


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr(callbacks, "Console", lambda: Console(file=screen, force_terminal=True, width=80))
    progress = Progress("pst", tokens_a_step=320.0)
    run = Run(progress, monkeypatch)
    for _ in range(11):
        run.step(0.25, loss=0.5, sparsity=0.9)
    run.evaluate(1.0, 0.8)
    run.tell("on_train_end")
    last = screen.getvalue().rpartition("pst")[2]
    assert "11/100" in last
    assert "loss 0.500  sparsity 90.0 %  validation 80.0 %" in last
    assert "tokens/s 1,280  time left 0:00:22" in last
    assert capsys.readouterr().out == ""
