"""W' = W + beta U V of kept blocks alone, in one pass: a call of the library for each row of blocks takes longer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import row_loops, threads
from .arguments import padded
from .jit import row, whole_pass
from .threads import take_task
from .views import floats_at, halves_at, longs_at, numbers_of, record_of

_NUMBERS = ("next", "tasks", "size", "rows", "columns", "rank", "gathered", "weight_is_bf16")
_ADDRESSES = ("weight", "U", "V", "starts", "index", "out")
FRAME = np.dtype([(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)])
_frame, _numbers = record_of("record_of_block_weights", FRAME), numbers_of(FRAME)


@row
def _take(source, index, out):
    for j in range(out.size):
        out[j] = source[index[j]]


@row
def _take_widened(source, index, out):
    bits = out.view(np.uint32)
    for j in range(out.size):
        bits[j] = np.uint32(source[index[j]]) << np.uint32(16)


@whole_pass
def make(address):
    """A task is a row of blocks: W' of its gathered columns, row by row, behind that of the earlier ones."""
    f = _frame(address)
    starts, index = longs_at(f.starts, f.tasks + 1), longs_at(f.index, f.gathered)
    U, V = floats_at(f.U, f.rows * f.rank), floats_at(f.V, f.rank * f.gathered)
    spare = np.empty(0, np.float32)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        start, width = starts[task], starts[task + 1] - starts[task]
        if spare.size < (f.rank + 1) * width:
            spare = np.empty((f.rank + 1) * width, np.float32)
        right = spare[: f.rank * width].reshape((f.rank, width))
        for k in range(f.rank):
            row_loops.copy(V[k * f.gathered + start : k * f.gathered + start + width], right[k])
        columns = index[start : start + width]
        first, last = task * f.size, min(f.rows, (task + 1) * f.size)
        for pair in range(first, last, 2):
            out = floats_at(f.out + 4 * (f.size * start + (pair - first) * width), 2 * width)
            lines = out[:width], (out[width:] if pair + 1 < last else spare[f.rank * width : (f.rank + 1) * width])
            other = min(pair + 1, last - 1)
            for i, line in ((pair, lines[0]), (other, lines[1])):
                if f.weight_is_bf16:
                    _take_widened(halves_at(f.weight + 2 * i * f.columns, f.columns), columns, line)
                else:
                    _take(floats_at(f.weight + 4 * i * f.columns, f.columns), columns, line)
            u, u2 = U[pair * f.rank : (pair + 1) * f.rank], U[other * f.rank : (other + 1) * f.rank]
            row_loops.add_products(u, u2, right, lines[0], lines[1])


def updated_blocks(
    weight: Tensor, U: Tensor, V: Tensor, beta: float, starts: Tensor, index: Tensor, out: Tensor
) -> None:
    """`out`, flat fp32, gets W' of rows of blocks of size `len(out) / len(index)`.

    V (r, gathered) are gathered columns; row of blocks i has the gathered columns starts[i] to starts[i + 1], and
    `index` says which of W's each one is, int64 both. The weight is contiguous, fp32 or bf16, the factors fp32.
    """
    U, V = padded(U, 1, beta), padded(V, 0)
    tasks = len(starts) - 1
    record = {
        "tasks": tasks, "size": len(out) // max(1, len(index)), "rows": len(weight), "columns": weight.shape[1],
        "rank": len(V), "gathered": len(index), "weight_is_bf16": weight.dtype is torch.bfloat16,
        "weight": weight.data_ptr(), "U": U.data_ptr(), "V": V.data_ptr(), "starts": starts.data_ptr(),
        "index": index.data_ptr(), "out": out.data_ptr(),
    }  # fmt: skip
    threads.run(make, _numbers(**record), tasks)
