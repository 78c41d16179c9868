"""y = x W^T for very few tokens, a kept weight at a time, with a weight that is stored as lists.

A dense tile costs the instructions of all its weights (sparse_matmul.py), whatever is zero. Where few are kept and few
tokens share them, those take longer than the bytes. Here a lane takes a kept weight: its value, its column, and x there
for every token, so that a zero costs nothing. It reads a byte for the place of a kept weight, not a bit for every one.

Sums are made lane by lane, and added in an order that depends on the sizes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks.chunks import CHUNK, chunks_of
from .sums import add_sums, rooms
from .tiles import choice, tables
from .tiles.targets import Platform, cdiv


@triton.jit
def with_products(
    b_sums, pb_x, pb_values, pb_offsets, left, most,
    TOKENS: tl.constexpr, LANES: tl.constexpr, TURNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """b_sums, and the products of runs of kept weights, of which each lane has `left` before it.

    Where not MASKED, a lane past the end of its run loads what comes next and leaves it out: a load without a predicate
    saves the instruction that clears its result.
    """
    t = tl.arange(0, TOKENS)
    for _ in range(0, most, LANES * TURNS):
        for turn in tl.static_range(TURNS):
            kept = left > turn * LANES
            if MASKED:
                b_columns = tl.load(pb_offsets + turn * LANES, mask=kept, other=0).to(tl.int32)
                b_values = tl.load(pb_values + turn * LANES, mask=kept, other=0.0).to(tl.float32)
            else:
                b_columns = tl.load(pb_offsets + turn * LANES).to(tl.int32)
                b_values = tl.load(pb_values + turn * LANES).to(tl.float32)
            if TOKENS == 1:
                b_x = tl.load(pb_x[:, None] + b_columns).to(tl.float32)
                b_sums = tl.where(kept, b_sums + b_values * b_x, b_sums)
            else:
                o_x = b_columns[:, :, None] * TOKENS + t[None, None, :]
                b_x = tl.load(pb_x[:, None, None] + o_x).to(tl.float32)
                b_sums = tl.where(kept[:, :, None], b_sums + b_values[:, :, None] * b_x, b_sums)
        pb_values += LANES * TURNS
        pb_offsets += LANES * TURNS
        left -= LANES * TURNS
    return b_sums


@triton.jit(do_not_specialize=["tokens", "rows", "chunks", "steps", "has_bias"])
def listed_matmul_kernel(
    p_x, p_values, p_offsets, p_pointers, p_bias, p_y, tokens, rows, chunks, steps, has_bias,
    TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, LANES: tl.constexpr,
    TURNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """y[t, row] = bias[row] + sum over kept columns of W[row, column] x[t, column].

    A run is a row of a chunk. A program takes BLOCK_ROWS rows, and `steps` times the runs of BLOCK_CHUNKS chunks at
    once; its second number says which. Each run has LANES lanes, which take its kept weights in turns, as many as the
    fullest run needs. x is (columns, TOKENS), of which `tokens` are real; y (splits, tokens, rows) is contiguous.
    """
    i_split = tl.program_id(1)
    i = tl.arange(0, BLOCK_CHUNKS * BLOCK_ROWS)
    i_rows = tl.program_id(0) * BLOCK_ROWS
    row = i_rows + i % BLOCK_ROWS
    lane = tl.arange(0, LANES)
    t = tl.arange(0, TOKENS)
    all_kept = tl.load(p_pointers + chunks * rows)
    if TOKENS == 1:
        b_sums = tl.zeros((BLOCK_CHUNKS * BLOCK_ROWS, LANES), tl.float32)
    else:
        b_sums = tl.zeros((BLOCK_CHUNKS * BLOCK_ROWS, LANES, TOKENS), tl.float32)
    for step in range(i_split * steps, min((i_split + 1) * steps, tl.cdiv(chunks, BLOCK_CHUNKS))):
        chunk = step * BLOCK_CHUNKS + i // BLOCK_ROWS
        m = (row < rows) & (chunk < chunks)
        chunk = tl.where(m, chunk, 0)  # a run that does not exist is empty, and looks at x where x is
        first = tl.load(p_pointers + chunk * rows + row, mask=m, other=0)
        last = tl.load(p_pointers + chunk * rows + row + 1, mask=m, other=0)
        most, end = tl.max(last - first, 0), tl.max(last, 0)
        place = first[:, None] + lane[None, :]
        pb_x, pb_values, pb_offsets = p_x + chunk * (CHUNK * TOKENS), p_values + place, p_offsets + place
        left = last[:, None] - place
        if end + most + LANES * TURNS <= all_kept:  # no lane's last turn goes further
            b_sums = with_products(b_sums, pb_x, pb_values, pb_offsets, left, most, TOKENS, LANES, TURNS, False)
        else:
            b_sums = with_products(b_sums, pb_x, pb_values, pb_offsets, left, most, TOKENS, LANES, TURNS, True)

    b_y = tl.sum(tl.reshape(tl.sum(b_sums, 1), (BLOCK_CHUNKS, BLOCK_ROWS, TOKENS)), 0)
    r = i_rows + tl.arange(0, BLOCK_ROWS)
    m_rows = r < rows
    b_y += tl.load(p_bias + r, mask=m_rows & (has_bias != 0), other=0.0).to(tl.float32)[:, None]
    o_y = (i_split * tokens + t).to(tl.int64)[None, :] * rows + r[:, None]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_rows[:, None] & (t < tokens)[None, :])


def listed_matmul(
    x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None, rows: int, platform: Platform
) -> Tensor:
    """x (T, columns) times the transpose of W (rows, columns); T is from 1 to LISTED_TOKENS."""
    (tokens, columns), tile = x.shape, tables.LISTED_MATMUL
    width = triton.next_power_of_2(tokens)
    down, chunks = cdiv(rows, tile.rows), chunks_of(columns)
    steps = choice.steps_per_split(platform.architecture, down, columns, tile.chunks * CHUNK)
    splits = cdiv(cdiv(chunks, tile.chunks), steps)
    y, sums = rooms(x, rows, splits)
    if tokens > 1:  # the tokens of a column side by side
        x = torch.empty((columns, width), dtype=x.dtype, device=x.device)[:, :tokens].copy_(x.t())
    registers = platform.all_registers if tokens <= 2 else {}  # of more, what two blocks a multiprocessor can have
    added, has_bias = y if bias is None else bias, int(bias is not None)
    listed_matmul_kernel[down, splits](
        x, values, offsets, pointers, added, sums, tokens, rows, chunks, steps, has_bias if splits == 1 else 0,
        TOKENS=width, BLOCK_ROWS=tile.rows, BLOCK_CHUNKS=tile.chunks, LANES=tile.lanes, TURNS=tile.turns, CHUNK=CHUNK,
        num_warps=tile.warps, **registers,
    )  # fmt: skip
    return add_sums(sums, added, y, has_bias) if splits > 1 else y
