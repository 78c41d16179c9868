"""Lists of the kept blocks of a mask, made on the device: nothing waits for it, and loops read their bounds there.

Like the index array of a CSR matrix, by rows of blocks (for the forward product and the factor gradients) or by columns
of blocks (for the input gradient, and to add up dV). A list names the columns, or rows, of its kept blocks in ascending
order; unlike in CSR each has room for all blocks, and a count in place of the next one's start, so that no list waits
for another. A kernel goes along a list as along a strip in which the kept blocks lie side by side.

Balance. A learned mask keeps many blocks in some rows and few in others, and a program's work grows with its list's
count. Programs start in the order of their number, so they take the longest list first, and what runs last is short:
work that was the counts alone would take at most 4/3 of the shortest time there is (Graham, 1969). Long lists cut in
parts would even that out, but the parts' sums of y would have to be written and added again, in fp32, more bytes than y
itself. The order is counted, not sorted: a list's place is the number of those that come before it, and there are few.

kept_lists.py says when they are made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks.packing import WORD
from .tiles.targets import cdiv

BITS = tl.constexpr(WORD)
CHUNK = 128  # blocks, or lists, looked at together, one a thread
PLACED = 32  # lists of a program that finds their places


class BlockLists(NamedTuple):
    """The kept blocks, a list for each row of blocks or for each column of blocks."""

    indices: Tensor  # int32 (lists, capacity): columns (rows) of the kept blocks; garbage from the count on
    counts: Tensor  # int32 (lists,)
    order: Tensor  # int64 (lists,): numbers of the lists, longest first, equal ones in ascending order


class KeptBlocks(NamedTuple):
    """Of one mask."""

    rows: BlockLists
    columns: BlockLists


@triton.jit
def list_of(p_mask, p_indices, p_counts, i_list, words, capacity, size, OF_COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Makes one list. The first weight of a block speaks for all of it."""
    p_indices += i_list.to(tl.int64) * capacity
    count = 0
    for first in range(0, capacity, CHUNK):
        across = first + tl.arange(0, CHUNK)
        column = (i_list if OF_COLUMNS else across) * size
        row = (across if OF_COLUMNS else i_list).to(tl.int64) * size
        b_word = tl.load(p_mask + row * words + column // BITS, mask=across < capacity, other=0)
        b_kept = (b_word >> (column % BITS // 2)) & 1  # an even column: see packing.py
        place = count + tl.cumsum(b_kept, 0) - b_kept
        tl.store(p_indices + place, across, mask=b_kept != 0)
        count += tl.sum(b_kept, 0)
    tl.store(p_counts + i_list, count)


@triton.jit(do_not_specialize=["words", "down", "across", "size"])
def list_blocks_kernel(
    p_mask, p_row_indices, p_row_counts, p_column_indices, p_column_counts, words, down, across, size,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One list to a program: of `down` rows of blocks, then of `across` columns of blocks."""
    program = tl.program_id(0)
    if program < down:
        list_of(p_mask, p_row_indices, p_row_counts, program, words, across, size, False, CHUNK)
    else:
        list_of(p_mask, p_column_indices, p_column_counts, program - down, words, down, size, True, CHUNK)


@triton.jit
def place_lists(p_counts, p_order, program, lists, PLACED: tl.constexpr, CHUNK: tl.constexpr):
    """The numbers of PLACED lists to their places: behind the longer ones, and the equal ones before them."""
    i = program * PLACED + tl.arange(0, PLACED)
    b_count = tl.load(p_counts + i, mask=i < lists, other=0)
    place = tl.zeros((PLACED,), tl.int32)
    for first in range(0, lists, CHUNK):
        j = first + tl.arange(0, CHUNK)
        b_other = tl.load(p_counts + j, mask=j < lists, other=-1)
        equal = (b_other[None, :] == b_count[:, None]) & (j[None, :] < i[:, None])
        place += tl.sum(((b_other[None, :] > b_count[:, None]) | equal).to(tl.int32), 1)
    tl.store(p_order + place, i.to(tl.int64), mask=i < lists)


@triton.jit(do_not_specialize=["down", "across"])
def order_lists_kernel(
    p_row_counts, p_row_order, p_column_counts, p_column_order, down, across,
    PLACED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The order of both kinds of lists."""
    program = tl.program_id(0)
    of_rows = tl.cdiv(down, PLACED)
    if program < of_rows:
        place_lists(p_row_counts, p_row_order, program, down, PLACED, CHUNK)
    else:
        place_lists(p_column_counts, p_column_order, program - of_rows, across, PLACED, CHUNK)


@triton.jit
def strip(p_indices, first, count, SIZE: tl.constexpr, LENGTH: tl.constexpr):
    """Where LENGTH places of a list's strip lie in the matrix, from place `first` on (a multiple of LENGTH), int32, and
    which of them the strip has. Past its end lies the first block of the row (column) again, kept or not.
    """
    d = tl.arange(0, LENGTH)
    RUN: tl.constexpr = min(SIZE, LENGTH)
    if LENGTH <= SIZE:
        exists = d < LENGTH
        i = tl.load(p_indices + first // SIZE) * SIZE + (first % SIZE + d)
    else:
        place = first // SIZE + d // SIZE
        exists = place < count
        i = tl.load(p_indices + place, mask=exists, other=0) * SIZE + d % SIZE
    return tl.max_contiguous(tl.multiple_of(i, RUN), RUN), exists


def grid_of(shape: torch.Size, size: int) -> tuple[int, int]:
    """Rows and columns of blocks."""
    return cdiv(shape[0], size), cdiv(shape[1], size)


def room_for_lists(shape: torch.Size, size: int, device: torch.device) -> KeptBlocks:
    """Unfilled lists of the blocks of a weight of this shape."""
    down, across = grid_of(shape, size)
    return KeptBlocks(
        *[
            BlockLists(
                torch.empty((lists, capacity), dtype=torch.int32, device=device),
                torch.empty((lists,), dtype=torch.int32, device=device),
                torch.empty((lists,), dtype=torch.int64, device=device),
            )
            for lists, capacity in ((down, across), (across, down))
        ]
    )  # fmt: skip


def list_blocks(mask: Tensor, shape: torch.Size, size: int, into: KeptBlocks | None = None) -> KeptBlocks:
    """The kept blocks of a packed mask of a weight of this shape; in the tensors of `into`, if given."""
    found = room_for_lists(shape, size, mask.device) if into is None else into
    (down, across), (rows, columns) = grid_of(shape, size), found
    if down and across:
        list_blocks_kernel[(down + across,)](
            mask, rows.indices, rows.counts, columns.indices, columns.counts, mask.shape[1], down, across, size,
            CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip
        order_lists_kernel[(cdiv(down, PLACED) + cdiv(across, PLACED),)](
            rows.counts, rows.order, columns.counts, columns.order, down, across,
            PLACED=PLACED, CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip
    return found
