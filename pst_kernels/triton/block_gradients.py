"""dU and dV for a mask of blocks, from the kept blocks of G = gy^T x, made in the accumulator; no others are made.

    Q = G * M * (1 + |W'|), or G * M            dU = beta Q V^T         dV = beta U^T Q

A program makes the blocks of a part of one strip (see block_lists.py: several thin blocks, or a part of a thick one)
over one of `split_k` parts of the tokens, and stores its partial sums in a place of its own; programs past the end of
their strip end at once. A second kernel adds those that exist, along the same lists, in a fixed order: no atomics, the
same bits every time.

The sums of a row of G lie part by part of its strip, those of a column under its row of blocks. The places for all
blocks are allocated, 4 r (1 / size + 1 / tile columns) bytes a weight for r ranks, and those of kept blocks used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import MaskedWeight, Needs
from .block_lists import KeptBlocks, grid_of, strip
from .block_matmul import block_input_gradient
from .gradient_products import product, product_over_tokens, splitting
from .gradients import linear_backward
from .kept_lists import lists_of
from .matmul import Split, one_stride
from .ptx import split
from .score import checked_operands
from .tiles import choice, targets
from .tiles.targets import cdiv

RANKS = tl.constexpr(16)  # reduced at a time, as tensor cores take them


@triton.jit
def load_factors(
    p_u, p_v, first, r, i, m_rows, m, columns, beta, RANK: tl.constexpr
):  # fmt: skip
    """RANKS columns of beta U (rows, RANKS) and rows of V (RANKS, columns) from rank `first` on, fp32, 0 outside."""
    k = first + tl.arange(0, RANKS)
    b_u = tl.load(p_u + (r[:, None] * RANK + k[None, :]), mask=m_rows[:, None] & (k < RANK)[None, :], other=0.0)
    o_v = k[:, None].to(tl.int64) * columns + i[None, :]
    b_v = tl.load(p_v + o_v, mask=(k < RANK)[:, None] & m[None, :], other=0.0)
    return b_u.to(tl.float32) * beta, b_v.to(tl.float32)


@triton.jit
def store_row_sums(
    p_row_sums, b_high, b_low, b_v, rank, r, m_rows, FAST: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """Q V^T of RANKS ranks."""
    k = rank + tl.arange(0, RANKS)
    b_du = product(b_high, b_low, tl.trans(b_v), tl.zeros((r.shape[0], RANKS), tl.float32), FAST, SPLIT)
    tl.store(p_row_sums + (r[:, None] * RANK + k[None, :]), b_du, mask=m_rows[:, None] & (k < RANK)[None, :])


@triton.jit
def store_column_sums(
    p_column_sums, b_high, b_low, b_u, rank, i, m, columns, FAST: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """(beta U)^T Q of RANKS ranks."""
    k = rank + tl.arange(0, RANKS)
    b_zero = tl.zeros((i.shape[0], RANKS), tl.float32)
    b_dv = product(tl.trans(b_high), tl.trans(b_low), b_u, b_zero, FAST, SPLIT)
    o_column = k[None, :].to(tl.int64) * columns + i[:, None]
    tl.store(p_column_sums + o_column, b_dv, mask=m[:, None] & (k < RANK)[None, :])


@triton.jit(do_not_specialize=["tokens", "tokens_per_split", "capacity"])
def block_gradients_kernel(
    p_gy, p_x, p_weight, p_u, p_v, p_row_sums, p_column_sums, p_indices, p_counts, p_order,
    tokens, tokens_per_split, rows, columns, stride, capacity, beta,
    RANK: tl.constexpr, WEIGHT_ALONG_ROWS: tl.constexpr, THROUGH: tl.constexpr,
    FAST: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """The sums of a part of a strip; the grid is (parts of the longest strip, rows of blocks, split_k).

    row_sums is fp32 (split_k, parts, rows, RANK): Q V^T; column_sums (split_k, rows of blocks, RANK, columns):
    (beta U)^T Q.
    """
    i_list = tl.load(p_order + tl.program_id(1))
    count = tl.load(p_counts + i_list)
    first = tl.program_id(0) * BLOCK_COLUMNS
    if first < count * BLOCK_ROWS:
        i, m = strip(p_indices + i_list * capacity, first, count, BLOCK_ROWS, BLOCK_COLUMNS)
        i_rows = i_list * BLOCK_ROWS
        r = tl.arange(0, BLOCK_ROWS)
        m_rows = i_rows + r < rows
        r_in = r
        # Nothing is masked until Q is: rows and columns past the end of W are copies of its last ones.
        if not EVEN:
            m = m & (i < columns)
            i = tl.minimum(i, columns - 1)
            r_in = tl.minimum(r, (rows - 1 - i_rows).to(tl.int32))
        b_q = product_over_tokens(
            p_gy + i_rows,
            p_x,
            tokens,
            tokens_per_split,
            rows,
            columns,
            r_in,
            i,
            UPCAST,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_DEPTH,
        )
        p_u += i_rows * RANK
        if THROUGH:
            if WEIGHT_ALONG_ROWS:
                o_weight = i_rows + r_in[:, None] + i[None, :].to(tl.int64) * stride
            else:
                o_weight = i_rows * stride + (r_in[:, None] * stride + i[None, :])
            b_updated = tl.load(p_weight + o_weight).to(tl.float32)
            for rank in tl.range(0, RANK, RANKS, num_stages=1):
                b_u, b_v = load_factors(p_u, p_v, rank, r, i, m_rows, m, columns, beta, RANK)
                b_u_high, b_u_low = split(b_u, FAST, SPLIT)
                b_updated = product(b_u_high, b_u_low, b_v, b_updated, FAST, SPLIT)
            b_q += b_q * tl.abs(b_updated)
        b_q = tl.where(m_rows[:, None] & m[None, :], b_q, 0.0)
        z = tl.program_id(2).to(tl.int64)
        p_row_sums += ((z * tl.num_programs(0) + tl.program_id(0)) * rows + i_rows) * RANK
        p_column_sums += (z * tl.num_programs(1) + i_list) * RANK * columns
        b_high, b_low = split(b_q, FAST, SPLIT)
        # In one loop, what Triton 3.6 and its assembler make for sm_90 gave a wrong dV on an H100 from 17 ranks on,
        # though its PTX is right by the emulator. Why is not known.
        if FAST and RANK > RANKS:
            for rank in tl.range(0, RANK, RANKS, num_stages=1):
                _, b_v = load_factors(p_u, p_v, rank, r, i, m_rows, m, columns, beta, RANK)
                store_row_sums(p_row_sums, b_high, b_low, b_v, rank, r, m_rows, FAST, SPLIT, RANK)
            for rank in tl.range(0, RANK, RANKS, num_stages=1):
                b_u, _ = load_factors(p_u, p_v, rank, r, i, m_rows, m, columns, beta, RANK)
                store_column_sums(p_column_sums, b_high, b_low, b_u, rank, i, m, columns, FAST, SPLIT, RANK)
        else:
            for rank in tl.range(0, RANK, RANKS, num_stages=1):
                b_u, b_v = load_factors(p_u, p_v, rank, r, i, m_rows, m, columns, beta, RANK)
                store_row_sums(p_row_sums, b_high, b_low, b_v, rank, r, m_rows, FAST, SPLIT, RANK)
                store_column_sums(p_column_sums, b_high, b_low, b_u, rank, i, m, columns, FAST, SPLIT, RANK)


@triton.jit(do_not_specialize=["split_k", "parts", "part", "rows", "columns", "down", "size", "rank"])
def add_block_partials_kernel(
    p_row_sums, p_column_sums, p_du, p_dv, p_row_counts, p_column_indices, p_column_counts,
    split_k, parts, part, rows, columns, down, size, rank, beta, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of dU in one row of blocks, or of dV in one column of blocks: adds the partial sums that exist, one
    after another. There are `down` rows of blocks; `part` is what a program of the gradients took of a strip.
    """
    i_list = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = e < size * rank
    b_sum = tl.zeros((BLOCK,), tl.float32)
    if i_list < down:
        i_row = i_list * size
        m = exists & (i_row + e // rank < rows)
        used = tl.cdiv(tl.load(p_row_counts + i_list) * size, part)
        for z in range(split_k):
            p_partial = p_row_sums + (tl.full([], z, tl.int64) * parts * rows + i_row) * rank
            for _ in range(used):
                b_sum += tl.load(p_partial + e, mask=m, other=0.0)
                p_partial += tl.full([], rank, tl.int64) * rows
        tl.store(p_du + i_row * rank + e, b_sum * beta, mask=m)
    else:
        i_list -= down
        i_column = i_list * size + e % size
        m = exists & (i_column < columns)
        o = (e // size).to(tl.int64) * columns + i_column
        count = tl.load(p_column_counts + i_list)
        p_column_indices += i_list * down
        for z in range(split_k):
            for n in range(count):
                row = tl.load(p_column_indices + n) + tl.full([], z, tl.int64) * down
                b_sum += tl.load(p_column_sums + row * rank * columns + o, mask=m, other=0.0)
        tl.store(p_dv + o, b_sum, mask=m)  # U came with its beta


def block_factor_gradients(
    gy: Tensor, x: Tensor, operands: MaskedWeight, size: int, through_magnitude: bool, kept: KeptBlocks
) -> tuple[Tensor, Tensor]:
    """dU and dV in fp32; operands as of `checked_operands`."""
    weight, (U, V, *_), _, (beta, _, _) = operands
    (rows, columns), rank, tokens = weight.shape, V.shape[0], x.shape[0]
    if not tokens or not weight.numel():
        return torch.zeros_like(U, dtype=torch.float32), torch.zeros_like(V, dtype=torch.float32)
    dU, dV = (torch.empty(factor.shape, dtype=torch.float32, device=x.device) for factor in (U, V))
    weight, stride, along_columns = one_stride(weight)
    platform = targets.platform(x.device)
    ragged = rows % size != 0 or columns % size != 0
    tile = choice.block_gradients(platform.architecture, x.dtype, size, rank, ragged)
    down, across = grid_of(weight.shape, size)
    parts = cdiv(across * size, tile.columns)
    # How many blocks are kept is not known here; a tenth is assumed, of the sparsity of 0.9 that blocks are for.
    kept_tiles = max(1, down * parts // 10)
    tokens_per_split = choice.tokens_per_split(platform.architecture, kept_tiles, tokens, tile.depth)
    split_k = cdiv(tokens, tokens_per_split)
    row_sums = torch.empty((split_k, parts, rows, rank), dtype=torch.float32, device=x.device)
    column_sums = torch.empty((split_k, down, rank, columns), dtype=torch.float32, device=x.device)
    block_gradients_kernel[parts, down, split_k](
        gy, x, weight, U, V, row_sums, column_sums, *kept.rows,
        tokens, tokens_per_split, rows, columns, stride, across, beta,
        RANK=rank, WEIGHT_ALONG_ROWS=not along_columns, THROUGH=through_magnitude,
        **splitting(x.dtype, platform), UPCAST=platform.interpreted, EVEN=not ragged,
        BLOCK_ROWS=size, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, **platform.all_registers,
    )  # fmt: skip
    block = 256
    add_block_partials_kernel[down + across, cdiv(size * rank, block)](
        row_sums, column_sums, dU, dV, kept.rows.counts, kept.columns.indices, kept.columns.counts,
        split_k, parts, tile.columns, rows, columns, down, size, rank, beta, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return dU, dV


def kept_block_gradients(
    gy: Tensor, x: Tensor, operands: MaskedWeight, size: int, through_magnitude: bool, needs: Needs,
    split: Split | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dU and dV from kept blocks of G. `split` is that of the forward, if it made one."""
    operands = checked_operands(operands)
    kept = lists_of(operands.mask, operands.weight.shape, size)
    dx = block_input_gradient(gy, operands, kept.columns, size, split) if needs.input else gy.new_empty(0)
    if not needs.factors:
        return dx, gy.new_empty(0, dtype=torch.float32), gy.new_empty(0, dtype=torch.float32)
    return dx, *block_factor_gradients(gy, x, operands, size, through_magnitude, kept)


def block_backward(
    gy: Tensor, x: Tensor, operands: MaskedWeight, size: int, learn_scores: bool, through_magnitude: bool,
    needs: Needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dx, dU and dV from kept blocks of G; the scores' gradients from all of G, or zeros."""
    found = kept_block_gradients(gy, x, operands, size, through_magnitude, needs)
    of_scores = operands.factors[2:]
    if not needs.factors:
        return *found, *(gy.new_empty(0, dtype=torch.float32) for _ in of_scores)
    if learn_scores:
        return *found, *linear_backward(gy, x, operands, through_magnitude, Needs(False, True))[3:]
    return *found, *(torch.zeros_like(factor, dtype=torch.float32) for factor in of_scores)
