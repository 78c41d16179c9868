"""The gradient kernel where U and A, V and B are not held side by side: for more than 16 ranks of both kinds together,
and on AMD GPUs for all. It reduces 16 ranks at a time, and loads each factor strip where it is needed.

It does the work of `gradients.factor_gradients_kernel` on one tile of G, U and V apart from A and B: D is reduced with
A and B, then Q with U and V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gradient_products import gate, product, product_tile
from .ptx import split


@triton.jit
def reduce_ranks(
    first, b_high, b_low, p_left, p_right, p_column_sums, scale, m_rows, m_columns, columns,
    RANK: tl.constexpr, ONES: tl.constexpr, FAST: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For WIDTH ranks of a tile b: return b right^T and store (scale left)^T b. With ONES also its sums over columns
    and over rows: left and right get a column of ones each.

    The large factor is the left one in both products: wgmma takes no fewer than 64 rows, and mma.sync would hold all of
    a (WIDTH, ROWS) left operand in every warp's registers. Offsets within a tile fit 32 bits, those of all ranks too.
    """
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    k = first + tl.arange(0, WIDTH)
    m_right = (k < RANK)[:, None] & m_columns[None, :]
    b_right = tl.load(p_right + (k[:, None] * columns + c[None, :]), mask=m_right, other=0.0).to(tl.float32)
    if ONES:
        b_right = tl.where((k == RANK)[:, None], 1.0, b_right)
    b_row_sum = product(b_high, b_low, tl.trans(b_right), tl.zeros((ROWS, WIDTH), tl.float32), FAST, SPLIT)
    m_left = m_rows[:, None] & (k < RANK)[None, :]
    b_left = tl.load(p_left + (r[:, None] * RANK + k[None, :]), mask=m_left, other=0.0).to(tl.float32) * scale
    if ONES:
        b_left = tl.where((k == RANK)[None, :], 1.0, b_left)
    b_zero = tl.zeros((COLUMNS, WIDTH), tl.float32)
    b_sum = product(tl.trans(b_high), tl.trans(b_low), b_left, b_zero, FAST, SPLIT)
    m_stored = (k < (RANK + 1 if ONES else RANK))[None, :] & m_columns[:, None]
    tl.store(p_column_sums + (k[None, :] * columns + c[:, None]), b_sum, mask=m_stored)
    return b_row_sum


