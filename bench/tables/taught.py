"""README's second table: what models reach that a dense one has taught, over the tasks of the longer study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean

from ..accuracy import record
from ..accuracy.record import FINAL, Row

SPARSITIES = (0.5, 0.8, 0.9)
SEEDS = 3  # a mean of fewer says so
NOTHING = "-"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


# Heading, how a result is shown, and what a task's models train beside their blocks, which a method's name tells.
TASKS = {
    "topic": ("topics, %", percent, ""),
    "package": ("packages, %", percent, ""),
    "masked words": ("masked words, nats", lambda value: f"{value:.2f}", ", decoder trained"),
}
LINES = {  # the names in the study
    "dense, the teacher": "dense",
    "magnitude": "magnitude, distilled",
    "PST, accurate": "PST, accurate, distilled",
    "PST, fast": "PST, fast, distilled",
}
OURS = "PST"


def table(folder: Path) -> str:
    studied = [row for row in record.read(folder / "long" / "accuracy.csv").values() if row.cell.stage == FINAL]
    heads = ["taught by the dense model", *(head for head, _, _ in TASKS.values())]
    lines = [[name, *(_cell(studied, method, task) for task in TASKS)] for name, method in LINES.items()]
    rule = ["---", *["---:"] * len(TASKS)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def _cell(studied: Iterable[Row], method: str, task: str) -> str:
    _, shown, more = TASKS[task]
    of_task = [row for row in studied if row.cell.task == task]
    return joined(means(of_task, method + more if method.startswith(OURS) else method, shown))


def means(studied: Iterable[Row], method: str, shown: Callable[[float], str]) -> dict[float, str]:
    """Of the test results of one task, by sparsity."""
    tested: dict[float, list[float]] = {}
    for row in studied:
        if row.cell.method == method and row.test is not None:
            tested.setdefault(row.cell.sparsity, []).append(row.test)
    return {
        sparsity: shown(mean(found)) + ("" if len(found) >= SEEDS else f" ({len(found)})")
        for sparsity, found in tested.items()
    }


def joined(texts: Mapping[float, str]) -> str:
    """One a sparsity, or one for all: where they are the same, as of a method that does not prune."""
    found = [texts.get(s, texts.get(0.0, NOTHING)) for s in SPARSITIES]
    return found[0] if len(set(found)) == 1 else " / ".join(found)
