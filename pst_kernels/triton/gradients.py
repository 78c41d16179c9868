"""The six factor gradients from tiles of G = gy^T x, which stay in the accumulator: G never exists as a whole.

With D = G * W' and Q = G * (M + |W'|), or G * M, all six are low-rank reductions:

    dA = alpha1 D B^T   dB = alpha1 A^T D   dR = alpha2 D.sum(1)   dC = alpha2 D.sum(0)   dU = beta Q V^T   dV = beta
    U^T Q

A program makes one (out, in) tile of G over its share of the tokens, gates it, and stores its share of the sums in a
place of its own; a second kernel adds the shares in a fixed order. No atomics: the same bits every time. D and Q are
products in fp32, reduced by tensor cores as pairs of bf16 that hold 16 bits of each number (fp32 x: multiply-add in
fp32).

For very many tokens the library makes G in the shared scratch buffer, and the same kernel reads it instead.

Bytes a weight beyond x and gy, with tiles of R x C, 16-bit W, r ranks of each kind in fp32: 2 + 1/8 for W and mask,
8 r (1/R + 1/C) for the factors, 4 (2 r + 1) (1/R + 1/C) for the sums and as much to add them up, and the gradients
themselves. R = C = 128 and r = 8: 2.125 + 1 + 2 * 1.0625 = 5.25, and 0.2 for the gradients of a 512 x 1024 matrix. If
one program walked all its tiles, only the factors and gradients would be left, 2.51. But 512 x 1024 has 32 tiles for
the 132 multiprocessors of an H100: a walk over n of them takes n times as long, which with 1,024 tokens is 7 us a tile,
and the 2.9 bytes that are saved at most are 0.5 us of the device's bandwidth. With many more tiles than multiprocessors
a walk would cost nothing; but every form of it that was tried with the 128 x 128 tile spilled hundreds of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import packed_width
from . import scratch, tiles
from .matmul import input_gradient, one_stride
from .score import checked

# In one block of assembly so that the fp32 parts of a large tile do not all live at once: they would not fit.
_SPLIT = """{
.reg .b32 %first, %second;
cvt.rn.bf16x2.f32 $0, $3, $2;
shl.b32 %first, $0, 16;
and.b32 %second, $0, 0xffff0000;
sub.f32 %first, $2, %first;
sub.f32 %second, $3, %second;
cvt.rn.bf16x2.f32 $1, %second, %first;
}"""


@triton.jit
def split(b, FAST: tl.constexpr, SPLIT: tl.constexpr):
    """b as the sum of a high and a low part in bf16, 16 bits together; without FAST b itself, twice."""
    if not FAST:
        return b, b
    elif SPLIT != "":
        return tl.inline_asm_elementwise(
            SPLIT, "=&r,=&r,r,r", [b], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        b_high = b.to(tl.bfloat16)
        return b_high, (b - b_high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product_of_pairs(b_high, b_low, b_right_high, b_right_low, b_sum, FAST: tl.constexpr, EXACT: tl.constexpr = False):
    """`product` with a right operand that is split already; EXACT: whose low part is zero, for it was bf16."""
    if FAST:
        b_sum = tl.dot(b_low, b_right_high, b_sum)
        if not EXACT:
            b_sum = tl.dot(b_high, b_right_low, b_sum)
        return tl.dot(b_high, b_right_high, b_sum)
    else:
        return tl.dot(b_high, b_right_high, b_sum, input_precision="ieee")


@triton.jit
def product(b_high, b_low, b_right, b_sum, FAST: tl.constexpr, SPLIT: tl.constexpr):
    """b_sum + (b_high + b_low) b_right, to about 16 bits with FAST, else b_sum + b_high b_right in fp32."""
    b_right_high, b_right_low = split(b_right, FAST, SPLIT)
    return product_of_pairs(b_high, b_low, b_right_high, b_right_low, b_sum, FAST)


@triton.jit
def product_tile(
    p_gy, p_x, p_g, tokens, share, rows, columns, i_rows, i_columns,
    GIVEN: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of G = gy^T x over this program's `share` of the tokens, zero past the end; with GIVEN it is read from
    p_g.

    Nothing is masked in the loop: the partial block of tokens goes last (first, it would make ptxas issue the loop's
    wgmmas one by one), and rows and columns past the end of G are copies of its last ones until the loop is done.
    """
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_COLUMNS)
    t = tl.arange(0, BLOCK_DEPTH)
    r_in, c_in = r, c
    if not EVEN:
        r_in = tl.minimum(r, (rows - 1 - i_rows).to(tl.int32))
        c_in = tl.minimum(c, (columns - 1 - i_columns).to(tl.int32))
    if GIVEN:
        p_g += i_rows * columns + i_columns
        b_g = tl.load(p_g + (r_in[:, None] * columns + c_in[None, :])).to(tl.float32)
    else:
        first = tl.program_id(2) * share
        count = tl.minimum(tokens - first, share)
        p_gy += first.to(tl.int64) * rows + i_rows
        p_x += first.to(tl.int64) * columns + i_columns
        o_gy = t[None, :] * rows + r_in[:, None]
        o_x = t[:, None] * columns + c_in[None, :]
        b_g = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        tail = count % BLOCK_DEPTH
        # Of its own, so that the loop need not keep its pointers for after it.
        p_gy_tail = p_gy + (count - tail).to(tl.int64) * rows
        p_x_tail = p_x + (count - tail).to(tl.int64) * columns
        for _ in range(count // BLOCK_DEPTH):
            b_gy = tl.load(p_gy + o_gy)
            b_x = tl.load(p_x + o_x)
            if UPCAST:
                b_gy, b_x = b_gy.to(tl.float32), b_x.to(tl.float32)
            b_g = tl.dot(b_gy, b_x, b_g, input_precision="ieee")
            p_gy += tl.full([], BLOCK_DEPTH, tl.int64) * rows
            p_x += tl.full([], BLOCK_DEPTH, tl.int64) * columns
        if tail > 0:
            b_gy = tl.load(p_gy_tail + o_gy, mask=(t < tail)[None, :], other=0.0)
            b_x = tl.load(p_x_tail + o_x, mask=(t < tail)[:, None], other=0.0)
            if UPCAST:
                b_gy, b_x = b_gy.to(tl.float32), b_x.to(tl.float32)
            b_g = tl.dot(b_gy, b_x, b_g, input_precision="ieee")
    if not EVEN:
        b_g = tl.where((i_rows + r < rows)[:, None] & (i_columns + c < columns)[None, :], b_g, 0.0)
    return b_g


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


@triton.jit
def stacked_left(p_u, p_a, beta, m_rows, RANK_W: tl.constexpr, RANK_S: tl.constexpr, ROWS: tl.constexpr):
    """[beta U, A] of a tile's rows, fp32 (ROWS, 16), zero past the last rank."""
    r = tl.arange(0, ROWS)
    k = tl.arange(0, 16)
    m_u = m_rows[:, None] & (k < RANK_W)[None, :]
    m_a = m_rows[:, None] & ((k >= RANK_W) & (k < RANK_W + RANK_S))[None, :]
    b_u = tl.load(p_u + (r[:, None] * RANK_W + k[None, :]), mask=m_u, other=0.0).to(tl.float32)
    b_a = tl.load(p_a + (r[:, None] * RANK_S + (k - RANK_W)[None, :]), mask=m_a, other=0.0).to(tl.float32)
    return b_u * beta + b_a


@triton.jit
def stacked_right(
    p_v, p_b, m_columns, columns, RANK_W: tl.constexpr, RANK_S: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """[V; B] of a tile's columns, fp32 (16, COLUMNS), zero past the last rank."""
    c = tl.arange(0, COLUMNS)
    k = tl.arange(0, 16)
    m_v = (k < RANK_W)[:, None] & m_columns[None, :]
    m_b = ((k >= RANK_W) & (k < RANK_W + RANK_S))[:, None] & m_columns[None, :]
    b_v = tl.load(p_v + (k[:, None] * columns + c[None, :]), mask=m_v, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + ((k - RANK_W)[:, None] * columns + c[None, :]), mask=m_b, other=0.0).to(tl.float32)
    return b_v + b_b


@triton.jit
def gate(b_updated, p_mask, words, r_in, w_in, THROUGH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """M, or with THROUGH M + |W'|, in fp32."""
    c = tl.arange(0, COLUMNS)
    b_words = tl.load(p_mask + (r_in[:, None] * words + w_in[None, :]))
    b_word = tl.broadcast_to(b_words[:, :, None], (ROWS, COLUMNS // 32, 32))
    b_word = tl.reshape(b_word, (ROWS, COLUMNS))
    b_gate = ((b_word >> (c % 32 // 2 + c % 2 * 16)[None, :]) & 1).to(tl.float32)
    if THROUGH:
        b_gate += tl.abs(b_updated)
    return b_gate


@triton.jit(do_not_specialize=["tokens", "share"])
def factor_gradients_kernel(
    p_gy, p_x, p_g, p_weight, p_u, p_v, p_a, p_b, p_mask, p_row_sums, p_column_sums,
    tokens, share, rows, columns, stride, words, beta,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, WEIGHT_ALONG_ROWS: tl.constexpr, THROUGH: tl.constexpr,
    GIVEN: tl.constexpr, FAST: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    STACK: tl.constexpr,
):  # fmt: skip
    """One tile's share of all six sums; the grid is (column tiles, row tiles, shares of the tokens).

    row_sums is fp32 (shares * column tiles, rows, RANKS): Q V^T, D B^T and D.sum(1); column_sums (shares * row tiles,
    RANKS, columns): (beta U)^T Q, A^T D and D.sum(0). GIVEN: G is read from p_g, and p_gy and p_x are not.
    """
    RANKS: tl.constexpr = RANK_W + RANK_S + 1
    i_columns = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    i_rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    b_g = product_tile(
        p_gy, p_x, p_g, tokens, share, rows, columns, i_rows, i_columns, GIVEN, UPCAST, EVEN,
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
    if WEIGHT_ALONG_ROWS:
        p_weight += i_rows + i_columns * stride
        b_weight = tl.load(p_weight + (r_in[:, None] + c_in[None, :] * stride)).to(tl.float32)
    else:
        p_weight += i_rows * stride + i_columns
        b_weight = tl.load(p_weight + (r_in[:, None] * stride + c_in[None, :])).to(tl.float32)
    if STACK:
        # All ranks of a kind side by side in one operand, which is loaded and split once. Each product has the other
        # kind's half zeroed, so that dU and dA are two halves of one accumulator, and so are dV and dB.
        k = tl.arange(0, 16)
        of_weight = k < RANK_W
        EXACT: tl.constexpr = p_v.dtype.element_ty == tl.bfloat16 and p_b.dtype.element_ty == tl.bfloat16
        b_right = stacked_right(p_v + i_columns, p_b + i_columns, m_columns, columns, RANK_W, RANK_S, BLOCK_COLUMNS)
        b_right_high, b_right_low = split(b_right, FAST, SPLIT)
        b_left = stacked_left(p_u, p_a, beta, m_rows, RANK_W, RANK_S, BLOCK_ROWS)
        b_left_high, b_left_low = split(b_left, FAST, SPLIT)
        b_u_high = tl.where(of_weight[None, :], b_left_high, 0.0)
        b_u_low = tl.where(of_weight[None, :], b_left_low, 0.0)
        b_updated = product_of_pairs(b_u_high, b_u_low, b_right_high, b_right_low, b_weight, FAST, EXACT)

        b_row_sum = tl.zeros((BLOCK_ROWS, 16), tl.float32)
        b_sum = tl.zeros((BLOCK_COLUMNS, 16), tl.float32)
        b_d = b_g * b_updated
        tl.store(p_row_sums + (r * RANKS + (RANK_W + RANK_S)), tl.sum(b_d, 1), mask=m_rows)
        p_dc = p_column_sums + tl.full([], RANK_W + RANK_S, tl.int64) * columns
        tl.store(p_dc + c, tl.sum(b_d, 0), mask=m_columns)
        b_high, b_low = split(b_d, FAST, SPLIT)
        b_b_high = tl.where(of_weight[:, None], 0.0, b_right_high)
        b_b_low = tl.where(of_weight[:, None], 0.0, b_right_low)
        b_row_sum = product_of_pairs(b_high, b_low, tl.trans(b_b_high), tl.trans(b_b_low), b_row_sum, FAST, EXACT)
        b_a_high = tl.where(of_weight[None, :], 0.0, b_left_high)
        b_a_low = tl.where(of_weight[None, :], 0.0, b_left_low)
        b_sum = product_of_pairs(tl.trans(b_high), tl.trans(b_low), b_a_high, b_a_low, b_sum, FAST)
        if columns > 0:  # always: a branch keeps the compiler from holding the operands of D's and Q's products at once
            b_gate = gate(b_updated, p_mask + i_columns // 32, words, r_in, w_in, THROUGH, BLOCK_ROWS, BLOCK_COLUMNS)
            b_high, b_low = split(b_g * b_gate, FAST, SPLIT)
            b_v_high = tl.where(of_weight[:, None], b_right_high, 0.0)
            b_v_low = tl.where(of_weight[:, None], b_right_low, 0.0)
            b_row_sum = product_of_pairs(b_high, b_low, tl.trans(b_v_high), tl.trans(b_v_low), b_row_sum, FAST, EXACT)
            b_sum = product_of_pairs(tl.trans(b_high), tl.trans(b_low), b_u_high, b_u_low, b_sum, FAST)
        exists = k < RANK_W + RANK_S
        tl.store(p_column_sums + (k[None, :] * columns + c[:, None]), b_sum, mask=exists[None, :] & m_columns[:, None])
        tl.store(p_row_sums + (r[:, None] * RANKS + k[None, :]), b_row_sum, mask=m_rows[:, None] & exists[None, :])
    else:
        MANY: tl.constexpr = RANK_W > WIDTH or RANK_S >= WIDTH
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
        if rows > 0:  # always: a branch keeps the compiler from holding the operands of D's and Q's products at once
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
        b_gate = gate(b_updated, p_mask + i_columns // 32, words, r_in, w_in, THROUGH, BLOCK_ROWS, BLOCK_COLUMNS)
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
            tl.store(p_row_sums + RANK_W + o_rows, b_da, mask=m_rows[:, None] & (i <= RANK_S)[None, :])


@triton.jit
def add_shares_kernel(
    p_row_sums, p_column_sums, p_du, p_dv, p_da, p_db, p_dr, p_dc, row_shares, column_shares, rows, columns,
    beta, alpha1, alpha2, RANK_W: tl.constexpr, RANK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The six gradients: shares added one after another, scaled, each number put where it belongs."""
    RANKS: tl.constexpr = RANK_W + RANK_S + 1
    numel = tl.full([], RANKS, tl.int64) * rows
    programs = tl.cdiv(numel, BLOCK)
    block = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    if block < programs:
        i = block * BLOCK + tl.arange(0, BLOCK)
        for share in range(row_shares):
            b_sum += tl.load(p_row_sums + numel * share + i, mask=i < numel, other=0.0)
        row, rank = i // RANKS, i % RANKS
        exists = i < numel
        tl.store(p_du + row * RANK_W + rank, b_sum * beta, mask=exists & (rank < RANK_W))
        rank -= RANK_W
        tl.store(p_da + row * RANK_S + rank, b_sum * alpha1, mask=exists & (rank >= 0) & (rank < RANK_S))
        tl.store(p_dr + row, b_sum * alpha2, mask=exists & (rank == RANK_S))
    else:
        i = (block - programs) * BLOCK + tl.arange(0, BLOCK)
        numel = tl.full([], RANKS, tl.int64) * columns
        for share in range(column_shares):
            b_sum += tl.load(p_column_sums + numel * share + i, mask=i < numel, other=0.0)
        rank = i // columns
        exists = i < numel
        tl.store(p_dv + i, b_sum, mask=exists & (rank < RANK_W))  # U came with its beta
        rank -= RANK_W
        i -= tl.full([], RANK_W, tl.int64) * columns
        tl.store(p_db + i, b_sum * alpha1, mask=exists & (rank >= 0) & (rank < RANK_S))
        tl.store(p_dc + i - tl.full([], RANK_S, tl.int64) * columns, b_sum * alpha2, mask=exists & (rank == RANK_S))


def factor_gradients(
    gy: Tensor, x: Tensor, weight: Tensor, U: Tensor, V: Tensor, A: Tensor, B: Tensor, mask: Tensor,
    beta: float, alpha1: float, alpha2: float, through_magnitude: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dU, dV, dA, dB, dR and dC in fp32; weight and factors as `checked` leaves them."""
    (rows, columns), tokens = weight.shape, x.shape[0]
    rank_w, rank_s = V.shape[0], B.shape[0]
    shapes = (U.shape, V.shape, A.shape, B.shape, (rows,), (columns,))
    if not tokens or not weight.numel():
        dU, dV, dA, dB, dR, dC = (torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in shapes)
        return dU, dV, dA, dB, dR, dC
    dU, dV, dA, dB, dR, dC = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    weight, stride, along_columns = one_stride(weight)
    architecture, interpreted = tiles.architecture(x.device), tiles.interpreted()
    fast = x.dtype != torch.float32 and not interpreted
    tile = tiles.gradients(architecture, x.dtype, weight.dtype, rows, columns, max(rank_w, rank_s + 1))
    given = tokens >= tiles.GIVEN_TOKENS[tiles.dtype_key(x.dtype, weight.dtype)]
    g = scratch.get((rows, columns), x.dtype, x.device) if given else x
    if given:
        torch.mm(gy.T, x, out=g)
    across, down = triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows)
    share = tokens if given else tiles.token_share(architecture, across * down, tokens, tile.depth)
    shares = triton.cdiv(tokens, share)
    ranks = rank_w + rank_s + 1
    row_sums = torch.empty((shares * across, rows, ranks), dtype=torch.float32, device=x.device)
    column_sums = torch.empty((shares * down, ranks, columns), dtype=torch.float32, device=x.device)
    factor_gradients_kernel[across, down, shares](
        gy, x, g, weight, U, V, A, B, mask, row_sums, column_sums, tokens, share, rows, columns, stride,
        mask.shape[1], beta,
        RANK_W=rank_w, RANK_S=rank_s, WEIGHT_ALONG_ROWS=not along_columns, THROUGH=through_magnitude, GIVEN=given,
        FAST=fast, SPLIT="" if architecture.startswith("gfx") else _SPLIT, UPCAST=interpreted,
        EVEN=rows % tile.rows == 0 and columns % tile.columns == 0,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth,
        WIDTH=16, STACK=tiles.stacked(architecture, rank_w + rank_s, {U.dtype, V.dtype, A.dtype, B.dtype}),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    block = 256
    add_shares_kernel[(triton.cdiv(rows * ranks, block) + triton.cdiv(columns * ranks, block),)](
        row_sums, column_sums, dU, dV, dA, dB, dR, dC, shares * across, shares * down, rows, columns,
        beta, alpha1, alpha2, RANK_W=rank_w, RANK_S=rank_s, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return dU, dV, dA, dB, dR, dC


def linear_backward(
    gy: Tensor, x: Tensor, weight: Tensor, U: Tensor, V: Tensor, A: Tensor, B: Tensor, mask: Tensor,
    beta: float, alpha1: float, alpha2: float, through_magnitude: bool, needs_input: bool, needs_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx in gy's dtype and the six factor gradients in fp32; empty tensors in place of what is not needed."""
    weight, (U, V, A, B) = checked(weight, U, V, A, B)
    dx = input_gradient(gy, weight, U, V, mask, beta) if needs_input else gy.new_empty(0)
    if needs_factors:
        return dx, *factor_gradients(gy, x, weight, U, V, A, B, mask, beta, alpha1, alpha2, through_magnitude)
    dU, dV, dA, dB, dR, dC = (U.new_empty(0, dtype=torch.float32) for _ in range(6))
    return dx, dU, dV, dA, dB, dR, dC


def cases() -> Iterator[tiles.Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for weight, x in ((bf16, bf16), (fp16, fp16), (fp32, bf16), (fp32, fp16), (fp32, fp32)):
        yield _case(weight, x)
    yield _case(fp32, fp32, rank=16)
    for rank in (5, 9, 15, 16, 64):
        yield _case(bf16, bf16, rank=rank)
    yield _case(fp32, bf16, rank=64)
    yield _case(bf16, bf16, factor=bf16)
    yield _case(fp16, fp16, factor=fp16)
    yield _case(bf16, bf16, rows=960)
    for weight in (bf16, fp32):
        yield _case(weight, weight, rows=1003, columns=1001)
    yield _case(bf16, bf16, stored_transposed=True)
    yield _case(bf16, bf16, through=False)
    for dtype, key in ((bf16, "half"), (fp16, "half"), (fp32, "float")):
        yield _case(dtype, dtype, tokens=tiles.GIVEN_TOKENS[key])


def _case(
    weight: torch.dtype, x: torch.dtype, rows: int = 1024, columns: int = 1024, rank: int = 8, tokens: int = 32,
    through: bool = True, stored_transposed: bool = False, factor: torch.dtype = torch.float32,
) -> tiles.Case:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call() -> None:
        W = empty(columns, rows, dtype=weight).t() if stored_transposed else empty(rows, columns, dtype=weight)
        mask = empty(rows, packed_width(columns), dtype=torch.int32)
        shapes = ((rows, rank), (rank, columns)) * 2
        U, V, A, B = (empty(*shape, dtype=factor) for shape in shapes)
        gy, x_ = empty(tokens, rows, dtype=x), empty(tokens, columns, dtype=x)
        factor_gradients(gy, x_, W, U, V, A, B, mask, 1.0, 1.0, 1.0, through)

    tile = tiles.gradients(tiles.architecture(torch.device("meta")), x, weight, rows, columns, rank + 1)
    odd, given = rows % 2 == 1, tokens >= tiles.GIVEN_TOKENS[tiles.dtype_key(x, weight)]
    details = [f"{rows} x {columns}"] * (rows != 1024) + ["W transposed"] * stored_transposed
    details += [f"factors {factor}".replace("torch.", "")] * (factor != torch.float32)
    details += ["G given"] * given + ["not through |W'|"] * (not through)
    name = ", ".join(["factor gradients", tiles.pair_name(weight, x), f"rank {rank}", *details])
    return tiles.Case(name, call, None if odd or given else tile.slots)
