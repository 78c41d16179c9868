"""Lists copied in the order in which a product had best go through them: rows that keep equally many one by one.

A processor guesses the end of the loop over a row's weights from the ends before it. A row keeps about a dozen weights
of a chunk at 90 %, and a wrong guess takes as long as several of them. The ends of a small weight's rows are guessed
right from the second tile of tokens on: there is nothing to gain.
"""

from __future__ import annotations

import numpy as np

from pst_kernels.masks.chunks import CHUNK

from .jit import part, whole_pass
from .threads import take_task
from .views import bytes_at, floats_at, halves_at, integers_at, record_of

WINDOW = 512  # rows that change places among themselves
COUNTS = CHUNK + 2  # numbers of a task's scratch
_NUMBERS = ("next", "tasks", "rows", "columns")
_ADDRESSES = ("values", "offsets", "pointers", "its_values", "its_offsets", "its_pointers", "order", "counts")
FRAME = np.dtype([(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)])
_frame = record_of("record_of_row_order", FRAME)


@part
def _count(pointers, first, last, places):
    """places (COUNTS,): how many rows of a window keep fewer weights than the number of the place."""
    for number in range(COUNTS):
        places[number] = 0
    for i in range(first, last):
        places[pointers[i + 1] - pointers[i] + 1] += 1
    for number in range(1, COUNTS):
        places[number] += places[number - 1]


@whole_pass
def order_rows(address):
    """Copies of fp32 lists, the rows of a chunk in `order`, uint16 (chunks, rows), from the beginning of their window.

    A task is a chunk and a window.
    """
    f = _frame(address)
    chunks, windows = (f.columns + CHUNK - 1) // CHUNK, (f.rows + WINDOW - 1) // WINDOW
    kept = np.int64(integers_at(f.pointers + 4 * f.rows * chunks, 1)[0])
    values, offsets = floats_at(f.values, kept), bytes_at(f.offsets, kept)
    its_values, its_offsets = floats_at(f.its_values, kept), bytes_at(f.its_offsets, kept)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        chunk, first = task // windows, task % windows * WINDOW
        last = min(first + WINDOW, f.rows)
        pointers = integers_at(f.pointers + 4 * chunk * f.rows, f.rows + 1)
        its_pointers = integers_at(f.its_pointers + 4 * chunk * f.rows, f.rows + 1)
        order = halves_at(f.order + 2 * (chunk * f.rows + first), last - first)
        places = integers_at(f.counts + 4 * COUNTS * task, COUNTS)
        _count(pointers, first, last, places)
        for i in range(first, last):
            number = pointers[i + 1] - pointers[i]
            order[places[number]] = i - first
            places[number] += 1
        place = np.int64(pointers[first])
        for row in range(last - first):
            i = first + np.int64(order[row])
            its_pointers[first + row] = place
            for entry in range(np.int64(pointers[i]), np.int64(pointers[i + 1])):
                its_values[place] = values[entry]
                its_offsets[place] = offsets[entry]
                place += 1
        if last == f.rows:  # where the next chunk begins, or all ends
            its_pointers[last] = place
