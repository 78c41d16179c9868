"""`python -m bench front`: the README's tables and its measured sentences, from the results files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..accuracy import record
from ..console import Table, console
from ..speed import sparse, training
from ..speed.sparse_row import TOKENS, Row
from . import rows as results
from . import taught
from .sentences import sentences
from .table import replace_between
from .taught import SPARSITIES, joined, means, percent

TASK, CASE = "topic", f"768 -> 3072, T = {TOKENS}"
HEADS = ("", "accuracy, %", "training time", "training memory", "inference", "file", "trained numbers, M")


class Method(NamedTuple):
    """A line of the table."""

    studied: tuple[str, ...]  # its names in the study; the first that has a sparsity tells it
    trained: str | None = None  # its name in `bench training`
    taught: bool = False


METHODS = {
    "dense": Method(("dense",)),
    "LoRA": Method(("LoRA",), "LoRA"),
    "magnitude": Method(("magnitude, at 2e-4", "magnitude"), "magnitude"),
    "magnitude, distilled": Method(("magnitude, distilled",), "magnitude", taught=True),
    "PST as in the paper": Method(("PST",), "PST"),
    "PST, fast": Method(("PST, fast",), "PST, fast"),
    "PST, accurate": Method(("PST, accurate",), "PST, accurate"),
    "PST, fast, distilled": Method(("PST, fast, distilled",), "PST, fast", taught=True),
    "PST, accurate, distilled": Method(("PST, accurate, distilled",), "PST, accurate", taught=True),
}
PRUNED = [name for name in METHODS if name not in ("dense", "LoRA")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the results files")
    parser.add_argument("--readme", type=Path, default=None, help="rewrite what is between the markers there")


def main(options: argparse.Namespace) -> int:
    lines, caption = made(options.results)
    table = Table(title="What one gets")
    for head in HEADS:
        table.add_column(head)
    for line in lines:
        table.add_row(*line)
    console().print(table)
    if options.readme is not None:
        rule = ["---", *["---:"] * (len(HEADS) - 1)]
        text = "\n".join([f"| {' | '.join(cells)} |" for cells in (HEADS, rule, *lines)])
        parts = {"front": f"{text}\n\n{caption}", "taught": taught.table(options.results)} | sentences(options.results)
        for name, part in parts.items():
            replace_between(options.readme, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", part)
    return 0


def made(folder: Path) -> tuple[list[list[str]], str]:
    """The lines, and the conditions under them."""
    studied = [row for row in record.read(folder / "long" / "accuracy.csv").values() if row.cell.task == TASK]
    runs, under = training.REPORT.read(folder / "training.json")
    runs = [row for row in runs if not row.dropout]  # as in the study
    speed, under_speed = sparse.REPORT.read(folder / "sparse.json")
    used = joined({row.sparsity: f"{row.ratio:.2f}" for row in speed if _is_use(row)})
    files = joined({s: f"{1 / 32 + 1 - s:.2f}" for s in SPARSITIES})  # a bit a weight, and 32 a kept one
    lines = [
        [name, joined(_told_first(studied, method.studied)), *_training(runs, method),
         *((used, files) if name in PRUNED else ("1", "1")), _trained(runs, studied, method)]
        for name, method in METHODS.items()
    ]  # fmt: skip
    dates = sorted({row.date for row in studied})
    caption = (
        "At 50 / 80 / 90 % sparsity, over dense. Accuracy: topics of BBC articles, all labels, 500 steps, mean of three"
        " seeds, or of as many as stand beside it, MiniLM; magnitude without a teacher at 80 and 90 % at the rate below"
        " the chosen one, at which two of three seeds come apart"
        f" ([the study](docs/accuracy.md), to {dates[-1]}). Training: whole runs of MiniLM, 16 x 128 tokens, without"
        " dropout, as in the study; memory of tensors, at its highest. Inference: one layer 768 -> 3072, T = 1024."
        " File: of the pruned layers, computed: a bit a weight and the kept ones. Measured on CPU, fp32,"
        f" {speed[0].instructions}"
        f" ([all tables](docs/performance.md)): {_where(under)}; inference {_where(under_speed)}."
    )
    return lines, caption


def _where(under: Mapping[str, Any]) -> str:
    machine, versions, date = (under[name] for name in ("machine", "versions", "date"))
    return f"{machine}, {under['threads']} threads, {versions}, {date}, commit {under['commit']}"


def _is_use(row: Row) -> bool:
    return row.case == CASE and row.what == "y = x W^T"


def _told_first(studied: Sequence[Any], methods: Sequence[str]) -> dict[float, str]:
    """Accuracy by sparsity, of the first method that has one."""
    texts: dict[float, str] = {}
    for name in reversed(methods):
        texts |= means(studied, name, percent)
    return texts


def _training(runs: Sequence[training.Row], method: Method) -> tuple[str, str]:
    """Time and memory."""
    if method.trained is None:
        return "1", "1"
    of_method = {row.sparsity: row for row in runs if row.method == method.trained}

    def of_all(text: Callable[[training.Row], str]) -> str:
        return joined({sparsity: text(row) for sparsity, row in of_method.items()})

    time, memory = of_all(lambda row: f"{row.ratio:.2f}"), of_all(lambda row: f"{row.memory / row.dense_memory:.2f}")
    return (f"{time}, and the teacher", f"{memory}, and the teacher") if method.taught else (time, memory)


def _trained(runs: Sequence[training.Row], studied: Iterable[Any], method: Method) -> str:
    numbers = {row.sparsity: row.trainable for row in runs if row.method == method.trained}
    if method.trained is None:
        numbers = {row.cell.sparsity: row.trainable for row in studied if row.cell.method in method.studied}
    return joined({sparsity: f"{count / 1e6:.1f}" for sparsity, count in numbers.items()})
