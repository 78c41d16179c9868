"""Parts of packed layers: the rows or the columns of W that one of several processes holds, cut from values and bits.

What the whole layer would be loaded with is made of its bits, and of that the part is taken, of single weights chunk by
chunk of its columns: there is no dense weight on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..masks.chunks import CHUNK, chunks_of, fill_pointers
from .packed import Shape, indices


class Part(NamedTuple):
    """One of as many equal parts of a layer as there are ranks."""

    whole: Shape
    dim: int  # 0: some of its rows, which are outputs; 1: some of its columns
    rank: int
    ranks: int

    @property
    def shape(self) -> Shape:
        rows, columns = self.ranges
        return self.whole._replace(out=len(rows), columns=len(columns))

    @property
    def ranges(self) -> tuple[range, range]:
        """Which rows and which columns of the whole these are."""
        found = [range(self.whole.out), range(self.whole.columns)]
        size = len(found[self.dim]) // self.ranks
        found[self.dim] = range(self.rank * size, (self.rank + 1) * size)
        return found[0], found[1]

    def refusal(self) -> str | None:
        """What keeps a layer from being cut in this way."""
        size = self.whole[self.dim]
        if size % (self.ranks * max(1, self.whole.block)) == 0:
            return None
        blocks = f" of whole blocks of {self.whole.block}" if self.whole.block else ""
        return f"has {size} {('rows', 'columns')[self.dim]}, which do not make {self.ranks} equal parts{blocks}"


def cut(part: Part, values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a layer that holds the part, from the whole layer's values and bits, all on the CPU."""
    take = _blocks if part.whole.block else _weights
    return take(part, values, *indices(part.whole, bits))


def _weights(part: Part, values: Tensor, offsets: Tensor, pointers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = part.ranges
    column_of, ends = offsets.numpy(), pointers.numpy()
    counts = np.empty((chunks_of(len(columns)), len(rows)), np.int64)
    found: list[tuple[Tensor, np.ndarray]] = []
    for number in range(len(counts)):
        first = columns.start + number * CHUNK
        width = min(CHUNK, columns.stop - first)
        pieces = []
        for chunk in range(first // CHUNK, chunks_of(first + width)):  # one or two of the whole layer's
            runs = ends[chunk * part.whole.out + rows.start : chunk * part.whole.out + rows.stop + 1]
            row = np.repeat(np.arange(len(rows)), np.diff(runs))
            column = column_of[runs[0] : runs[-1]].astype(np.int64) + (chunk * CHUNK - first)
            inside = (column >= 0) & (column < width)
            pieces.append((row[inside], column[inside], np.arange(runs[0], runs[-1])[inside]))
        row, column, entry = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        order = np.argsort(row, kind="stable")  # in a row by column already
        found.append((values[torch.from_numpy(entry[order])], column[order].astype(np.uint8)))
        counts[number] = np.bincount(row, minlength=len(rows))
    runs = np.empty(counts.size + 1, np.int32)
    fill_pointers(counts.ravel(), runs)
    kept, its_columns = zip(*found, strict=True)
    return torch.cat(kept), torch.from_numpy(np.concatenate(its_columns)), torch.from_numpy(runs)


def _blocks(part: Part, values: Tensor, starts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = part.whole.block
    rows, width = (range(places.start // size, -(-places.stop // size)) for places in part.ranges)
    row = torch.repeat_interleave(starts.diff())
    inside = (row >= rows.start) & (row < rows.stop) & (columns >= width.start) & (columns < width.stop)
    counts = torch.bincount(row[inside] - rows.start, minlength=len(rows))
    return values[inside], nn.functional.pad(counts.cumsum(0), (1, 0)), columns[inside] - width.start
