"""`python -m bench accuracy`: run what is unfinished of the grid, then write its table and plots."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from ..console import console
from ..tables import rows as results
from . import choose, overlap, plots, record, rerun, table, tasks, teachers, train
from .catalogue import ABLATIONS, BASELINES, CANDIDATES, DENSE, METHODS, PATTERNS, RECIPES, tuned_as
from .claims import claim
from .methods import Method
from .record import FINAL, SHOW, TUNE, Cell, Row
from .tasks import TASKS, Size, Task

SPARSITIES = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Study:
    """A regime: how long a cell trains and on how many labels, and the folder of what was found."""

    size: Size
    folder: Path
    marker: str  # of its table in a page
    tasks: tuple[str, ...] = ("topic", "masked words", "package")


STUDIES = {
    "short": Study(Size(), results.RESULTS, "accuracy"),
    "long": Study(Size(steps=500, labels_each=0), results.RESULTS / "long", "accuracy_long"),
    "lines": Study(
        Size(steps=240, batch=32, length=24, labels_each=0), results.RESULTS / "lines", "accuracy_lines", ("section",)
    ),
}
MASKS = results.ROOT / "runs" / "accuracy" / "masks"
TEACHERS, CLAIMS = MASKS.with_name("teachers"), MASKS.with_name("claims")
SECONDS_BETWEEN_LOOKS = 1.0  # where other processes are at all that is left
Todo = tuple[Cell, Task, Method]
GROUPS = {
    "baselines": BASELINES, "ablations": ABLATIONS, "patterns": PATTERNS, "recipes": RECIPES, "candidates": CANDIDATES,
    "all": (*BASELINES, *RECIPES, *ABLATIONS, *PATTERNS),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--study", choices=list(STUDIES), default="short", help="few steps and labels, many, or one-line texts"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help="the study's")
    names = "; ".join([*GROUPS, *METHODS]).replace("%", "%%")  # argparse formats its help
    parser.add_argument("--methods", nargs="+", default=["baselines"], metavar="NAME", help=f"of {names}")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="S")
    parser.add_argument("--seeds", type=int, default=3, help="reported seeds: 0, 1, ... (tuning has one of its own)")
    parser.add_argument("--steps", type=int, help="instead of the study's")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--texts", type=Path, metavar="FOLDER", help="keep the texts there, and read them: to go on elsewhere"
    )
    parser.add_argument("--minutes", type=float, help="start no cell after that; the next call goes on from there")
    parser.add_argument("--output", type=Path, help="folder of the CSV, the table, the plots, instead of the study's")
    parser.add_argument("--show", action="store_true", help="train nothing: table and plots of the CSV as it is")
    parser.add_argument(
        "--rerun", type=int, metavar="N", help=f"train N finished cells of the grid again, into {rerun.CSV_NAME}"
    )
    parser.add_argument("--readme", type=Path, help="rewrite the table between the markers there")


def main(options: argparse.Namespace) -> int:
    """Returns 0, also when the time was up before the grid was done."""
    out = console()
    options.output = options.output or STUDIES[options.study].folder
    path = options.output / record.CSV_NAME
    tasks.texts_folder = options.texts
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.rerun:
        return _rerun(options, path, out)
    if not options.show:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal) as progress:
            _run(options, path, progress)
    rows = record.read(path)
    overlap.write(
        options.output / overlap.CSV_NAME, MASKS, [cell for cell in rows if cell.stage == FINAL and cell.sparsity]
    )
    if options.readme is not None:
        table.rewrite_readme(options.readme, rows, STUDIES[options.study].marker)
    table.print_rows(rows, out)
    table.write_validation(options.output / table.VALIDATION_NAME, rows)
    for picture in plots.draw(rows, overlap.read(options.output / overlap.CSV_NAME), options.output):
        out.print(str(picture), soft_wrap=True)
    return 0


def _run(options: argparse.Namespace, path: Path, progress: Progress) -> None:
    """Several processes of the same command share the work."""
    start, wanted, finished = time.perf_counter(), grid(options), record.read(path)
    bar = progress.add_task("", total=len(known_cells(wanted, finished)) + unknown(wanted, finished))
    while left := list(unfinished(wanted, finished)):
        if options.minutes and time.perf_counter() - start > 60 * options.minutes:
            progress.console.print("time is up; the same command goes on from here")
            return
        done = len(known_cells(wanted, finished) & finished.keys())
        progress.update(bar, description=str(left[0][0]), completed=done)
        row = _first_free(left, path)
        finished = record.read(path)  # with what another process has finished meanwhile
        if row is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        else:
            progress.console.print(_line(row), highlight=False, soft_wrap=True)
    progress.update(bar, description="done", completed=len(known_cells(wanted, finished)))


def _first_free(left: Sequence[Todo], path: Path) -> Row | None:
    """Run the first that no other process is at; None where others are at all of them."""
    for cell, task, method in left:
        with claim(CLAIMS, cell) as mine:
            finished = record.read(path) if mine else {}
            if not mine or cell in finished:
                continue
            known = dense_cell(cell, task, finished) if method.distillation else None
            if known is not None and teachers.in_work(TEACHERS, known):
                continue
            row = train.run(cell, task, method, MASKS, _teacher(cell, task, method, finished))
            record.add(path, row)
            return row
    return None


def _rerun(options: argparse.Namespace, path: Path, out: Console) -> int:
    """Returns 1 if a result lies outside the range of the seeds."""
    finished, wanted = record.read(path), {one.cell: one for one in grid(options)}
    lines = []
    for cell in rerun.chosen(finished, list(wanted), options.rerun):
        one = wanted[dataclasses.replace(cell, setting="")]
        row = train.run(cell, one.task, one.method, MASKS, _teacher(cell, one.task, one.method, finished))
        lines.append(rerun.compare(finished, row))
        rerun.add(options.output / rerun.CSV_NAME, lines[-1])
        told = "{recorded}, again {again}; the {seeds} seeds are {seed_range} apart".format(**lines[-1])
        out.print(f"{cell}: {told}", highlight=False, soft_wrap=True)
    return int(any(line["within"] != "yes" for line in lines))


def _teacher(cell: Cell, task: Task, method: Method, finished: Mapping[Cell, Row]) -> nn.Module | None:
    if method.distillation is None:
        return None
    known = dense_cell(cell, task, finished)
    if known is None:
        raise ValueError(f"{method.name} learns from the dense model, whose setting is not chosen yet")
    return teachers.get(TEACHERS, known, task, METHODS[DENSE])


def dense_cell(cell: Cell, task: Task, finished: Mapping[Cell, Row]) -> Cell | None:
    """The dense model of the same task and seed, at the setting that validation chose; None while that is unknown."""
    like = dataclasses.replace(cell, stage=FINAL, method=DENSE, sparsity=0.0)
    setting = choose.best(finished, choose.tuning_cells(like, METHODS[DENSE].grid), task.higher_is_better)
    return None if setting is None else dataclasses.replace(like, setting=setting)


def _line(row: Row) -> str:
    found = "diverged" if row.validation is None else f"validation {row.metric} {row.validation:.4g}"
    tested = "" if row.test is None else f", test {row.test:.4g}"
    return f"{row.cell}: {found}{tested}, {100 * row.sparsity_reached:.2f} % zeros, {row.seconds:.0f} s"


@dataclass(frozen=True)
class Wanted:
    """A cell to report, without its setting, which the tuning cells of `tuned` decide.

    Of a candidate all settings are run, at stage "tune" and by tuning seeds, and none is reported.
    """

    cell: Cell
    task: Task
    method: Method
    tuned: Method

    @property
    def tuning(self) -> list[Cell]:
        like = dataclasses.replace(self.cell, method=self.tuned.name)
        if self.method.candidate:
            return choose.every_setting(like, self.tuned.grid, self.cell.seed)
        return choose.tuning_cells(like, self.tuned.grid)

    @property
    def teaching(self) -> list[Cell]:
        """The tuning cells of the dense model that this one learns from."""
        like = dataclasses.replace(self.cell, method=DENSE, sparsity=0.0)
        return choose.tuning_cells(like, METHODS[DENSE].grid) if self.method.distillation else []

    def with_setting(self, finished: Mapping[Cell, Row]) -> Cell | None:
        """The cell to run, None while the tuning is unfinished and for a candidate."""
        if self.method.candidate:
            return None
        setting = choose.best(finished, self.tuning, self.task.higher_is_better)
        return None if setting is None else dataclasses.replace(self.cell, setting=setting)


def grid(options: argparse.Namespace) -> list[Wanted]:
    """What is reported, seed by seed, so that an early stop leaves every method with as many seeds. Raises ValueError
    for a method that is not known.
    """
    size = STUDIES[options.study].size
    size = dataclasses.replace(size, steps=options.steps or size.steps)
    chosen = [TASKS[name](size, options.device) for name in options.tasks or STUDIES[options.study].tasks]
    found: dict[Cell, Wanted] = {}
    for seed, task, sparsity, method in itertools.product(
        range(options.seeds), chosen, options.sparsities, chosen_methods(options.methods)
    ):
        if method.only not in (None, sparsity):
            continue
        tuned = tuned_as(method)
        stage = TUNE if method.candidate else FINAL if tuned is method or method in RECIPES else SHOW
        cell = Cell(
            stage, task.name, method.name, sparsity if method.sparse else 0.0, "",
            seed + choose.TUNING_SEED if method.candidate else seed, size.steps, size.batch, size.length,
            size.labels_each,
        )  # fmt: skip
        found[cell] = Wanted(cell, task, method, tuned)
    return list(found.values())


def unfinished(wanted: Sequence[Wanted], finished: Mapping[Cell, Row]) -> Iterator[Todo]:
    """The cells that can run now, each once; the tuning that a cell needs comes before it."""
    found = set()
    for one in wanted:
        todo: list[Todo] = [(cell, one.task, METHODS[DENSE]) for cell in one.teaching if cell not in finished]
        if not todo:  # what learns from the dense model waits for its setting
            todo = [(cell, one.task, one.tuned) for cell in one.tuning if cell not in finished]
        if not todo:
            cell = one.with_setting(finished)
            todo = [(cell, one.task, one.method)] if cell is not None and cell not in finished else []
        for cell, task, method in todo:
            if cell not in found:
                found.add(cell)
                yield cell, task, method


def known_cells(wanted: Sequence[Wanted], finished: Mapping[Cell, Row]) -> set[Cell]:
    """All tuning cells, and those reported cells whose setting is known."""
    reported = (one.with_setting(finished) for one in wanted)
    tuning = {cell for one in wanted for cell in (*one.teaching, *one.tuning)}
    return tuning | {cell for cell in reported if cell is not None}


def unknown(wanted: Sequence[Wanted], finished: Mapping[Cell, Row]) -> int:
    return sum(one.with_setting(finished) is None for one in wanted if not one.method.candidate)


def chosen_methods(names: Sequence[str]) -> list[Method]:
    found: dict[str, Method] = {}
    for name in names:
        if name not in GROUPS and name not in METHODS:
            raise ValueError(f"--methods {name!r} is not known; give some of {'; '.join([*GROUPS, *METHODS])}")
        found |= {method.name: method for method in (GROUPS[name] if name in GROUPS else (METHODS[name],))}
    return list(found.values())
