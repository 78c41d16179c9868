"""y = x (M * W')^T + bias and dx = gy (M * W') for a mask of blocks: loops over the kept blocks alone.

Both are one kernel, as in matmul.py: left (rows, depth) times x^T (depth, tokens), left being M * W', or its transpose
for the input gradient. A program makes one block's rows of the result for a tile of tokens. It walks over the strip of
the kept blocks of its line (see block_lists.py): several thin blocks, or a part of a thick one, in a step, so that work
and traffic are proportional to the kept blocks. W' = W + beta U V of a step is made in registers in fp32, rounded once
to x's dtype, and multiplied. No bit of the mask is read here.

Precision is that of matmul.py: U V from pairs of bf16, 16 bits together; all in fp32 multiply-add for fp32 x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import MaskedWeight
from . import block_lists, tiles
from .matmul import one_stride, split, split_factors, store_result
from .score import checked
from .walk import all_registers

ROWS, COLUMNS = False, True  # what a line is

# Rounds a pair of W'. W itself is an operand only so that its load is pipelined: Triton pipelines what reaches a dot's
# first two operands, and W enters through the accumulator.
_ROUND = {torch.bfloat16: "cvt.rn.bf16x2.f32 $0, $2, $1;", torch.float16: "cvt.rn.f16x2.f32 $0, $2, $1;"}


@triton.jit
def rounded(b_updated, b_weight, b_x, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """W' in the dtype of `b_x`."""
    if ASSEMBLY == "":
        return b_updated.to(b_x.dtype)
    return tl.inline_asm_elementwise(
        ASSEMBLY, CONSTRAINTS, [b_updated, b_weight], dtype=b_x.dtype, is_pure=True, pack=2
    )


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
    p_x, p_weight, p_left, p_right, p_bias, p_y, p_blocks, p_counts, p_order,
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
    line = tl.load(p_order + tl.program_id(1))
    i_tokens = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    i_rows = line * BLOCK_ROWS
    count = tl.load(p_counts + line)
    p_blocks += line * capacity
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
        i, m = block_lists.strip(p_blocks, first, count, BLOCK_ROWS, BLOCK_DEPTH)
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
            b_kept = tl.zeros((BLOCK_DEPTH, BLOCK_ROWS), b_x.dtype)
            if tokens > 0:  # always, as in matmul.py: or both warpgroups would make the same rows of W'
                b_kept = rounded(b_updated, b_weight, b_x, ASSEMBLY, CONSTRAINTS)
            b_kept = tl.trans(b_kept)
        else:
            b_kept = rounded(b_updated, b_weight, b_x, ASSEMBLY, CONSTRAINTS)
        b_y = tl.dot(b_kept, b_x, b_y, input_precision="ieee")
        if WAIT:  # as in matmul.py: or ptxas issues the step's wgmmas one by one
            b_y = tl.inline_asm_elementwise("", "=f,0", [b_y], dtype=tl.float32, is_pure=True, pack=1)

    store_result(b_y, p_y, p_bias, has_bias, i_tokens, i_rows, tokens, rows, BLOCK_ROWS, BLOCK_COLUMNS)


def block_matmul(
    x: Tensor, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, lines: block_lists.Lines, size: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """x (T, depth) times the transpose of M * W', or with `transposed` times M * W' itself.

    `left` and `right` are from `split_factors`; `lines` are the rows of blocks, with `transposed` the columns.
    """
    rows, depth = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
    if transposed:
        left, right = right, left
    tokens = x.shape[0]
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    along_rows_of_tile = one_stride(weight)[2] == transposed
    weight, stride, _ = one_stride(weight)
    architecture, interpreted = tiles.architecture(x.device), tiles.interpreted()
    ragged = depth % size != 0 or rows % size != 0
    plain = x.dtype == torch.float32 or interpreted or architecture.startswith("gfx")
    tile = tiles.block_matmul(architecture, x.dtype, weight.dtype, tokens, size, left.shape[1], ragged)
    block_matmul_kernel[triton.cdiv(tokens, tile.columns), triton.cdiv(rows, size)](
        x, weight, left, right, y if bias is None else bias, y, *lines, tokens, rows, depth, stride,
        lines.blocks.shape[1], int(bias is not None),
        WIDTH=left.shape[1], PART=min(left.shape[1], tiles.FACTOR_PART[tiles.dtype_key(x.dtype, weight.dtype)]),
        WEIGHT_ALONG_ROWS=along_rows_of_tile, EVEN=not ragged, UPCAST=interpreted,
        ASSEMBLY="" if plain else _ROUND[x.dtype],
        CONSTRAINTS="" if plain else "=r,r,r,r" + ",r" * (weight.dtype == torch.float32),
        WAIT=architecture == "sm_90" and not plain,
        BLOCK_ROWS=size, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, **all_registers(x.device),
    )  # fmt: skip
    return y


def block_forward(x: Tensor, operands: MaskedWeight, bias: Tensor | None, size: int) -> Tensor:
    """y = x (M * W')^T + bias for a mask of blocks."""
    weight, factors, mask, (beta, _, _) = operands
    U, V, *_ = checked(weight, factors)
    bias = None if bias is None else bias.to(x.dtype)
    kept = block_lists.lines(mask.contiguous(), weight.shape, size, ROWS)
    return block_matmul(x, weight, *split_factors(U, V, beta, split(x)), bias, kept, size, transposed=False)


def block_input_gradient(
    gy: Tensor, weight: Tensor, U: Tensor, V: Tensor, beta: float, lines: block_lists.Lines, size: int
) -> Tensor:
    """dx = gy (M * W'); weight and factors as `checked` leaves them, `lines` are columns of blocks."""
    return block_matmul(gy, weight, *split_factors(U, V, beta, split(gy)), None, lines, size, transposed=True)


def cases() -> Iterator[tiles.Case]:
    """Every size of blocks in both directions; the thickest with other dtypes, a high rank, ragged, few tokens."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for transposed in (False, True):
        for size in (16, 32, 64, 128):
            yield _case(bf16, bf16, size, transposed)
        yield _case(fp16, fp16, 128, transposed)
        yield _case(fp32, bf16, 128, transposed)
        yield _case(fp32, fp32, 128, transposed)
        yield _case(bf16, bf16, 128, transposed, rank=64)
        yield _case(bf16, bf16, 128, transposed, rows=1003, columns=1001)
    yield _case(fp32, fp32, 128, False, rank=64)
    yield _case(bf16, bf16, 128, False, tokens=16)


def _case(
    weight: torch.dtype, x: torch.dtype, size: int, transposed: bool, rows: int = 1024, columns: int = 1024,
    rank: int = 8, tokens: int = 1024,
) -> tiles.Case:  # fmt: skip
    def call() -> None:
        given = block_lists.example(weight, rows, columns, rank, size)
        factors = split_factors(given.U, given.V, 1.0, x != torch.float32)
        left = torch.empty((tokens, rows if transposed else columns), dtype=x, device="meta")
        kept = given.columns if transposed else given.rows
        block_matmul(left, given.weight, *factors, None, kept, size, transposed)

    kind = "input gradient" if transposed else "forward"
    shape, note = f"{rows} x {columns}" * (rows % 2), "few tokens" * (tokens < 64)
    name = block_lists.case_name(kind, size, weight, x, rank, shape, note)
    return tiles.Case(name, call, tiles.block_slots(weight, x, size, rank, tokens < 64 or rows % size > 0)[0])
