"""README's second table: what models reach that a dense one has taught, over the tasks of the longer study."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from ..accuracy import record
from ..accuracy.record import FINAL, Row

SPARSITIES = (0.5, 0.8, 0.9)
NOTHING = "-"
# Heading, how a result is shown, and what a task's models train beside their blocks, which a method's name tells.
TASKS = {
    "topic": ("topics, %", lambda value: f"{100 * value:.1f}", ""),
    "package": ("packages, %", lambda value: f"{100 * value:.1f}", ""),
    "masked words": ("masked words, nats", lambda value: f"{value:.2f}", ", decoder trained"),
}
LINES = {
    "dense, the teacher": "dense",
    "magnitude": "magnitude, distilled",
    "PST, accurate": "PST, accurate, distilled",
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
    name = method + more if method.startswith(OURS) else method
    tested: dict[float, list[float]] = {}
    for row in studied:
        if row.cell.task == task and row.cell.method == name and row.test is not None:
            tested.setdefault(row.cell.sparsity, []).append(row.test)
    if tested.keys() == {0.0}:
        return shown(mean(tested[0.0]))
    return " / ".join(shown(mean(tested[s])) if s in tested else NOTHING for s in SPARSITIES)
