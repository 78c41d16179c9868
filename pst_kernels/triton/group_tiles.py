"""How the weights of a group's layers are cut into tiles, each of one program of one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..masks.packing import WORD
from ..operands import integers_on
from . import group_row as row
from . import sweep
from .sweep import SweepTile
from .tiles import versions
from .tiles.targets import cdiv

Shape = tuple[int, int]  # n_i and n_j of a layer: see sweep.py

FEWEST_ROWS = 64  # of a program: at ranks 8 + 8 it then reads a byte of factors a weight
ROUNDS = 2  # of programs over the whole device, at least: the last one is seldom full


def tile_of(ranks: int, transposed: bool) -> SweepTile:
    tile = sweep.tile_of(ranks)
    return tile._replace(vector=min(tile.vector, versions.TRANSPOSED_VECTOR)) if transposed else tile


class Cut(NamedTuple):
    """The tiles of a group: how many rows a program goes through, by layer, and its block along j."""

    shapes: list[Shape]
    rows: list[int]
    block_j: int

    @property
    def counts(self) -> list[int]:
        """Tiles of each layer."""
        return [
            cdiv(n_i, rows) * cdiv(n_j, self.block_j) for (n_i, n_j), rows in zip(self.shapes, self.rows, strict=True)
        ]

    def places(self, device: torch.device) -> Tensor:
        """Of each program's tile, as `group_row.load_place` reads it; neighbours along j follow one another."""
        places = [
            layer + row.LAYERS.value * (strip + row.STRIPS.value * block)
            for layer, ((n_i, n_j), rows) in enumerate(zip(self.shapes, self.rows, strict=True))
            for strip in range(cdiv(n_i, rows))
            for block in range(cdiv(n_j, self.block_j))
        ]
        return integers_on(places, device)


def cut(shapes: list[Shape], tile: SweepTile, programs: int) -> Cut:
    """Rows that are equal within a layer and whole words, as many as leave enough programs in all."""
    most = sweep.MOST_ROWS
    while True:
        strips = [cdiv(n_i, most) for n_i, _ in shapes]
        rows = [cdiv(cdiv(n_i, n), WORD) * WORD for (n_i, _), n in zip(shapes, strips, strict=True)]
        found = Cut(shapes, rows, tile.block_j)
        if most <= FEWEST_ROWS or sum(found.counts) >= ROUNDS * programs:
            return found
        most //= 2
