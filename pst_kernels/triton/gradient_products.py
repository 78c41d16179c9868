"""Device functions that the gradient kernels share: products in pairs of bf16, and G = gy^T x over a split of tokens.

With FAST a number in fp32 is held as a high and a low part in bf16, 16 bits together, and tensor cores multiply the
parts; without, as for fp32 x, products are multiply-adds in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ptx import SPLITTING, split
from .tiles.targets import Platform


@triton.jit
def product_of_pairs(
    b_high, b_low, b_right_high, b_right_low, b_sum, FAST: tl.constexpr, EXACT: tl.constexpr = False,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """`product` with a right operand that is split already. EXACT: its low part is zero, for it was bf16; WHOLE: so is
    that of the left one.
    """
    if FAST:
        if not WHOLE:
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
def product_over_tokens(
    p_gy, p_x, tokens, tokens_per_split, rows, columns, r_in, i_in,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """gy^T x in fp32, (ROWS, COLUMNS), of the rows r_in and the columns i_in over one split of the tokens, the
    third program id.

    Nothing is masked in the loop, and the partial block of tokens goes last: first, it would make ptxas issue the
    loop's wgmmas one by one.
    """
    t = tl.arange(0, DEPTH)
    first = tl.program_id(2) * tokens_per_split
    count = tl.minimum(tokens - first, tokens_per_split)
    p_gy += first.to(tl.int64) * rows
    p_x += first.to(tl.int64) * columns
    o_gy = t[None, :] * rows + r_in[:, None]
    o_x = t[:, None] * columns + i_in[None, :]
    b_g = tl.zeros((ROWS, COLUMNS), tl.float32)
    tail = count % DEPTH
    # Of its own, so that the loop need not keep its pointers for after it.
    p_gy_tail = p_gy + (count - tail).to(tl.int64) * rows
    p_x_tail = p_x + (count - tail).to(tl.int64) * columns
    for _ in range(count // DEPTH):
        b_gy = tl.load(p_gy + o_gy)
        b_x = tl.load(p_x + o_x)
        if UPCAST:
            b_gy, b_x = b_gy.to(tl.float32), b_x.to(tl.float32)
        b_g = tl.dot(b_gy, b_x, b_g, input_precision="ieee")
        p_gy += tl.full([], DEPTH, tl.int64) * rows
        p_x += tl.full([], DEPTH, tl.int64) * columns
    if tail > 0:
        b_gy = tl.load(p_gy_tail + o_gy, mask=(t < tail)[None, :], other=0.0)
        b_x = tl.load(p_x_tail + o_x, mask=(t < tail)[:, None], other=0.0)
        if UPCAST:
            b_gy, b_x = b_gy.to(tl.float32), b_x.to(tl.float32)
        b_g = tl.dot(b_gy, b_x, b_g, input_precision="ieee")
    return b_g


@triton.jit
def product_tile(
    p_gy, p_x, p_g, tokens, tokens_per_split, rows, columns, i_rows, i_columns,
    G_STORED: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of G over this program's split of the tokens, zero past the end; with G_STORED it is read from p_g.

    Rows and columns past the end of G are copies of its last ones until the loop is done.
    """
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_COLUMNS)
    r_in, c_in = r, c
    if not EVEN:
        r_in = tl.minimum(r, (rows - 1 - i_rows).to(tl.int32))
        c_in = tl.minimum(c, (columns - 1 - i_columns).to(tl.int32))
    if G_STORED:
        p_g += i_rows * columns + i_columns
        b_g = tl.load(p_g + (r_in[:, None] * columns + c_in[None, :])).to(tl.float32)
    else:
        b_g = product_over_tokens(
            p_gy + i_rows, p_x + i_columns, tokens, tokens_per_split, rows, columns, r_in, c_in, UPCAST,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip
    if not EVEN:
        b_g = tl.where((i_rows + r < rows)[:, None] & (i_columns + c < columns)[None, :], b_g, 0.0)
    return b_g


KEPT_ALONE = 2  # the THROUGH of `gate` for steps in which the scores rest


@triton.jit
def gate(b_updated, b_words, THROUGH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """M, or with THROUGH M + |W'|, or with THROUGH = 2 M (1 + |W'|), in fp32, from the words of the mask (ROWS,
    COLUMNS // 32).
    """
    c = tl.arange(0, COLUMNS)
    b_word = tl.broadcast_to(b_words[:, :, None], (ROWS, COLUMNS // 32, 32))
    b_word = tl.reshape(b_word, (ROWS, COLUMNS))
    b_gate = ((b_word >> (c % 32 // 2 + c % 2 * 16)[None, :]) & 1).to(tl.float32)
    if THROUGH == 2:
        b_gate += b_gate * tl.abs(b_updated)
    elif THROUGH:
        b_gate += tl.abs(b_updated)
    return b_gate


def splitting(x: torch.dtype, platform: Platform) -> dict[str, bool | str]:
    """How products are made, as constexprs: FAST in pairs of bf16, SPLIT the assembly that makes a pair."""
    return {"FAST": platform.pairs(x), "SPLIT": SPLITTING if platform.assembly else ""}
