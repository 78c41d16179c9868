"""y = x (M * W')^T + bias and dx = gy (M * W') for a mask of blocks: loops over the kept blocks alone.

Both are one kernel, as in matmul.py: left (rows, depth) times x^T (depth, tokens), left being M * W', or its transpose
for the input gradient. A program makes one block's rows of the result for a tile of tokens. It goes along the strip
of their kept blocks (see block_lists.py): several thin blocks, or a part of a thick one, in a step, so that the work,
and what is read of W and x, are proportional to the kept blocks. W' = W + beta U V of a step is made in registers in
fp32, rounded once to x's dtype, and multiplied. No bit of the mask is read here.

Precision is that of matmul.py: U V from pairs of bf16, 16 bits together; all in fp32 multiply-add for fp32 x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import MaskedWeight
from .block_lists import BlockLists, strip
from .kept_lists import lists_of
from .matmul import Split, one_stride, split_factors, store_result
from .ptx import ROUNDING, rounded, used
from .score import checked_operands
from .tiles import choice, tables, targets
from .tiles.targets import cdiv


@triton.jit
def add_product(b_updated, b_left, p_right, o_right, m_inner, ALONG_ROWS: tl.constexpr, MASKED: tl.constexpr):
    """b_updated + left right^T, as W lies in memory."""
    b_right = tl.load(p_right + o_right, mask=m_inner, other=0.0) if MASKED else tl.load(p_right + o_right)
    if ALONG_ROWS:
        return tl.dot(b_right, b_left, b_updated, input_precision="ieee")
    else:
        return tl.dot(b_left, b_right, b_updated, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens", "has_bias", "capacity"])
def block_matmul_kernel(
    p_x, p_weight, p_left, p_right, p_bias, p_y, p_indices, p_counts, p_order,
    tokens, rows, depth, stride, capacity, has_bias,
    WIDTH: tl.constexpr, PART: tl.constexpr, WEIGHT_ALONG_ROWS: tl.constexpr, EVEN: tl.constexpr,
    UPCAST: tl.constexpr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, WAIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """y[t, row] = bias[row] + sum over the depth of row's kept blocks of (W + left right^T)[row, depth] x[t, depth].

    x (tokens, depth) and y (tokens, rows) are contiguous, left is (rows, WIDTH), right (depth, WIDTH). BLOCK_ROWS is
    the size of the blocks. A tile of W is worked on as it lies in memory, (rows, depth), or with WEIGHT_ALONG_ROWS
    (depth, rows). EVEN: every block is whole.
    """
    tl.assume(tokens > 0)
    i_list = tl.load(p_order + tl.program_id(1))
    i_tokens = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    i_rows = i_list * BLOCK_ROWS
    count = tl.load(p_counts + i_list)
    p_indices += i_list * capacity
    r = tl.arange(0, BLOCK_ROWS)
    t = tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, PART)
    # Rows and tokens past the end read the last one again and are not stored: cheaper than a mask a load.
    r_in = r
    if not EVEN:
        r_in = tl.minimum(r, (rows - 1 - i_rows).to(tl.int32))
    t_in = tl.minimum(t, (tokens - 1 - i_tokens).to(tl.int32))
    p_x += i_tokens * depth
    p_left += i_rows * WIDTH
    if WEIGHT_ALONG_ROWS:
        p_weight += i_rows
        o_left = r_in[None, :] * WIDTH + k[:, None]
    else:
        p_weight += i_rows * stride
        o_left = r_in[:, None] * WIDTH + k[None, :]
    b_left = tl.load(p_left + o_left)

    b_y = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    MASKED: tl.constexpr = BLOCK_DEPTH > BLOCK_ROWS or not EVEN
    for first in range(0, count * BLOCK_ROWS, BLOCK_DEPTH):
        i, m = strip(p_indices, first, count, BLOCK_ROWS, BLOCK_DEPTH)
        if not EVEN:
            m = m & (i < depth)
        if WEIGHT_ALONG_ROWS:
            o_weight = i[:, None].to(tl.int64) * stride + r_in[None, :]
            o_right = i[:, None].to(tl.int64) * WIDTH + k[None, :]
            m_inner = m[:, None]
        else:
            o_weight = r_in[:, None] * stride + i[None, :]
            o_right = i[None, :].to(tl.int64) * WIDTH + k[:, None]
            m_inner = m[None, :]
        o_x = t_in[None, :] * depth + i[:, None]
        if MASKED:
            b_weight = tl.load(p_weight + o_weight, mask=m_inner, other=0.0)
            b_x = tl.load(p_x + o_x, mask=m[:, None], other=0.0)
        else:
            b_weight = tl.load(p_weight + o_weight)
            b_x = tl.load(p_x + o_x)
        if UPCAST:
            b_x = b_x.to(tl.float32)
        b_updated = b_weight.to(tl.float32)
        if WIDTH == PART:
            b_updated = add_product(b_updated, b_left, p_right, o_right, m_inner, WEIGHT_ALONG_ROWS, MASKED)
        else:  # high ranks: not all of the left factor fits the registers
            for part in tl.range(0, WIDTH, PART, num_stages=1):
                b_part = tl.load(p_left + part + o_left)
                b_updated = add_product(b_updated, b_part, p_right + part, o_right, m_inner, WEIGHT_ALONG_ROWS, MASKED)
        if WEIGHT_ALONG_ROWS:
            if WAIT:  # as in matmul.py: Triton 3.6 fails on a product that is used under a branch alone
                b_updated = used(b_updated)
            b_kept = tl.zeros((BLOCK_DEPTH, BLOCK_ROWS), b_x.dtype)
            if tokens > 0:  # always true, as in matmul.py: or both warpgroups would make the same rows of W'
                b_kept = rounded(b_updated, b_weight, b_x, ASSEMBLY, CONSTRAINTS)
            b_kept = tl.trans(b_kept)
        else:
            b_kept = rounded(b_updated, b_weight, b_x, ASSEMBLY, CONSTRAINTS)
        b_y = tl.dot(b_kept, b_x, b_y, input_precision="ieee")
        if WAIT:  # as in matmul.py: or ptxas issues the step's wgmmas one by one
            b_y = used(b_y)

    store_result(b_y, p_y, p_bias, has_bias, i_tokens, i_rows, tokens, rows, BLOCK_ROWS, BLOCK_COLUMNS)


def block_split(x: Tensor, operands: MaskedWeight) -> Split | None:
    """What both products of a step take, made once."""
    factors, beta = checked_operands(operands).factors, operands.scales.beta
    if not x.shape[0] or not operands.weight.numel():
        return None
    return split_factors(factors.U, factors.V, beta, targets.platform(x.device).pairs(x.dtype))


def block_matmul(
    x: Tensor, operands: MaskedWeight, bias: Tensor | None, kept: BlockLists, size: int, transposed: bool,
    split: Split | None = None,
) -> Tensor:  # fmt: skip
    """x (T, depth) times the transpose of M * W', or with `transposed` times M * W' itself.

    Operands as of `checked_operands`; `kept` are lists by rows of blocks, with `transposed` by columns. `split` is of
    `block_split`, if it is made already.
    """
    weight, factors, _, scales = operands
    rows, depth = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
    tokens = x.shape[0]
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    platform = targets.platform(x.device)
    left, right = split or split_factors(factors.U, factors.V, scales.beta, platform.pairs(x.dtype))
    if transposed:
        left, right = right, left
    weight, stride, along_columns = one_stride(weight)
    ragged, width = depth % size != 0 or rows % size != 0, left.shape[1]
    tile = choice.block_matmul(platform.architecture, x.dtype, weight.dtype, tokens, size, width, ragged)
    assembly, constraints = "", ""
    if x.dtype != torch.float32 and platform.assembly:
        assembly, constraints = ROUNDING[x.dtype, weight.dtype == torch.float32]
    block_matmul_kernel[cdiv(tokens, tile.columns), cdiv(rows, size)](
        x, weight, left, right, y if bias is None else bias, y, *kept, tokens, rows, depth, stride,
        kept.indices.shape[1], int(bias is not None),
        WIDTH=width, PART=min(width, tables.FACTOR_PART[choice.dtype_key(x.dtype, weight.dtype)]),
        WEIGHT_ALONG_ROWS=along_columns == transposed, EVEN=not ragged, UPCAST=platform.interpreted,
        ASSEMBLY=assembly, CONSTRAINTS=constraints, WAIT=platform.architecture == "sm_90" and assembly != "",
        BLOCK_ROWS=size, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, **platform.all_registers,
    )  # fmt: skip
    return y


def block_forward(
    x: Tensor, operands: MaskedWeight, bias: Tensor | None, size: int, split: Split | None = None
) -> Tensor:
    """y = x (M * W')^T + bias for a mask of blocks."""
    operands = checked_operands(operands)
    bias = None if bias is None else bias.to(x.dtype)
    kept = lists_of(operands.mask, operands.weight.shape, size).rows
    return block_matmul(x, operands, bias, kept, size, False, split)


def block_input_gradient(
    gy: Tensor, operands: MaskedWeight, kept: BlockLists, size: int, split: Split | None = None
) -> Tensor:
    """dx = gy (M * W'); operands as of `checked_operands`, `kept` are lists by columns of blocks."""
    return block_matmul(gy, operands, None, kept, size, True, split)
