"""Several processes that share a grid: what one works on it claims, by a lock that ends with the process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

from .record import Cell


@contextlib.contextmanager
def claim(folder: Path, cell: Cell, wait: bool = False) -> Iterator[bool]:
    """Whether the cell is this process's inside the block; with `wait`, True once no other has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name_of(cell)}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def name_of(cell: Cell) -> str:
    """Of the files that belong to a cell."""
    return hashlib.sha256(repr(cell).encode()).hexdigest()[:24]
