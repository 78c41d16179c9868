"""The accuracy CSV as a table: in the terminal, and in the README between two markers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pst_kernels.files import replacing

from ..tables.table import replace_between
from .catalogue import ABLATIONS, BASELINES, CANDIDATES, PATTERNS, PST, RECIPES
from .choose import tuned_at
from .record import FINAL, SHOW, Cell, Row
from .tasks import TASKS

VALIDATION_NAME = "accuracy_validation.md"
Score = Callable[[Row], float | None]
TESTED = [method.name for method in (*BASELINES, *RECIPES)]
HEADINGS = {"accuracy": "test accuracy, %", "loss": "test loss, nats a masked word"}


@dataclass(frozen=True)
class Shown:
    """A table as texts."""

    title: str
    heads: list[str]
    lines: list[list[str]]

    def print(self, console: Console) -> None:
        table = Table(title=self.title)
        for i, head in enumerate(self.heads):
            table.add_column(head, no_wrap=True, justify="right" if i else "left")
        for line in self.lines:
            table.add_row(*line)
        console.print(table)

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.heads) - 1)]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(c)} |" for c in (self.heads, rule, *self.lines))])


def print_rows(rows: Mapping[Cell, Row], console: Console) -> None:
    """Tables of what was tested, then those of `on_validation`."""
    for task in tasks_of(rows.values()):
        tested = [row for row in rows.values() if row.cell.task == task and row.cell.stage == FINAL]
        if tested:
            _by_method(f"{task}, test", tested, score).print(console)
    for table in on_validation(rows):
        table.print(console)


def on_validation(rows: Mapping[Cell, Row]) -> list[Shown]:
    """A table a task of ablations and patterns, beside the PST that they vary, and one of candidates for a recipe."""
    found = []
    for task in tasks_of(rows.values()):
        of_task = [row for row in rows.values() if row.cell.task == task]
        shown = [row for row in of_task if row.cell.stage == SHOW]
        if shown:
            places = {(row.cell.sparsity, row.cell.seed) for row in shown}
            varied = [r for r in of_task if (r.cell.stage, r.cell.method) == (FINAL, PST)]
            varied = [row for row in varied if (row.cell.sparsity, row.cell.seed) in places]
            found.append(_by_method(f"{task}, validation, at the rates chosen for PST", varied + shown, _validation))
        candidates = [row for row in of_task if row.cell.method in [method.name for method in CANDIDATES]]
        if candidates:
            found.append(_by_setting(f"{task}, validation, candidates for a recipe", candidates))
    return found


def write_validation(path: Path, rows: Mapping[Cell, Row]) -> None:
    """The tables of `on_validation` as Markdown."""
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(["# On validation", *(t.markdown() for t in on_validation(rows)), ""]))


def _by_method(title: str, rows: Sequence[Row], value: Score) -> Shown:
    sparsities = _sparsities(rows)
    lines = [[name, _trainable(rows, name), *_cells(rows, name, sparsities, value)] for name in _methods(rows)]
    return Shown(_title(title, rows), ["method", "trainable", *map(_percent, sparsities)], lines)


def _by_setting(title: str, rows: Sequence[Row]) -> Shown:
    sparsities, lines = _sparsities(rows), []
    for method in [method.name for method in CANDIDATES]:
        for setting in _names(row.cell.setting for row in rows if row.cell.method == method):
            of_line = [row for row in rows if (row.cell.method, row.cell.setting) == (method, setting)]
            cells = [_cell([r for r in of_line if r.cell.sparsity == s], _validation) for s in sparsities]
            lines.append([method, setting, *cells])
    return Shown(_title(title, rows), ["recipe", "setting", *map(_percent, sparsities)], lines)


def _title(text: str, rows: Sequence[Row]) -> str:
    return f"{text}: {rows[0].metric}, mean (worst to best, number of seeds)"


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:g} %"


def markdown(rows: Mapping[Cell, Row]) -> str:
    """What was tested: a line a method, a column a task and sparsity. Raises ValueError when nothing was."""
    tested = [row for row in rows.values() if row.cell.stage == FINAL]
    if not tested:
        raise ValueError("the CSV has no final rows yet; run `python -m bench accuracy`")
    of_task = {task: [r for r in tested if r.cell.task == task] for task in tasks_of(tested)}
    sparsities = {task: _sparsities(of_task[task]) for task in of_task}
    heads = [f"{task}, {_percent(sparsity)}" for task in of_task for sparsity in sparsities[task]]
    lines = [f"| | trainable | {' | '.join(heads)} |", f"| --- |{' ---: |' * (1 + len(heads))}"]
    for method in _methods(tested):
        cells = [cell for task, chosen in of_task.items() for cell in _cells(chosen, method, sparsities[task])]
        lines.append(f"| {method} | {_trainable(tested, method)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", caption(tested)])


def caption(tested: Sequence[Row]) -> str:
    """Sizes, machine, versions and dates of the rows, and how to read them."""
    sizes = _names(
        f"{r.cell.steps} steps of {r.cell.batch} x {r.cell.length} tokens, {r.cell.labels_each or 'all'} labelled texts"
        f"{' a class' if r.cell.labels_each else ''}"
        for r in tested
    )
    metrics = {row.cell.task: HEADINGS[row.metric] for row in tested}
    return (
        f"{'; '.join(f'{task}: {metrics[task]}' for task in tasks_of(tested))}."
        " Mean over seeds (worst to best, number of seeds; they differ in labelled texts, order, head and factors)."
        f" {'; '.join(sizes)}. Learning rates chosen on validation, by a run of another seed, among three for each"
        f" method{_borrowed(tested)}. Pruned are the linear layers inside the blocks of MiniLM (6 layers, 384 wide). A"
        " method without a target of its own (soft movement, L0) shows the sparsity that it reached."
        f" Measured on CPU: {'; '.join(_names(f'{r.machine}, {r.threads} threads' for r in tested))},"
        f" {'; '.join(_names(r.versions for r in tested))}, {'; '.join(_names(r.date for r in tested))}, commit"
        f" {'; '.join(_names(r.commit for r in tested))}."
    )


def _borrowed(tested: Sequence[Row]) -> str:
    """What was not tuned itself, and whose rates it takes."""
    rules = [
        f"; {_percent(to)} takes those chosen at {_percent(at)}"
        for to, at in sorted({(row.cell.sparsity, tuned_at(row.cell)) for row in tested})
        if to != at
    ]
    rules += [
        f"; {method.name} takes those of {method.like}" for method in RECIPES
        if method.like in TESTED and any(row.cell.method == method.name for row in tested)
    ]  # fmt: skip
    return "".join(rules)


def rewrite_readme(path: Path, rows: Mapping[Cell, Row], marker: str = "accuracy") -> None:
    begin, end = (f"<!-- {marker}:{where} -->" for where in ("begin", "end"))
    replace_between(path, begin, end, markdown(rows))


def _trainable(rows: Sequence[Row], method: str) -> str:
    """Of the first task: heads differ."""
    chosen = [row for row in rows if row.cell.method == method]
    return f"{max(row.trainable for row in chosen if row.cell.task == tasks_of(chosen)[0]):,}"


def _cells(rows: Sequence[Row], method: str, sparsities: Sequence[float], value: Score | None = None) -> list[str]:
    of_method = [row for row in rows if row.cell.method == method]
    dense = not any(row.cell.sparsity for row in of_method)  # the same at every sparsity: it prunes nothing
    return [_cell([r for r in of_method if dense or r.cell.sparsity == s], value or score) for s in sparsities]


def _cell(rows: Sequence[Row], value: Score) -> str:
    """Mean, range and number of seeds."""
    values = [found for row in rows if (found := value(row)) is not None]
    if not rows:
        return "-"
    if not values:
        return "diverged"
    percent = rows[0].metric == "accuracy"
    mean, worst, best = sum(values) / len(values), min(values), max(values)
    if not percent:
        worst, best = best, worst
    texts = [f"{100 * v:.1f}" if percent else f"{v:.2f}" for v in (mean, worst, best)]
    missed = max(abs(row.sparsity_reached - row.cell.sparsity) for row in rows)
    reached = f" at {100 * min(r.sparsity_reached for r in rows):.0f} %" if missed > 0.005 else ""
    diverged = f", {len(rows) - len(values)} diverged" if len(values) < len(rows) else ""
    spread = f"{texts[1]} to {texts[2]}, " if len(values) > 1 else ""
    return f"{texts[0]} ({spread}{len(values)}{diverged}){reached}"


def score(row: Row) -> float | None:
    """The test result of a final row, else that on validation."""
    return row.test if row.cell.stage == FINAL else row.validation


def _validation(row: Row) -> float | None:
    return row.validation


def tasks_of(rows: Iterable[Row]) -> list[str]:
    """Topic before masked words, as in `tasks`."""
    return sorted(_names(row.cell.task for row in rows), key=list(TASKS).index)


def _sparsities(rows: Iterable[Row]) -> list[float]:
    return sorted({row.cell.sparsity for row in rows if row.cell.sparsity}) or [0.0]


def _methods(rows: Iterable[Row]) -> list[str]:
    """In the order of the grid; rows of methods that are no longer in it come last."""
    order = [method.name for method in (*BASELINES, *RECIPES, *PATTERNS, *ABLATIONS)]
    found = _names(row.cell.method for row in rows)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _names(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
