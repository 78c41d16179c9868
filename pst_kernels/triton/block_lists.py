"""Lists of the kept blocks of a mask, made on the device: nothing waits for it, and loops read their bounds there.

Like the index array of a CSR matrix, by rows of blocks (for the forward product and the factor gradients) or by columns
of blocks (for the input gradient, and to add up dV). A list names the columns, or rows, of its kept blocks in ascending
order; unlike in CSR each has room for all blocks, and a count in place of the next one's start, so that no list waits
for another. A kernel goes along a list as along a strip in which the kept blocks lie side by side.

Balance. A learned mask keeps many blocks in some rows and few in others, and a program's work grows with its list's
count. Programs start in the order of their number, so they take the longest list first, and what runs last is short:
work that was the counts alone would take at most 4/3 of the shortest time there is (Graham, 1969). Long lists cut in
parts would even that out, but the parts' sums of y would have to be written and added again, in fp32, more bytes than y
itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..masks.packing import WORD
from .tiles.targets import cdiv

BITS = tl.constexpr(WORD)
CHUNK = 128  # blocks looked at together, one a thread


class BlockLists(NamedTuple):
    """The kept blocks, a list for each row of blocks or for each column of blocks."""

    indices: Tensor  # int32 (lists, capacity): columns (rows) of the kept blocks; garbage from the count on
    counts: Tensor  # int32 (lists,)
    order: Tensor  # int64 (lists,): numbers of the lists, longest first, equal ones in ascending order


@triton.jit(do_not_specialize=["words", "capacity", "size"])
def list_blocks_kernel(
    p_mask, p_indices, p_counts, words, capacity, size, OF_COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """One list to a program. The first weight of a block speaks for all of it."""
    i_list = tl.program_id(0)
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


def lists_of(mask: Tensor, shape: torch.Size, size: int, of_columns: bool) -> BlockLists:
    """`list_blocks`, made once on a stream for as long as nothing writes the mask: most of the launches of a step.

    Not while a CUDA graph is captured: a replay follows a mask that was written after the capture.
    """
    capturing = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or mask.is_inference():  # which has no version
        return list_blocks(mask, shape, size, of_columns)
    now = mask.data_ptr(), mask._version
    state, lists = _made.get(mask, (None, {}))
    if state != now:
        state, lists = _made[mask] = now, {}
    stream = torch.cuda.current_stream(mask.device).cuda_stream if mask.is_cuda else 0
    key = tuple(shape), size, of_columns, stream
    if key not in lists:
        with torch.inference_mode(False):  # they outlive this call
            lists[key] = list_blocks(mask, shape, size, of_columns)
    return lists[key]


_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of a mask: where and of which version it was, and lists


def list_blocks(mask: Tensor, shape: torch.Size, size: int, of_columns: bool) -> BlockLists:
    """The kept blocks of a packed mask of a weight of this shape, by rows of blocks or by columns of blocks."""
    number, capacity = grid_of(shape, size)[:: -1 if of_columns else 1]
    indices = torch.empty((number, capacity), dtype=torch.int32, device=mask.device)
    counts = torch.empty((number,), dtype=torch.int32, device=mask.device)
    if number:
        list_blocks_kernel[(number,)](
            mask, indices, counts, mask.shape[1], capacity, size, OF_COLUMNS=of_columns, CHUNK=CHUNK, num_warps=4
        )  # fmt: skip
    return BlockLists(indices, counts, torch.argsort(counts, descending=True, stable=True))
