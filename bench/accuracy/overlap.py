"""How alike the masks of different methods are: the share of the weights kept by one that another keeps too."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
from torch import Tensor

from pst_kernels.files import replacing

from .claims import name_of
from .record import Cell

CSV_NAME = "accuracy_overlap.csv"
COLUMNS = ["task", "sparsity", "seed", "method", "other", "kept", "kept_by_both", "share", "share_by_chance"]


def save(folder: Path, cell: Cell, masks: dict[str, Tensor]) -> None:
    """One bit a weight, all layers in a row, under the name of the cell."""
    bits = np.concatenate([mask.cpu().numpy().ravel() for mask in masks.values()])
    with replacing(folder / f"{name_of(cell)}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, packed=np.packbits(bits), size=bits.size, cell=[repr(cell)])


def load(folder: Path, cell: Cell) -> np.ndarray | None:
    path = folder / f"{name_of(cell)}.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        return np.unpackbits(file["packed"], count=int(file["size"])).astype(bool)


def write(path: Path, folder: Path, cells: list[Cell]) -> None:
    """Every pair of methods of the same task, sparsity and seed whose masks are in `folder`; earlier pairs are kept."""
    rows = {tuple(row[:5]): row for row in read(path)}
    for (task, sparsity, seed), group in itertools.groupby(sorted(cells, key=_place), _place):
        found = {cell.method: load(folder, cell) for cell in group}
        masks = {method: mask for method, mask in found.items() if mask is not None}
        for one, other in itertools.permutations(masks, 2):
            kept, both = int(masks[one].sum()), int((masks[one] & masks[other]).sum())
            key = (task, f"{sparsity:g}", str(seed), one, other)
            chance = float(masks[other].mean())
            rows[key] = [*key, str(kept), str(both), f"{both / max(1, kept):.4f}", f"{chance:.4f}"]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows[key] for key in sorted(rows))


def read(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    if header != COLUMNS:
        raise ValueError(f"{path} has columns {header}, expected {COLUMNS}; remove it and run again")
    return rows


def _place(cell: Cell) -> tuple[str, float, int]:
    return cell.task, cell.sparsity, cell.seed
