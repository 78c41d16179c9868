"""The product of one token with lists of kept weights: what decoding at batch 1 is made of.

It is bound by memory, so it reads one bit a weight in the place of a byte a kept one (see expansion.py); ready.py keeps
the bits with the layer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pst_kernels.masks.chunks import CHUNK, chunks_of

from . import threads as team
from .expansion import BYTES, bit_products
from .jit import whole_pass
from .ready import Lists, Ready
from .sparse_passes import add_lanes, pack_token
from .threads import take_task
from .vectors import LANES
from .views import bytes_at, floats_at, halves_at, integers_at, numbers_of, record_of

MOST_ROWS = 1024  # of a task: their sums, lane by lane, stay in a core's second cache
LINE = 16  # floats of y that two threads must not write at once
_NUMBERS = (
    "next", "slots", "x", "y", "tasks", "task_rows", "rows", "columns", "packed_bytes", "x_is_bf16", "y_is_bf16",
    "values_are_bf16",
)  # fmt: skip
_ADDRESSES = ("values", "offsets", "bits", "pointers", "bias", "packed", "sums")
FRAME = np.dtype([(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)])
_frame, _numbers = record_of("record_of_one_token", FRAME), numbers_of(FRAME)


@whole_pass
def make_bits(address):
    """One bit a weight, (chunks, rows, 16 bytes), of offsets and pointers. A task is a chunk."""
    f = _frame(address)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        pointers = integers_at(f.pointers + 4 * task * f.rows, f.rows + 1)
        bits = bytes_at(f.bits + BYTES * task * f.rows, BYTES * f.rows)
        offsets = bytes_at(f.offsets, np.int64(pointers[f.rows]))
        bits[:] = np.uint8(0)
        for i in range(f.rows):
            for entry in range(pointers[i], pointers[i + 1]):
                offset = offsets[entry]
                bits[i * BYTES + (offset >> np.uint8(3))] |= np.uint8(1) << (offset & np.uint8(7))


@whole_pass
def multiply(address):
    """y (1, rows) = x (1, columns) W^T + bias. A task is a group of rows."""
    f = _frame(address)
    slot = take_task(address + 8)
    chunks = (f.columns + CHUNK - 1) // CHUNK
    kept = np.int64(integers_at(f.pointers + 4 * f.rows * chunks, 1)[0])
    packed, sums = f.packed + slot * f.packed_bytes, f.sums + slot * f.packed_bytes
    bias, totals = floats_at(f.bias, f.rows), floats_at(sums, f.task_rows * LANES)
    y, y_halves = floats_at(f.y, f.rows), halves_at(f.y, f.rows)
    pack_token(f.x, f.x_is_bf16, f.columns, packed)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        first, last = task * f.task_rows, min(f.rows, (task + 1) * f.task_rows)
        for chunk in range(chunks):
            bits, pointers = f.bits + BYTES * chunk * f.rows, f.pointers + 4 * chunk * f.rows
            bit_products(
                f.values_are_bf16, f.values, f.offsets, bits, pointers, kept, first, last, packed + chunk * CHUNK * 4,
                sums, np.int64(chunk == 0),
            )  # fmt: skip
        add_lanes(f, totals, bias, y, y_halves, first, last)


def prepared(x: Tensor, lists: Lists, bias: Tensor | None) -> Ready:
    """The call for x (1, columns), rows of y alike in dtype; bias fp32."""
    values, offsets, pointers, rows, columns = lists
    chunks, threads = chunks_of(columns), torch.get_num_threads()
    with torch.inference_mode(False):  # it outlives this call
        bits = torch.empty(chunks * rows * BYTES, dtype=torch.uint8)
    # a task for each thread at least; what a row's sum is made of does not depend on it
    task_rows = min(MOST_ROWS, -(-rows // (threads * LINE)) * LINE)
    sums = 4 * chunks * CHUNK  # behind x
    room = (threads, sums + 4 * task_rows * LANES)
    is_bf16 = x.dtype is torch.bfloat16
    record = {
        "tasks": chunks, "task_rows": task_rows, "rows": rows, "columns": columns, "packed_bytes": room[1],
        "x_is_bf16": is_bf16, "y_is_bf16": is_bf16, "values_are_bf16": values.dtype is torch.bfloat16,
        "values": values.data_ptr(), "offsets": offsets.data_ptr(), "bits": bits.data_ptr(),
        "pointers": pointers.data_ptr(), "bias": 0 if bias is None else bias.data_ptr(),
    }  # fmt: skip
    team.run(make_bits, _numbers(**record), chunks)
    return Ready(multiply, FRAME, record | {"tasks": -(-rows // task_rows)}, rows, room, sums, bits)
