"""The CSV of finished cells: what a run resumes from, and all that tables and plots are made of."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_kernels.files import replacing

CSV_NAME = "accuracy.csv"
TUNE, SHOW, FINAL = "tune", "show", "final"  # one setting on validation; an ablation on validation; the test


@dataclass(frozen=True)
class Cell:
    """One training run, by everything that decides its outcome."""

    stage: str
    task: str
    method: str
    sparsity: float
    setting: str  # JSON: learning rates by role, and the penalty
    seed: int
    steps: int
    batch: int
    length: int
    labels_each: int

    def __str__(self) -> str:
        target = f", {100 * self.sparsity:g} %" if self.sparsity else ""
        return f"{self.task}: {self.method}{target}, seed {self.seed}, {self.stage} {self.setting}"

    @property
    def rates(self) -> dict[str, float]:
        return json.loads(self.setting)


@dataclass(frozen=True)
class Row:
    """What came of a cell. `test` is None unless the stage is final; `validation` is None if training diverged."""

    cell: Cell
    metric: str
    validation: float | None
    test: float | None
    train_loss: float | None
    sparsity_reached: float
    trainable: int
    seconds: float
    machine: str
    threads: int
    versions: str
    date: str
    commit: str


CELL_COLUMNS = [field.name for field in dataclasses.fields(Cell)]
ROW_COLUMNS = [field.name for field in dataclasses.fields(Row) if field.name != "cell"]
_INTEGERS = {"seed", "steps", "batch", "length", "labels_each", "trainable", "threads"}
_FLOATS = {"sparsity", "validation", "test", "train_loss", "sparsity_reached", "seconds"}


def setting_text(setting: dict[str, float]) -> str:
    return json.dumps(setting, sort_keys=True)


def read(path: Path) -> dict[Cell, Row]:
    """Finished cells, none if there is no file yet. Raises ValueError for a file of other columns."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [*CELL_COLUMNS, *ROW_COLUMNS]:
            raise ValueError(f"{path} has columns {reader.fieldnames}, expected {[*CELL_COLUMNS, *ROW_COLUMNS]}")
        rows = [_row({name: _value(name, text) for name, text in values.items()}) for values in reader]
    return {row.cell: row for row in rows}


def add(path: Path, row: Row) -> None:
    """Write the file anew with this row in it; two processes that share the grid do not lose each other's rows.

    Of a cell to report there is one row: where tuning has come to choose another setting, the earlier result goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {cell: old for cell, old in read(path).items() if not _replaces(row.cell, cell)} | {row.cell: row}
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*CELL_COLUMNS, *ROW_COLUMNS])
            writer.writerows(_texts(rows.values()))


def _replaces(cell: Cell, other: Cell) -> bool:
    return cell.stage != TUNE and dataclasses.replace(other, setting=cell.setting) == cell


def _texts(rows: Iterable[Row]) -> Iterable[list[str]]:
    order = {TUNE: 0, SHOW: 1, FINAL: 2}
    for row in sorted(rows, key=lambda r: (order[r.cell.stage], dataclasses.astuple(r.cell)[1:])):
        values = [getattr(row.cell, name) for name in CELL_COLUMNS] + [getattr(row, name) for name in ROW_COLUMNS]
        yield ["" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in values]


def _value(name: str, text: str) -> Any:
    if name in _INTEGERS:
        return int(text)
    if name in _FLOATS:
        return float(text) if text else None
    return text


def _row(values: dict[str, Any]) -> Row:
    cell = Cell(**{name: values[name] for name in CELL_COLUMNS})
    return Row(cell, **{name: values[name] for name in ROW_COLUMNS})
