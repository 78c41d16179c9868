"""Which setting of a method is used: the best on validation, among those that are sparse enough.

Only rows of the stage "tune" are looked at, and those hold no test result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from .methods import Setting
from .record import TUNE, Cell, Row, setting_text

TUNING_SEED = 100  # none of the seeds that are reported
SPARSITY_SLACK = 0.02  # what a method without an exact target may miss it by
# With few labels a sparsity that is not tuned itself takes the setting chosen at this one, for every method.
TUNED_AT = {0.8: 0.9}


def tuning_cells(cell: Cell, grid: Sequence[Setting], seed: int = TUNING_SEED) -> list[Cell]:
    """The cells that must be finished before the setting of `cell` is known."""
    return every_setting(dataclasses.replace(cell, sparsity=tuned_at(cell)), grid, seed)


def tuned_at(cell: Cell) -> float:
    """The sparsity whose setting the cell takes."""
    return TUNED_AT.get(cell.sparsity, cell.sparsity) if cell.labels_each else cell.sparsity


def every_setting(cell: Cell, grid: Sequence[Setting], seed: int) -> list[Cell]:
    """The tuning cells of a whole grid, at the sparsity of `cell`."""
    return [dataclasses.replace(cell, stage=TUNE, seed=seed, setting=setting_text(setting)) for setting in grid]


def best(rows: Mapping[Cell, Row], candidates: Iterable[Cell], higher_is_better: bool) -> str | None:
    """The chosen setting, None while a candidate is unfinished. Raises ValueError if every candidate diverged."""
    candidates = list(candidates)
    if any(cell not in rows for cell in candidates):
        return None
    finite = [rows[cell] for cell in candidates if rows[cell].validation is not None]
    if not finite:
        raise ValueError(f"every setting of {candidates[0].method} diverged; put lower learning rates into its grid")
    sparse_enough = [row for row in finite if row.sparsity_reached >= row.cell.sparsity - SPARSITY_SLACK]
    if not sparse_enough:
        return max(finite, key=lambda row: row.sparsity_reached).cell.setting
    sign = 1.0 if higher_is_better else -1.0

    def goodness(row: Row) -> float:
        return sign * (row.validation if row.validation is not None else 0.0)

    return max(sparse_enough, key=goodness).cell.setting  # of equals the first of the grid