@triton.jit
def reduce_tile(
    b_high, b_low, p_left, p_right, p_row_sums, p_column_sums, scale, m_rows, m_columns, columns,
    RANK: tl.constexpr, ONES: tl.constexpr, RANKS: tl.constexpr, FAST: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`reduce_ranks` for more ranks than WIDTH, and its row sums stored."""
    r = tl.arange(0, ROWS)
    stored: tl.constexpr = RANK + 1 if ONES else RANK
    for first in tl.range(0, stored, WIDTH, num_stages=1):
        b_row_sum = reduce_ranks(
            first, b_high, b_low, p_left, p_right, p_column_sums, scale, m_rows, m_columns, columns,
            RANK, ONES, FAST, SPLIT, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        k = first + tl.arange(0, WIDTH)
        tl.store(
            p_row_sums + (r[:, None] * RANKS + k[None, :]), b_row_sum, mask=m_rows[:, None] & (k < stored)[None, :]
        )


@triton.jit(do_not_specialize=["tokens", "tokens_per_split"])
def many_ranks_kernel(
    p_gy, p_x, p_g, p_weight, p_u, p_v, p_a, p_b, p_mask, p_row_sums, p_column_sums,
    tokens, tokens_per_split, rows, columns, stride, words, beta,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, WEIGHT_ALONG_ROWS: tl.constexpr, THROUGH: tl.constexpr,
    G_STORED: tl.constexpr, FAST: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    SCORES: tl.constexpr,
):  # fmt: skip
    """The partial sums of one tile; the grid is (column tiles, row tiles, split_k).

    row_sums is fp32 (split_k * column tiles, rows, RANKS): Q V^T, D B^T and D.sum(1); column_sums (split_k * row tiles,
    RANKS, columns): (beta U)^T Q, A^T D and D.sum(0). G_STORED: G is read from p_g, and p_gy and p_x are not.

    Without SCORES nothing is made of D, RANKS is RANK_W, and where the gate needs no W' none is read.
    """
    RANKS: tl.constexpr = RANK_W + RANK_S + 1 if SCORES else RANK_W
    i_columns = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    i_rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    b_g = product_tile(
        p_gy, p_x, p_g, tokens, tokens_per_split, rows, columns, i_rows, i_columns, G_STORED, UPCAST, EVEN,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
    )  # fmt: skip
    r = tl.arange(0, BLOCK_ROWS)
    m_rows = i_rows + r < rows
    r_in = r
    if not EVEN:
        r_in = tl.minimum(r, (rows - 1 - i_rows).to(tl.int32))
    z = tl.program_id(2).to(tl.int64)
    p_row_sums += ((z * tl.num_programs(0) + tl.program_id(0)) * rows + i_rows) * RANKS
    p_column_sums += (z * tl.num_programs(1) + tl.program_id(1)) * RANKS * columns + i_columns
    p_mask += i_rows * words
    p_u += i_rows * RANK_W
    p_a += i_rows * RANK_S

    c = tl.arange(0, BLOCK_COLUMNS)
    w = tl.arange(0, BLOCK_COLUMNS // 32)
    m_columns = i_columns + c < columns
    c_in, w_in = c, w
    if not EVEN:
        c_in = tl.minimum(c, (columns - 1 - i_columns).to(tl.int32))
        w_in = tl.minimum(w, (words - 1 - i_columns // 32).to(tl.int32))
    MANY: tl.constexpr = RANK_W > WIDTH or (SCORES and RANK_S >= WIDTH)
    b_updated = b_g
    if SCORES or THROUGH:
        if WEIGHT_ALONG_ROWS:
            p_weight += i_rows + i_columns * stride
            b_weight = tl.load(p_weight + (r_in[:, None] + c_in[None, :] * stride)).to(tl.float32)
        else:
            p_weight += i_rows * stride + i_columns
            b_weight = tl.load(p_weight + (r_in[:, None] * stride + c_in[None, :])).to(tl.float32)
        b_updated = b_weight
        for first in tl.range(0, RANK_W, WIDTH, num_stages=1):
            k = first + tl.arange(0, WIDTH)
            m_v = (k < RANK_W)[:, None] & m_columns[None, :]
            b_v = tl.load(p_v + i_columns + (k[:, None] * columns + c[None, :]), mask=m_v, other=0.0).to(tl.float32)
            m_u = m_rows[:, None] & (k < RANK_W)[None, :]
            b_u = tl.load(p_u + (r[:, None] * RANK_W + k[None, :]), mask=m_u, other=0.0).to(tl.float32) * beta
            b_u_high, b_u_low = split(b_u, FAST, SPLIT)
            b_updated = product(b_u_high, b_u_low, b_v, b_updated, FAST, SPLIT)

    b_da = tl.zeros((BLOCK_ROWS, WIDTH), tl.float32)
    if SCORES:  # noqa: SIM102 (of constants)
        if rows > 0:  # always true: a branch keeps the compiler from holding D's and Q's operands at once
            b_high, b_low = split(b_g * b_updated, FAST, SPLIT)
            p_sums = p_column_sums + tl.full([], RANK_W, tl.int64) * columns
            if MANY:
                reduce_tile(
                    b_high, b_low, p_a, p_b + i_columns, p_row_sums + RANK_W, p_sums, 1.0, m_rows, m_columns, columns,
                    RANK_S, True, RANKS, FAST, SPLIT, BLOCK_ROWS, BLOCK_COLUMNS, WIDTH,
                )  # fmt: skip
            else:
                b_da = reduce_ranks(
                    0, b_high, b_low, p_a, p_b + i_columns, p_sums, 1.0, m_rows, m_columns, columns,
                    RANK_S, True, FAST, SPLIT, BLOCK_ROWS, BLOCK_COLUMNS, WIDTH,
                )  # fmt: skip
    b_words = tl.load(p_mask + i_columns // 32 + (r_in[:, None] * words + w_in[None, :]))
    b_gate = gate(b_updated, b_words, THROUGH, BLOCK_ROWS, BLOCK_COLUMNS)
    b_high, b_low = split(b_g * b_gate, FAST, SPLIT)
    if MANY:
        reduce_tile(
            b_high, b_low, p_u, p_v + i_columns, p_row_sums, p_column_sums, beta, m_rows, m_columns, columns,
            RANK_W, False, RANKS, FAST, SPLIT, BLOCK_ROWS, BLOCK_COLUMNS, WIDTH,
        )  # fmt: skip
    else:
        b_du = reduce_ranks(
            0, b_high, b_low, p_u, p_v + i_columns, p_column_sums, beta, m_rows, m_columns, columns,
            RANK_W, False, FAST, SPLIT, BLOCK_ROWS, BLOCK_COLUMNS, WIDTH,
        )  # fmt: skip
        i = tl.arange(0, WIDTH)
        o_rows = r[:, None] * RANKS + i[None, :]
        tl.store(p_row_sums + o_rows, b_du, mask=m_rows[:, None] & (i < RANK_W)[None, :])
        if SCORES:
            tl.store(p_row_sums + RANK_W + o_rows, b_da, mask=m_rows[:, None] & (i <= RANK_S)[None, :])
