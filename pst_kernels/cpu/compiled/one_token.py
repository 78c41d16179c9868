"""The product of one token with lists of kept weights: what decoding at batch 1 is made of.

It is bound by memory, so it reads one bit a weight in the place of a byte a kept one (see expansion.py), and a layer's
call is kept ready: filling in a record anew each time takes as long as the product of a small layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from pst_kernels.masks.chunks import CHUNK, chunks_of

from . import threads as team
from .expansion import BYTES, bit_products
from .jit import whole_pass
from .sparse_passes import _floats, _halves, _integers, _narrow, pack_token
from .threads import pointer_to, take_task
from .vectors import LANES

MOST_ROWS = 1024  # of a task: their sums, lane by lane, stay in a core's second cache
LINE = 16  # floats of y that two threads must not write at once
_NUMBERS = (
    "next", "slots", "x", "y", "tasks", "task_rows", "rows", "columns", "packed_bytes", "x_is_bf16", "y_is_bf16",
    "values_are_bf16",
)  # fmt: skip
_ADDRESSES = ("values", "offsets", "bits", "pointers", "bias", "packed", "sums")
NAME = "_pst_one_token"  # of the attribute of the offsets that holds what is ready
Key = tuple[object, ...]
Lists = tuple[Tensor, Tensor, Tensor, int, int]  # the fields of SparseRows
Scratch = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]
FRAME = np.dtype([(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)])


@whole_pass
def make_bits(address):
    """One bit a weight, (chunks, rows, 16 bytes), of offsets and pointers. A task is a chunk."""
    f = numba.carray(pointer_to(address), (1,), FRAME)[0]
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        pointers = _integers(f.pointers + 4 * task * f.rows, f.rows + 1)
        bits = numba.carray(pointer_to(f.bits + BYTES * task * f.rows), (BYTES * f.rows,), np.uint8)
        offsets = numba.carray(pointer_to(f.offsets), (np.int64(pointers[f.rows]),), np.uint8)
        bits[:] = np.uint8(0)
        for i in range(f.rows):
            for entry in range(pointers[i], pointers[i + 1]):
                offset = offsets[entry]
                bits[i * BYTES + (offset >> np.uint8(3))] |= np.uint8(1) << (offset & np.uint8(7))


@whole_pass
def multiply(address):
    """y (1, rows) = x (1, columns) W^T + bias. A task is a group of rows."""
    f = numba.carray(pointer_to(address), (1,), FRAME)[0]
    slot = take_task(address + 8)
    chunks = (f.columns + CHUNK - 1) // CHUNK
    kept = np.int64(_integers(f.pointers + 4 * f.rows * chunks, 1)[0])
    packed, sums = f.packed + slot * f.packed_bytes, f.sums + slot * f.packed_bytes
    bias, totals = _floats(f.bias, f.rows), _floats(sums, f.task_rows * LANES)
    y, y_halves = _floats(f.y, f.rows), _halves(f.y, f.rows)
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
        # as in `multiply_one`: a function for both took 7 % of a product of 3072 x 768
        for i in range(first, last):
            total = np.float32(0)
            for lane in range(LANES):
                total += totals[(i - first) * LANES + lane]
            if f.bias:
                total += bias[i]
            if f.y_is_bf16:
                y_halves[i] = _narrow(total)
            else:
                y[i] = total


class Ready:
    """A layer's call, kept with its offsets, which say where its weights lie."""

    def __init__(self, key: Key, x: Tensor, lists: Lists, bias: Tensor | None):
        values, offsets, pointers, rows, columns = lists
        chunks, threads = chunks_of(columns), torch.get_num_threads()
        self.key, self.dtype, self.rows = key, x.dtype, rows
        with torch.inference_mode(False):  # it outlives this call
            self.bits = torch.empty(chunks * rows * BYTES, dtype=torch.uint8)
        # a task for each thread at least; what a row's sum is made of does not depend on it
        task_rows = min(MOST_ROWS, -(-rows // (threads * LINE)) * LINE)
        self.tasks = -(-rows // task_rows)
        self.sums = 4 * chunks * CHUNK  # where they begin, behind x
        self.room = (threads, self.sums + 4 * task_rows * LANES)
        is_bf16 = x.dtype is torch.bfloat16
        record = {
            "tasks": chunks, "task_rows": task_rows, "rows": rows, "columns": columns, "packed_bytes": self.room[1],
            "x_is_bf16": is_bf16, "y_is_bf16": is_bf16, "values_are_bf16": values.dtype is torch.bfloat16,
            "values": values.data_ptr(), "offsets": offsets.data_ptr(), "bits": self.bits.data_ptr(),
            "pointers": pointers.data_ptr(), "bias": 0 if bias is None else bias.data_ptr(),
        }  # fmt: skip
        self.record = _Record(*(record.get(name, 0) for name in FRAME.names or ()))
        team.run_at(make_bits, ctypes.addressof(self.record), chunks)
        self.record[_NEXT], self.record[_TASKS] = 0, self.tasks

    def __call__(self, x: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
        room = scratch("one token", self.room, torch.uint8, _CPU).data_ptr()
        record = _Record.from_buffer_copy(self.record)  # of this call: another thread may be at the same layer
        record[_X], record[_Y], record[_PACKED], record[_SUMS] = x.data_ptr(), out.data_ptr(), room, room + self.sums
        team.run_at(multiply, ctypes.addressof(record), self.tasks)
        return out

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the offsets, and what is pickled with them, has nothing ready: this holds addresses."""
        return type(None), ()


_NEXT, _TASKS, _X, _Y, _PACKED, _SUMS = (
    list(FRAME.names or ()).index(name) for name in ("next", "tasks", "x", "y", "packed", "sums")
)
_Record = ctypes.c_int64 * len(FRAME.names or ())
_CPU = torch.device("cpu")


def _key(values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None) -> Key:
    """Changes with where the tensors lie, and when lists are loaded anew into the same memory."""
    return (
        values.data_ptr(), values.dtype, pointers.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if offsets.is_inference() else offsets._version, torch.get_num_threads(),
    )  # fmt: skip


def ready(x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None) -> Ready | None:
    """The call that an earlier one made, where it fits these operands."""
    call = getattr(offsets, NAME, None)
    if call is None or call.dtype is not x.dtype or x.stride(1) != 1 or not x.is_cpu:
        return None
    if bias is not None and (bias.dtype is not torch.float32 or not bias.is_contiguous()):
        return None
    return call if call.key == _key(values, offsets, pointers, bias) else None


def run(x: Tensor, lists: Lists, bias: Tensor | None, out: Tensor, scratch: Scratch) -> Tensor:
    """out (1, rows) = x (1, columns) W^T + bias; both of one dtype, with rows of stride 1; bias fp32."""
    call = ready(x, *lists[:3], bias)
    if call is None:
        call = Ready(_key(*lists[:3], bias), x, lists, bias)
        setattr(lists[1], NAME, call)
    return call(x, out, scratch)
