"""Finished cells trained once more, beside what was recorded: does a number of the table come out again?"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from pst_kernels.files import replacing

from .record import CELL_COLUMNS, FINAL, Cell, Row

CSV_NAME = "accuracy_rerun.csv"
RESULTS = ["metric", "recorded", "again", "difference", "seed_range", "seeds", "within", "recorded_commit", "commit"]


def chosen(rows: Mapping[Cell, Row], wanted: Sequence[Cell], count: int) -> list[Cell]:
    """`count` tested cells, evenly spread over those of `wanted` that are finished with more than one seed."""
    places = {dataclasses.replace(cell, setting="") for cell in wanted if cell.stage == FINAL}
    found = [
        cell for cell, row in rows.items()
        if dataclasses.replace(cell, setting="") in places
        and row.test is not None and len(_of_all_seeds(rows, cell)) > 1
    ]  # fmt: skip
    return [found[i * len(found) // count] for i in range(min(count, len(found)))]


def compare(rows: Mapping[Cell, Row], again: Row) -> dict[str, str]:
    """`within`: whether the two results lie no further apart than the best and the worst seed of the table."""
    before, seeds = rows[again.cell], _of_all_seeds(rows, again.cell)
    if before.test is None or again.test is None:
        raise ValueError(f"{again.cell} was not tested twice; rerun cells of stage {FINAL!r} that did not diverge")
    spread = max(seeds) - min(seeds)
    apart = abs(float(f"{again.test:.6g}") - before.test)  # the record has six digits
    values = (
        again.metric, f"{before.test:.6g}", f"{again.test:.6g}", f"{apart:.6g}", f"{spread:.6g}", str(len(seeds)),
        "yes" if apart <= spread else "no", before.commit, again.commit,
    )  # fmt: skip
    place = {name: str(getattr(again.cell, name)) for name in CELL_COLUMNS}
    return place | dict(zip(RESULTS, values, strict=True))


def add(path: Path, line: dict[str, str]) -> None:
    """Write the file anew with this line in the place of an earlier one of the same cell."""
    lines = [old for old in read(path) if any(old[name] != line[name] for name in CELL_COLUMNS)]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*CELL_COLUMNS, *RESULTS], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*lines, line])


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _of_all_seeds(rows: Mapping[Cell, Row], cell: Cell) -> list[float]:
    """Test results of the cell's method, task and sparsity at every seed."""
    like = dataclasses.replace(cell, seed=0, setting="")
    return [
        row.test for other, row in rows.items()
        if dataclasses.replace(other, seed=0, setting="") == like and row.test is not None
    ]  # fmt: skip
