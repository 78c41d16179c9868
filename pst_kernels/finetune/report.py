"""The final table, results.json and the plot."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import env
from ..files import save_figure, write_json
from . import processes
from .data import Dataset
from .lines import LINES, heading
from .result import Result
from .settings import Settings

COLOURS = {"dense": "tab:blue", "pst": "tab:orange"}


def print_table(results: Mapping[str, Result], settings: Settings) -> None:
    """One column a method, one line a number, so that each number has room for what it means."""
    table = Table(title="Fine-tuned on the same batches")
    table.add_column("")
    for method in results:
        table.add_column(heading(method, settings.sparsity), justify="right")
    for name, text in LINES.items():
        table.add_row(name, *(text(result.row, result.details) for result in results.values()))
    console = Console()
    console.print(table)
    console.print(
        "Zeros are counted in the saved file. Movement pruning trains every weight and a score for every prunable one."
        " The checkpoint of PST is its adapter; its folder is the whole model, pruned weights as bits and values."
        " The share of dense, of a forward, is that of the same rounds; the dense column was measured on its own."
        + _conditions(results, settings),
        style="dim",
    )


def _conditions(results: Mapping[str, Result], settings: Settings) -> str:
    """What step times and memory were measured under."""
    told = f" Trained with dropout {settings.dropout:g}."
    if "pst" in results and settings.teacher_folder is not None:
        told += " A step of PST, and its memory, have its teacher's forward in them."
    return told


def write_results(path: Path, results: Mapping[str, Result], settings: Settings, dataset: Dataset) -> None:
    write_json(
        path,
        {
            "rows": [result.row for result in results.values()],
            "details": {method: result.details for method, result in results.items()},
            "history": {method: result.history for method, result in results.items()},
            "settings": dataclasses.asdict(settings),
            "seed": settings.seed,
            "processes": processes.count(),
            "data": {"labels": dataset.labels, "fingerprint": dataset.fingerprint(), **dataset.counts},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": env.machine(),
            "versions": env.versions(),
        },
    )


def draw_curves(path: Path, results: Mapping[str, Result]) -> None:
    """Loss, sparsity and validation accuracy over the steps, the methods beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, sparsity, accuracy) = pyplot.subplots(3, 1, figsize=(7, 8), sharex=True, layout="constrained")
    for method, result in results.items():
        history, colour = result.history, COLOURS[method]
        loss.plot(history["step"], history["loss"], color=colour, alpha=0.25, linewidth=1)
        loss.plot(history["step"], _smooth(history["loss"]), color=colour, label=method)
        sparsity.plot(history["step"], [100 * s for s in history["sparsity"]], color=colour, label=method)
        shares = [100 * a for a in history["validation_accuracy"]]
        accuracy.plot(history["validation_step"], shares, color=colour, marker="o", label=method)
    for axes, title in ((loss, "training loss"), (sparsity, "sparsity, %"), (accuracy, "validation accuracy, %")):
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    loss.set_ylim(bottom=0)
    loss.legend()
    accuracy.set_xlabel("step")
    save_figure(figure, path)
    pyplot.close(figure)


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential mean, without the bias of its start."""
    smoothed: list[Any] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        smoothed.append(total / weight)
    return smoothed
