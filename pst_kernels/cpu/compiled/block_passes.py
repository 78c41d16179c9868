"""The product of few tokens with a weight of which only blocks are stored (see ../kept_blocks.py).

A library's product of a few tokens with one block takes longer to call than to compute. Here a task is a row of blocks:
each block is read once, and what they add up to stays in a core's first cache.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from . import ready
from .jit import part, whole_pass
from .ready import Ready, Scratch
from .row_loops import RANKS, add_product, add_products, copy, narrow, widen
from .sparse_passes import widen_one
from .threads import pointer_to, take_task
from .views import floats_at, halves_at, longs_at, record_of

_NUMBERS = ("next", "slots", "tasks", "size", "tokens", "inputs", "outputs", "packed_bytes", "is_bf16")
_ADDRESSES = ("x", "y", "blocks", "rows", "columns", "bias", "packed", "sums")
FRAME = np.dtype([(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)])
_frame = record_of("record_of_block_passes", FRAME)


@part
def _square_at(address, size):
    return numba.carray(pointer_to(address), (size, size), np.float32)


@part
def _pack(f, packed, width):
    """x in fp32, (tokens, width), with zeros up to the end of the last block."""
    for token in range(f.tokens):
        line = floats_at(packed + token * width * 4, width)
        if f.is_bf16:
            widen(halves_at(f.x + token * f.inputs * 2, f.inputs), line[: f.inputs])
        else:
            copy(floats_at(f.x + token * f.inputs * 4, f.inputs), line[: f.inputs])
        for j in range(f.inputs, width):
            line[j] = np.float32(0)


@part
def _store(f, sums, token, first):
    """Sums of one token, from an output on, and the bias to y."""
    if f.bias:
        if f.is_bf16:
            halves = halves_at(f.bias + first * 2, sums.size)
            for j in range(sums.size):
                sums[j] += widen_one(halves[j])
        else:
            floats = floats_at(f.bias + first * 4, sums.size)
            for j in range(sums.size):
                sums[j] += floats[j]
    at = token * f.outputs + first
    if f.is_bf16:
        narrow(sums, halves_at(f.y + at * 2, sums.size))
    else:
        copy(sums, floats_at(f.y + at * 4, sums.size))


@whole_pass
def multiply(address):
    """y (tokens, outputs) = x (tokens, inputs) W^T + bias. A task is a row of blocks."""
    f = _frame(address)
    slot, size = take_task(address + 8), f.size
    area = size * size
    width = (f.inputs + size - 1) // size * size
    packed, sums = f.packed + slot * f.packed_bytes, f.sums + slot * f.packed_bytes
    widened = sums + f.tokens * size * 4
    rows = longs_at(f.rows, f.tasks + 1)
    _pack(f, packed, width)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        first, last = task * size, min(f.outputs, (task + 1) * size)
        totals = floats_at(sums, f.tokens * size)
        totals[:] = np.float32(0)
        begin, end = rows[task], rows[task + 1]
        columns = longs_at(f.columns, end)
        for entry in range(begin, end):
            if f.is_bf16:
                widen(halves_at(f.blocks + entry * area * 2, area), floats_at(widened, area))
                block = _square_at(widened, size)
            else:
                block = _square_at(f.blocks + entry * area * 4, size)
            here = packed + columns[entry] * size * 4
            for token in range(0, f.tokens - 1, 2):
                x, x2 = floats_at(here + token * width * 4, size), floats_at(here + (token + 1) * width * 4, size)
                y, y2 = totals[token * size : (token + 1) * size], totals[(token + 1) * size : (token + 2) * size]
                add_products(x, x2, block, y, y2)
            if f.tokens % 2:
                token = f.tokens - 1
                add_product(floats_at(here + token * width * 4, size), block, totals[token * size :])
        for token in range(f.tokens):
            _store(f, totals[token * size : token * size + last - first], token, first)


def takes(x: Tensor, blocks: Tensor, rows: Tensor, columns: Tensor) -> bool:
    """Whether `product` is for these, on a CPU."""
    return (
        0 < x.shape[0] <= ready.MOST_TOKENS and x.dtype in (torch.float32, torch.bfloat16) and x.dtype is blocks.dtype
        and blocks.shape[1] % RANKS == 0 and x.is_contiguous() and blocks.is_contiguous() and rows.is_contiguous()
        and columns.is_contiguous()
    )  # fmt: skip


def product(
    x: Tensor, blocks: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, outputs: int, scratch: Scratch
) -> Tensor:
    """y (tokens, outputs) = x (tokens, inputs) W^T + bias; the bias is of x's dtype."""
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((x.shape[0], outputs))
    if (found := ready.find(x, blocks, columns, rows, bias)) is not None:
        return found(x, out, scratch)
    (tokens, inputs), size, tasks = x.shape, blocks.shape[1], len(rows) - 1
    sums = 4 * tokens * -(-inputs // size) * size  # behind x
    is_bf16 = x.dtype is torch.bfloat16
    room = (torch.get_num_threads(), sums + 4 * (tokens * size + is_bf16 * size * size))
    record = {
        "tasks": tasks, "size": size, "tokens": tokens, "inputs": inputs, "outputs": outputs, "packed_bytes": room[1],
        "is_bf16": is_bf16, "blocks": blocks.data_ptr(), "rows": rows.data_ptr(), "columns": columns.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
    }  # fmt: skip
    call = Ready(multiply, FRAME, record, outputs, room, sums, None)
    return ready.keep(call, x, blocks, columns, rows, bias)(x, out, scratch)
