"""y = x (M * W')^T + bias and dx = gy (M * W'), for few tokens with the masking inside the loop.

Both are one kernel: left (rows, depth) times x^T (depth, tokens), left being M * W' in the forward pass and its
transpose for the input gradient. The weight is the left operand because Triton feeds that to wgmma (sm_90) from
registers: masked on the way from shared memory to the tensor core, it is not written back. With PTX a loop step costs,
a pair of bf16 weights: two instructions to widen, none to add beta U V (a small tensor-core product whose accumulator
starts as W, in fp32), one to round the pair to x's dtype, 1.5 to turn two bits into a pair of 16-bit masks, one AND.

Precision. beta U V inside the loop is U_hi V_hi + U_lo V_hi + U_hi V_lo in bf16 (hi + lo holds 16 bits of a factor),
added to W in fp32, and W' is rounded once, to x's dtype. With fp32 x everything is fp32 multiply-add, no tf32.

For many tokens, and for high ranks, the masked weight is made once and the library multiplies: choice.matmul is the
switch. It is freed with the product, so that the next layer's lies in the same memory: the allocator gives it out in
the order of a stream, to whatever thread.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import MaskedWeight
from .launch import Launch
from .mask import fill_masked_weight
from .ptx import MASKING, keep, used, widen
from .score import checked_operands
from .tiles import choice, targets
from .tiles.tables import Tile
from .tiles.targets import Platform, cdiv


@triton.jit
def store_result(
    b_y, p_y, p_bias, has_bias, i_tokens, i_rows, tokens, rows, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """Add the bias to a (rows, tokens) tile, round it, and store what exists of it in y (tokens, rows)."""
    r = tl.arange(0, BLOCK_ROWS)
    t = tl.arange(0, BLOCK_COLUMNS)
    m_rows = i_rows + r < rows
    b_bias = tl.load(p_bias + i_rows + r, mask=m_rows & (has_bias != 0), other=0.0).to(tl.float32)
    o_y = t[None, :] * rows + r[:, None]
    m_y = m_rows[:, None] & (i_tokens + t < tokens)[None, :]
    b_y = (b_y + b_bias[:, None]).to(p_y.dtype.element_ty)
    tl.store(p_y + i_tokens * rows + i_rows + o_y, b_y, mask=m_y)


@triton.jit(do_not_specialize=["tokens", "has_bias"])
def masked_matmul_kernel(
    p_x, p_weight, p_left, p_right, p_bias, p_mask, p_y, tokens, rows, depth, stride, words, has_bias,
    WIDTH: tl.constexpr, WEIGHT_ALONG_ROWS: tl.constexpr, BITS_ALONG_ROWS: tl.constexpr, EVEN: tl.constexpr,
    UPCAST: tl.constexpr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, WAIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """y[t, row] = sum over depth of keep(W + left right^T)[row, depth] x[t, depth] + bias[row], one (rows, tokens)
    tile.

    x (tokens, depth) and y (tokens, rows) are contiguous, left is (rows, WIDTH), right (depth, WIDTH). A tile of W is
    worked on as it lies in memory, (outer, inner) with inner of stride 1: that is (rows, depth), or with
    WEIGHT_ALONG_ROWS (depth, rows), turned over when it is done. BITS_ALONG_ROWS: a mask word holds 32 rows, not 32 of
    depth.
    """
    tl.assume(tokens > 0)
    OUTER: tl.constexpr = BLOCK_DEPTH if WEIGHT_ALONG_ROWS else BLOCK_ROWS
    INNER: tl.constexpr = BLOCK_ROWS if WEIGHT_ALONG_ROWS else BLOCK_DEPTH
    BITS_INNER: tl.constexpr = BITS_ALONG_ROWS == WEIGHT_ALONG_ROWS
    i_tokens = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    i_rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    t = tl.arange(0, BLOCK_COLUMNS)
    d = tl.arange(0, BLOCK_DEPTH)
    k = tl.arange(0, WIDTH)
    # Rows and tokens past the end read the last one again and are not stored: cheaper than a mask a load.
    r_in = r
    if not (EVEN and WEIGHT_ALONG_ROWS):
        r_in = tl.minimum(r, (rows - 1 - i_rows).to(tl.int32))
    t_in = tl.minimum(t, (tokens - 1 - i_tokens).to(tl.int32))

    p_x += i_tokens * depth
    o_x = t_in[None, :] * depth + d[:, None]
    p_left += i_rows * WIDTH
    if WEIGHT_ALONG_ROWS:
        p_weight += i_rows
        o_weight = d[:, None] * stride + r_in[None, :]
        weight_step = tl.full([], BLOCK_DEPTH, tl.int64) * stride
        b_left = tl.load(p_left + (r_in[None, :] * WIDTH + k[:, None]))
        o_right = d[:, None] * WIDTH + k[None, :]
    else:
        p_weight += i_rows * stride
        o_weight = r_in[:, None] * stride + d[None, :]
        weight_step = tl.full([], BLOCK_DEPTH, tl.int64)
        b_left = tl.load(p_left + (r_in[:, None] * WIDTH + k[None, :]))
        o_right = d[None, :] * WIDTH + k[:, None]

    if BITS_ALONG_ROWS:
        w = tl.arange(0, BLOCK_ROWS // 32)
        p_mask += i_rows // 32
        w_in = tl.minimum(w, (words - 1 - i_rows // 32).to(tl.int32))
        o_mask = d[:, None] * words + w_in[None, :]
        mask_step = tl.full([], BLOCK_DEPTH, tl.int64) * words
    else:
        w = tl.arange(0, BLOCK_DEPTH // 32)
        p_mask += i_rows * words
        o_mask = r_in[:, None] * words + w[None, :]
        mask_step = tl.full([], BLOCK_DEPTH // 32, tl.int64)

    # Which bit of its word belongs to a weight, in the form that `keep` wants.
    bit = (tl.arange(0, INNER) % 32)[None, :] if BITS_INNER else (tl.arange(0, OUTER) % 32)[:, None]
    if ASSEMBLY == "":
        shift = bit // 2 + 16 * (bit % 2)
        select = bit
    elif BITS_INNER:
        shift = 7 - bit // 2 % 8
        select = tl.where(bit >= 16, 0xBB99, 0xAA88)
    else:
        shift = 15 - bit // 2
        select = tl.where(bit % 2 == 0, 0x5410, 0x7632)
    b_shift = tl.broadcast_to(shift, (OUTER, INNER))
    b_select = tl.broadcast_to(select, (OUTER, INNER))

    b_y = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for i in range(0, depth, BLOCK_DEPTH):
        if EVEN:
            b_weight = tl.load(p_weight + o_weight)
            b_x = tl.load(p_x + o_x)
            b_right = tl.load(p_right + o_right)
            b_words = tl.load(p_mask + o_mask)
        else:
            m = d < depth - i
            m_inner = m[:, None] if WEIGHT_ALONG_ROWS else m[None, :]
            b_weight = tl.load(p_weight + o_weight, mask=m_inner, other=0.0)
            b_x = tl.load(p_x + o_x, mask=m[:, None], other=0.0)
            b_right = tl.load(p_right + o_right, mask=m_inner, other=0.0)
            m_words = m[:, None] if BITS_ALONG_ROWS else (w < words - i // 32)[None, :]
            b_words = tl.load(p_mask + o_mask, mask=m_words, other=0)
        if UPCAST:
            b_x = b_x.to(tl.float32)
        if not BITS_INNER:
            b_words = tl.trans(b_words)
        if BITS_INNER:
            b_word = tl.broadcast_to(b_words[:, :, None], (OUTER, INNER // 32, 32))
        else:
            b_word = tl.broadcast_to(b_words[:, None, :], (OUTER // 32, 32, INNER))
        b_word = tl.reshape(b_word, (OUTER, INNER))
        b_updated = widen(b_weight, ASSEMBLY != "")
        if WEIGHT_ALONG_ROWS:
            b_updated = tl.dot(b_right, b_left, b_updated, input_precision="ieee")
            if WAIT:  # used under the branch alone, the small product would be waited for there: Triton 3.6 fails on it
                b_updated = used(b_updated)
            b_kept = tl.zeros((OUTER, INNER), b_x.dtype)
            # Always true, and LLVM is told so (tl.assume): to Triton the branch ends the chain from one product to the
            # next, or it would give both warpgroups all of `outer`, the same 64 rows twice.
            if tokens > 0:
                b_kept = keep(b_updated, b_weight, b_word, b_shift, b_select, b_x, ASSEMBLY, CONSTRAINTS)
            b_kept = tl.trans(b_kept)
        else:
            b_updated = tl.dot(b_left, b_right, b_updated, input_precision="ieee")
            b_kept = keep(b_updated, b_weight, b_word, b_shift, b_select, b_x, ASSEMBLY, CONSTRAINTS)
        b_y = tl.dot(b_kept, b_x, b_y, input_precision="ieee")
        if WAIT:
            # An empty use of the accumulator: the wait comes here, not after the next step's small product, and ptxas
            # issues the step's wgmmas back to back instead of one by one (its warning C7515).
            b_y = used(b_y)
        p_weight += weight_step
        p_x += BLOCK_DEPTH
        p_right += BLOCK_DEPTH * WIDTH
        p_mask += mask_step

    store_result(b_y, p_y, p_bias, has_bias, i_tokens, i_rows, tokens, rows, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=["rank"])
def split_factors_kernel(
    p_u, p_v, p_left, p_right, rows, columns, rank, beta,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """left (rows, WIDTH) and right (columns, WIDTH) with left right^T = beta U V, padded with zeros.

    SPLIT: [hi, lo, hi] of beta U beside [hi, hi, lo] of V, in bf16. Else: beta U and V, in fp32.
    """
    row_blocks = tl.cdiv(rows, BLOCK)
    block = tl.program_id(0)
    k = tl.arange(0, WIDTH)
    part = k // rank
    source = k - part * rank
    exists = part < (3 if SPLIT else 1)
    if block < row_blocks:
        i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m = (i < rows)[:, None] & exists[None, :]
        b = tl.load(p_u + i[:, None] * rank + source[None, :], mask=m, other=0.0).to(tl.float32) * beta
        if SPLIT:
            b_high = b.to(tl.bfloat16).to(tl.float32)
            b = tl.where((part == 1)[None, :], b - b_high, b_high)
        tl.store(p_left + i[:, None] * WIDTH + k[None, :], b.to(p_left.dtype.element_ty), mask=(i < rows)[:, None])
    else:
        i = (block - row_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m = (i < columns)[:, None] & exists[None, :]
        o = i[:, None] + source[None, :] * tl.full([], columns, tl.int64)
        b = tl.load(p_v + o, mask=m, other=0.0).to(tl.float32)
        if SPLIT:
            b_high = b.to(tl.bfloat16).to(tl.float32)
            b = tl.where((part == 2)[None, :], b - b_high, b_high)
        tl.store(p_right + i[:, None] * WIDTH + k[None, :], b.to(p_right.dtype.element_ty), mask=(i < columns)[:, None])


Split = tuple[Tensor, Tensor]  # beta U (out, width) and V^T (in, width)


@functools.lru_cache(maxsize=256)
def _splitting(rows: int, columns: int, rank: int, beta: float, split: bool, dtypes: tuple[torch.dtype, ...]) -> Launch:
    """`dtypes` are those of U and V."""
    width = choice.factor_width(rank, split)
    block = 32 if width <= 128 else 16
    return Launch(
        split_factors_kernel, (cdiv(rows, block) + cdiv(columns, block),), (rows, columns, rank, beta),
        SPLIT=split, WIDTH=width, BLOCK=block, num_warps=4,
    )  # fmt: skip


def split_factors(U: Tensor, V: Tensor, beta: float, split: bool) -> Split:
    """beta U and V^T, padded to what a tensor core multiplies; with `split` as bf16 pairs that hold 16 bits of each."""
    rows, rank, columns = U.shape[0], V.shape[0], V.shape[1]
    width = choice.factor_width(rank, split)
    dtype = torch.bfloat16 if split else torch.float32
    left = torch.empty((rows, width), dtype=dtype, device=U.device)
    right = torch.empty((columns, width), dtype=dtype, device=U.device)
    _splitting(rows, columns, rank, beta, split, (U.dtype, V.dtype))(U, V, left, right)
    return left, right


class Product(NamedTuple):
    """What a launch depends on beside its tile."""

    dtypes: tuple[torch.dtype, ...]  # of x, W and the bias, or y where there is none
    tokens: int
    rows: int
    depth: int
    stride: int
    words: int  # of a packed row
    width: int  # of the split factors
    transposed: bool
    along_columns: bool  # whether columns of W are what has stride 1
    with_bias: bool


@functools.lru_cache(maxsize=1024)
def _multiplying(product: Product, tile: Tile, platform: Platform) -> Launch:
    x, weight, _ = product.dtypes
    tokens, rows, depth, transposed = product.tokens, product.rows, product.depth, product.transposed
    along_rows = product.along_columns == transposed  # of the tile: its rows are W's columns where it is transposed
    assembly, constraints = "", ""
    if x != torch.float32 and platform.assembly:
        assembly, constraints = MASKING[x, transposed != along_rows, weight == torch.float32]
    return Launch(
        masked_matmul_kernel, (cdiv(tokens, tile.columns), cdiv(rows, tile.rows)),
        (tokens, rows, depth, product.stride, product.words, int(product.with_bias)),
        WIDTH=product.width, BITS_ALONG_ROWS=transposed, WEIGHT_ALONG_ROWS=along_rows,
        EVEN=depth % tile.depth == 0 and (rows % tile.rows == 0 or not along_rows), UPCAST=platform.interpreted,
        ASSEMBLY=assembly, CONSTRAINTS=constraints, WAIT=platform.architecture == "sm_90" and assembly != "",
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def masked_matmul(
    x: Tensor, operands: MaskedWeight, bias: Tensor | None, tile: Tile, platform: Platform, transposed: bool,
    split: Split | None = None,
) -> Tensor:  # fmt: skip
    """x (T, depth) times the transpose of M * W', or with `transposed` times M * W' itself, masked in the loop.

    Operands as of `checked_operands`; nothing is empty.
    """
    weight, factors, mask, scales = operands
    rows, depth = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
    left, right = split or split_factors(factors.U, factors.V, scales.beta, platform.pairs(x.dtype))
    if transposed:
        left, right = right, left
    tokens = x.shape[0]
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    weight, stride, along_columns = one_stride(weight)
    added = y if bias is None else bias
    product = Product(
        (x.dtype, weight.dtype, added.dtype), tokens, rows, depth, stride, mask.shape[1], left.shape[1], transposed,
        along_columns, bias is not None,
    )  # fmt: skip
    _multiplying(product, tile, platform)(x, weight, left, right, added, mask, y)
    return y


def split_for(x: Tensor, operands: MaskedWeight) -> Split | None:
    """What both products of a step take, made once; None where the library multiplies in the forward."""
    operands, platform = checked_operands(operands), targets.platform(x.device)
    if in_loop_tile(x, operands, platform, transposed=False) is None:
        return None
    return split_factors(operands.factors.U, operands.factors.V, operands.scales.beta, platform.pairs(x.dtype))


def linear_forward(x: Tensor, operands: MaskedWeight, bias: Tensor | None, split: Split | None = None) -> Tensor:
    """y = x (M * W')^T + bias."""
    operands, platform = checked_operands(operands), targets.platform(x.device)
    bias = None if bias is None else bias.to(x.dtype)
    tile = in_loop_tile(x, operands, platform, transposed=False)
    if tile is None:
        return torch.nn.functional.linear(x, masked_for_library(operands, x.dtype, platform), bias)
    return masked_matmul(x, operands, bias, tile, platform, False, split)


def input_gradient(gy: Tensor, operands: MaskedWeight, split: Split | None = None) -> Tensor:
    """dx = gy (M * W'); operands as of `checked_operands`."""
    platform = targets.platform(gy.device)
    tile = in_loop_tile(gy, operands, platform, transposed=True)
    if tile is None:
        return gy @ masked_for_library(operands, gy.dtype, platform)
    return masked_matmul(gy, operands, None, tile, platform, True, split)


def forward_scratch(tokens: int, dtype: torch.dtype, weight: Tensor, rank: int) -> Tensor | None:
    """Where M * W' belongs for a forward of so many tokens; None where the mask is applied in the product's loop."""
    if not tokens or not weight.numel():
        return None
    architecture = targets.architecture(weight.device)
    if choice.matmul(architecture, dtype, weight.dtype, tokens, weight.shape[1], rank) is not None:
        return None
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def in_loop_tile(x: Tensor, operands: MaskedWeight, platform: Platform, transposed: bool) -> Tile | None:
    """The tile to mask inside the loop with, or None where the library shall multiply."""
    weight = operands.weight
    if 0 in x.shape or 0 in weight.shape:
        return None  # an empty product: nothing to launch
    depth = weight.shape[0] if transposed else weight.shape[1]
    rank = operands.factors.weight_rank
    return choice.matmul(platform.architecture, x.dtype, weight.dtype, x.shape[0], depth, rank)


def one_stride(weight: Tensor) -> tuple[Tensor, int, bool]:
    """The weight with one dimension of stride 1, the other's stride, and whether columns are the one of stride 1."""
    if weight.stride(1) == 1 or weight.shape[1] == 1:
        return weight, weight.stride(0), True
    if weight.stride(0) == 1 or weight.shape[0] == 1:
        return weight, weight.stride(1), False
    weight = weight.contiguous()
    return weight, weight.stride(0), True


def masked_for_library(operands: MaskedWeight, dtype: torch.dtype, platform: Platform) -> Tensor:
    out = torch.empty(operands.weight.shape, dtype=dtype, device=operands.weight.device)
    return fill_masked_weight(operands, out, platform)
