"""The compiled passes that make lists of kept weights (see ../sparse_rows.py) from a mask, and those of W^T."""

from __future__ import annotations

import llvmlite.ir
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from pst_kernels.masks.chunks import CHUNK
from pst_kernels.masks.packing import WORD

from .jit import part, whole_pass
from .threads import take_task
from .views import bytes_at, halves_at, integers_at, record_of, words_at

WORDS = CHUNK // WORD  # packed words of a chunk of a row
_NUMBERS = ("next", "tasks", "task_rows", "rows", "columns", "row_stride", "column_stride", "words", "is_16_bit")
_ADDRESSES = ("packed", "weight", "values", "offsets", "pointers", "its_values", "its_offsets", "its_pointers")
FRAME = np.dtype([(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)])
_frame = record_of("record_of_sparse_lists", FRAME)


@intrinsic
def _count(typing_context, word):
    """How many bits of a word are set."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@intrinsic
def _first_bit(typing_context, word):
    """The place of the lowest bit of a word that is not 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], llvmlite.ir.Constant(llvmlite.ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@part
def _in_order(word):
    """The bits of a packed word in the order of its columns: its halves are the even and the odd ones."""
    word = np.uint64(word)
    move = (word ^ (word >> np.uint64(8))) & np.uint64(0x0000FF00)
    word = word ^ move ^ (move << np.uint64(8))
    move = (word ^ (word >> np.uint64(4))) & np.uint64(0x00F000F0)
    word = word ^ move ^ (move << np.uint64(4))
    move = (word ^ (word >> np.uint64(2))) & np.uint64(0x0C0C0C0C)
    word = word ^ move ^ (move << np.uint64(2))
    move = (word ^ (word >> np.uint64(1))) & np.uint64(0x22222222)
    return word ^ move ^ (move << np.uint64(1))


@whole_pass
def count(address):
    """How many weights of each row are kept in each chunk, into pointers[1 + chunk * rows + row]."""
    f = _frame(address)
    counts = integers_at(f.pointers + 4, f.rows * ((f.columns + CHUNK - 1) // CHUNK))
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        for i in range(task * f.task_rows, min(f.rows, (task + 1) * f.task_rows)):
            words = words_at(f.packed + 4 * i * f.words, f.words)
            for first in range(0, f.words, WORDS):
                total = np.int64(0)
                for w in range(first, min(first + WORDS, f.words)):
                    total += np.int64(_count(np.uint64(words[w])))
                counts[first // WORDS * f.rows + i] = total


@whole_pass
def fill(address):
    """Values and offsets of the kept weights, from the mask and a weight of any strides."""
    f = _frame(address)
    kept = np.int64(integers_at(f.pointers + 4 * f.rows * ((f.columns + CHUNK - 1) // CHUNK), 1)[0])
    pointers = integers_at(f.pointers, f.rows * ((f.columns + CHUNK - 1) // CHUNK))
    values32, values16, offsets = words_at(f.values, kept), halves_at(f.values, kept), bytes_at(f.offsets, kept)
    extent = (f.rows - 1) * f.row_stride + (f.columns - 1) * f.column_stride + 1
    weight32, weight16 = words_at(f.weight, extent), halves_at(f.weight, extent)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        for i in range(task * f.task_rows, min(f.rows, (task + 1) * f.task_rows)):
            words = words_at(f.packed + 4 * i * f.words, f.words)
            for first in range(0, f.words, WORDS):
                entry = np.int64(pointers[first // WORDS * f.rows + i])
                for w in range(first, min(first + WORDS, f.words)):
                    word = _in_order(words[w])
                    start = i * f.row_stride + w * WORD * f.column_stride
                    while word != np.uint64(0):
                        bit = np.int64(_first_bit(word))
                        word &= word - np.uint64(1)
                        if f.is_16_bit:
                            values16[entry] = weight16[start + bit * f.column_stride]
                        else:
                            values32[entry] = weight32[start + bit * f.column_stride]
                        offsets[entry] = np.uint8((w - first) * WORD + bit)
                        entry += 1


@part
def _entries(f, pointers, task, chunks):
    """How many a task of `transpose` moves."""
    first, line = task // chunks * CHUNK, task % chunks * f.rows
    return pointers[line + min(f.rows, first + CHUNK)] - pointers[line + first]


@whole_pass
def transpose(address):
    """The lists of W^T. A task is a block of CHUNK rows and a chunk: one run of the lists, before and after."""
    f = _frame(address)
    chunks, its_chunks = (f.columns + CHUNK - 1) // CHUNK, (f.rows + CHUNK - 1) // CHUNK
    pointers, its_pointers = (
        integers_at(f.pointers, f.rows * chunks + 1),
        integers_at(f.its_pointers, f.columns * its_chunks + 1),
    )
    kept = np.int64(pointers[f.rows * chunks])
    offsets, its_offsets = bytes_at(f.offsets, kept), bytes_at(f.its_offsets, kept)
    values32, its_values32 = words_at(f.values, kept), words_at(f.its_values, kept)
    values16, its_values16 = halves_at(f.values, kept), halves_at(f.its_values, kept)
    cursors = np.empty(CHUNK, np.int32)
    seen, base = np.int64(0), np.int32(0)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        for earlier in range(seen, task):  # a thread's tasks come in order
            base += _entries(f, pointers, earlier, chunks)
        seen = task
        its_chunk, chunk = task // chunks, task % chunks
        columns = min(CHUNK, f.columns - chunk * CHUNK)
        first, last = its_chunk * CHUNK, min(f.rows, (its_chunk + 1) * CHUNK)
        cursors[:] = 0
        for entry in range(pointers[chunk * f.rows + first], pointers[chunk * f.rows + last]):
            cursors[offsets[entry]] += 1
        place = base
        for j in range(columns):
            its_pointers[its_chunk * f.columns + chunk * CHUNK + j] = place
            size, cursors[j] = cursors[j], place
            place += size
        for i in range(first, last):
            for entry in range(pointers[chunk * f.rows + i], pointers[chunk * f.rows + i + 1]):
                column = offsets[entry]
                its_entry = cursors[column]
                cursors[column] = its_entry + 1
                its_offsets[its_entry] = np.uint8(i - first)
                if f.is_16_bit:
                    its_values16[its_entry] = values16[entry]
                else:
                    its_values32[its_entry] = values32[entry]
        if task == f.tasks - 1:
            its_pointers[f.columns * its_chunks] = kept
