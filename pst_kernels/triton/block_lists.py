"""Lists of the kept blocks of a mask, made on the device: nothing waits for it, and loops read their bounds there.

A line is a row of blocks (for the forward product and the factor gradients) or a column of blocks (for the input
gradient). Its list names the columns, or rows, of its kept blocks in ascending order, in room for all of them, and a
count says how many there are. A kernel walks over a line as over a strip in which the kept blocks lie side by side.

Balance. A learned mask keeps many blocks of some lines and few of others, and a program's work is its line's count.
Programs start in the order of their number, so the lines are numbered longest first: what runs last is short, and the
whole takes at most 4/3 of the shortest time there is (Graham, 1969). Long lines cut in parts would even that out, but
the parts' sums of y would have to be written and added again, in fp32, more bytes than y itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks.packing import WORD, packed_width
from .tiles import Case, pair_name

BITS = tl.constexpr(WORD)
CHUNK = 128  # blocks of a line looked at together, one a thread


class Lines(NamedTuple):
    """The kept blocks, line by line."""

    blocks: Tensor  # int32 (lines, capacity): across the line, where its kept blocks lie; garbage from its count on
    counts: Tensor  # int32 (lines,)
    order: Tensor  # int64 (lines,): the lines, longest first, equal ones in their own order


@triton.jit(do_not_specialize=["words", "capacity", "size"])
def list_blocks_kernel(
    p_mask, p_blocks, p_counts, words, capacity, size, OF_COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """A line to a program. The first weight of a block speaks for all of it."""
    line = tl.program_id(0)
    p_blocks += line.to(tl.int64) * capacity
    count = 0
    for first in range(0, capacity, CHUNK):
        across = first + tl.arange(0, CHUNK)
        column = (line if OF_COLUMNS else across) * size
        row = (across if OF_COLUMNS else line).to(tl.int64) * size
        b_word = tl.load(p_mask + row * words + column // BITS, mask=across < capacity, other=0)
        b_kept = (b_word >> (column % BITS // 2)) & 1  # an even column: see packing.py
        place = count + tl.cumsum(b_kept, 0) - b_kept
        tl.store(p_blocks + place, across, mask=b_kept != 0)
        count += tl.sum(b_kept, 0)
    tl.store(p_counts + line, count)


@triton.jit
def strip(p_blocks, first, count, SIZE: tl.constexpr, LENGTH: tl.constexpr):
    """Where LENGTH places of a line's strip lie in the matrix, from place `first` on (a multiple of LENGTH), int32, and
    which of them the strip has. Past its end lies the line's first block again, kept or not.
    """
    d = tl.arange(0, LENGTH)
    RUN: tl.constexpr = min(SIZE, LENGTH)
    if LENGTH <= SIZE:
        exists = d < LENGTH
        i = tl.load(p_blocks + first // SIZE) * SIZE + (first % SIZE + d)
    else:
        place = first // SIZE + d // SIZE
        exists = place < count
        i = tl.load(p_blocks + place, mask=exists, other=0) * SIZE + d % SIZE
    return tl.max_contiguous(tl.multiple_of(i, RUN), RUN), exists


def grid_of(shape: torch.Size, size: int) -> tuple[int, int]:
    """Rows and columns of blocks."""
    return triton.cdiv(shape[0], size), triton.cdiv(shape[1], size)


def lines(mask: Tensor, shape: torch.Size, size: int, of_columns: bool) -> Lines:
    """The kept blocks of a packed mask of a weight of this shape, by rows of blocks or by columns of blocks."""
    number, capacity = grid_of(shape, size)[:: -1 if of_columns else 1]
    blocks = torch.empty((number, capacity), dtype=torch.int32, device=mask.device)
    counts = torch.empty((number,), dtype=torch.int32, device=mask.device)
    if number:
        list_blocks_kernel[(number,)](
            mask, blocks, counts, mask.shape[1], capacity, size, OF_COLUMNS=of_columns, CHUNK=CHUNK, num_warps=4
        )  # fmt: skip
    return Lines(blocks, counts, torch.argsort(counts, descending=True, stable=True))


class Example(NamedTuple):
    """What the launchers of the block kernels take, on device "meta"."""

    weight: Tensor
    U: Tensor
    V: Tensor
    rows: Lines
    columns: Lines


def example(weight: torch.dtype, rows: int, columns: int, rank: int, size: int) -> Example:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    W, mask = empty(rows, columns, dtype=weight), empty(rows, packed_width(columns), dtype=torch.int32)
    by_rows, by_columns = (lines(mask, W.shape, size, of_columns) for of_columns in (False, True))
    return Example(W, empty(rows, rank), empty(rank, columns), by_rows, by_columns)


def case_name(kind: str, size: int, weight: torch.dtype, x: torch.dtype, rank: int, shape: str, note: str) -> str:
    """Such as "forward, blocks of 64, bfloat16, rank 8"; shape and note are left out where they are empty."""
    details = [f"{kind}, blocks of {size}", pair_name(weight, x), f"rank {rank}", shape, note]
    return ", ".join(detail for detail in details if detail)


def cases() -> Iterator[Case]:
    mask = torch.empty((1024, packed_width(1024)), dtype=torch.int32, device="meta")
    for of_columns in (False, True):
        name = "columns of blocks" if of_columns else "rows of blocks"
        yield Case(name, partial(lines, mask, torch.Size((1024, 1024)), 64, of_columns))
