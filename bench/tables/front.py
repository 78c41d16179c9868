"""`python -m bench front`: the README's one table, from the results files that hold its figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..accuracy import record
from ..console import Table, console
from ..speed import sparse, sparse_steps
from ..speed.providers import RELEASED
from ..speed.sparse_row import TOKENS, Row
from . import rows as results
from .table import replace_between

BEGIN, END = "<!-- front:begin -->", "<!-- front:end -->"
SPARSITIES = (0.5, 0.8, 0.9)
CASE = f"768 -> 3072, T = {TOKENS}"
HEADS = (
    "",
    "accuracy, % at 50 / 80 / 90 %",
    "training step",
    "training memory",
    "inference",
    "file",
    "trained numbers",
)
NOTHING, OURS = "-", "PST (torch)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the results files")
    parser.add_argument("--readme", type=Path, default=None, help="rewrite the table between the markers there")


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
        replace_between(options.readme, BEGIN, END, f"{text}\n\n{caption}")
    return 0


def made(folder: Path) -> tuple[list[list[str]], str]:
    """The lines, and the conditions under them."""
    studied = list(record.read(folder / "accuracy.csv").values())
    found = _accuracy(studied)
    speed, under = sparse.REPORT.read(folder / "sparse.json")
    steps = _of_sparsities(speed, lambda row: row.case == CASE and row.what == sparse_steps.EXACT)
    fixed = _of_sparsities(speed, lambda row: row.case == CASE and row.what == sparse_steps.KEPT)
    used = _of_sparsities(speed, lambda row: row.case == CASE and row.what == "y = x W^T")
    lora = [row.ratio for row in speed if row.case == CASE and row.what == sparse_steps.LORA_STEP]
    measured = [row for row in results.read_csv(folder / "benchmark.csv") if _used(row)]
    memory = _memory(measured)
    files = " / ".join(f"{1 / 32 + 1 - s:.2f}" for s in SPARSITIES)  # a bit a weight, and 32 a kept one
    of_method: dict[str, tuple[str, ...]] = {
        "dense": ("1", "1", "1", "1"),
        "LoRA": (f"{lora[0]:.2f}" if lora else NOTHING, memory("LoRA"), "1", "1"),
        "magnitude": (NOTHING, NOTHING, used, files),
        "PST as released": (_release_step(measured), memory(RELEASED), "1", "1"),
        "PST, our recipe": (f"{steps}; mask fixed {fixed}", memory(OURS), used, files),
        "PST, our recipe, distilled": ("the same, and the teacher's forward", "the same, and the teacher", used, files),
    }  # fmt: skip
    lines = [
        [name, found[name][0], *of_method[name], found[name][1]] for name in of_method if name in found
    ]  # fmt: skip
    dates = ", ".join(sorted({row.date for row in studied}))
    older = ", ".join(sorted({row.date for row in measured}))
    caption = (
        "Accuracy: topics of BBC articles, ten labelled texts a class, mean of three seeds, MiniLM,"
        " masks that move to the end ([the study](docs/accuracy.md)). Step and inference: one layer 768 -> 3072,"
        " T = 1024, fp32, over the dense"
        f" one's in the same round, at 50 / 80 / 90 % ({speed[0].instructions},"
        f" {under['threads']} threads{', processor time' if speed[0].own_time else ''}; "
        "[all tables](docs/performance.md)); mask fixed: with its kept weights trained. Memory: a MiniLM step of"
        " 16 x 128 tokens at 90 %, tensors alone: parameters, AdamW's state and the step's peak. File: of the"
        " pruned layers over dense fp32, computed: a bit a weight and"
        f" the kept ones. Measured on CPU: {under['machine']}, {under['versions']}, {under['date']}, commit"
        f" {under['commit']}; memory and the release's step are from {older}, the accuracies from {dates}."
    )
    return lines, caption


def _used(row: results.Row) -> bool:
    """Steps of a whole model, and the release's of the layer that the table is about."""
    release = (row.provider, row.mode, row.in_features, row.out_features) == (RELEASED, "step", 768, 3072)
    return row.mode == "model" or (release and row.dtype == "float32")


def _release_step(measured: Sequence[results.Row]) -> str:
    ratios = [row.ratio for row in measured if row.mode == "step" and row.ratio]
    return f"{ratios[0]:.2f} at 90 %" if ratios else NOTHING


def _memory(measured: Sequence[results.Row]) -> Callable[[str], str]:
    """Of a provider: parameters, optimizer and peak of its whole training step over dense training's."""
    of_provider = {row.provider: row.memory_bytes for row in measured if row.mode == "model"}

    def over_dense(provider: str) -> str:
        found, dense = of_provider.get(provider), of_provider.get("dense")
        return f"{found / dense:.2f}" if found and dense else NOTHING

    return over_dense


def _of_sparsities(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> str:
    ratios = {row.sparsity: row.ratio for row in rows if wanted(row)}
    return " / ".join(f"{ratios[s]:.2f}" if s in ratios else NOTHING for s in SPARSITIES)


def _accuracy(studied: Sequence[Any]) -> dict[str, tuple[str, str]]:
    """Method -> its accuracies, and how many numbers it trains."""
    tested: dict[tuple[str, float], list[Any]] = {}
    for row in studied:
        if row.cell.task == "topic" and row.test is not None:
            tested.setdefault((row.cell.method, row.cell.sparsity), []).append(row)
    found = {}
    for method in dict.fromkeys(name for name, _ in tested):
        of_method = {s: tested[name, s] for name, s in tested if name == method}
        everywhere = of_method.get(0.0)  # a method that does not prune has one row for all sparsities
        means = [mean(r.test for r in of_method.get(s, everywhere or [])) if of_method.get(s, everywhere) else None
                 for s in SPARSITIES]  # fmt: skip
        texts = [NOTHING if value is None else f"{100 * value:.1f}" for value in means]
        same = len(set(texts)) == 1
        numbers = next(iter(of_method.values()))[0].trainable
        found[method] = (texts[0] if same else " / ".join(texts), f"{numbers / 1e6:.1f} M")
    return found
