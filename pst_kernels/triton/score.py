"""W' and S as device functions over a (rows, columns) tile, as scores, thresholds, masks and masked weights need them.

    W' = W + beta U V                               S = |W'| + alpha1 A B + alpha2 (R + C)

All in fp32, in a fixed order, with one rounding a step (explicit fma), so that all kernels that use `low_rank_step`,
`updated_from` and `score_from` find the same bits for a weight, whatever their tiles, warps and target. Products and
gradients need no such bits, and add beta U V to W on tensor cores (matmul.py, gradients.py, block_*.py).

    UV = fma(U[:, k], V[k], UV) for k = 0 .. r1 - 1, from 0       W' = fma(beta, UV, W)
    AB = fma(A[:, k], B[k], AB) for k = 0 .. r2 - 1, from 0       S  = fma(alpha2, R + C, fma(alpha1, AB, |W'|))

Rows and columns are int64 index vectors, `m_row` and `m_column` say which of them exist; entries outside are garbage
that the caller masks. The factors are contiguous, in any floating dtype; W has any strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Factors, MaskedWeight, Scales
from .tiles.targets import cdiv

UNROLL = tl.constexpr(16)  # ranks up to here are unrolled; above, code size and compile time would grow with them


@triton.jit
def weight_offsets(i_row, i_column, stride_row, stride_column, UNIT: tl.constexpr):
    """Offsets of a tile of W. UNIT: the dimension of stride 1 (1 columns, 0 rows), or -1 where there is none.

    A constant stride is what lets the compiler load wide, along whichever dimension has it.
    """
    if UNIT == 1:
        return i_row[:, None] * stride_row + i_column[None, :]
    elif UNIT == 0:
        return i_row[:, None] + i_column[None, :] * stride_column
    else:
        return i_row[:, None] * stride_row + i_column[None, :] * stride_column


@triton.jit
def low_rank_step(b_sum, b_left, b_right):
    return tl.fma(b_left[:, None], b_right[None, :], b_sum)


@triton.jit
def updated_from(b_weight, b_uv, beta):
    return tl.fma(b_uv, tl.full([], beta, tl.float32), b_weight.to(tl.float32))


@triton.jit
def score_from(b_updated, b_ab, b_r, b_c, alpha1, alpha2):
    b_score = tl.fma(b_ab, tl.full([], alpha1, tl.float32), tl.abs(b_updated))
    return tl.fma(b_r + b_c, tl.full([], alpha2, tl.float32), b_score)


@triton.jit
def not_unrolled(COUNT: tl.constexpr, positive):
    """COUNT, but the compiler does not know it: it would unroll dozens of ranks and hold in registers what all load."""
    return tl.where(positive > 0, COUNT, 0)


@triton.jit
def low_rank_load(b_sum, p_left, p_right, k, i_row, i_column, m_row, m_column, columns, RANK: tl.constexpr):
    start = tl.full([], columns, tl.int64) * k
    b_left = tl.load(p_left + i_row * RANK + k, mask=m_row, other=0.0).to(tl.float32)
    b_right = tl.load(p_right + start + i_column, mask=m_column, other=0.0).to(tl.float32)
    return low_rank_step(b_sum, b_left, b_right)


@triton.jit
def low_rank_tile(p_left, p_right, i_row, i_column, m_row, m_column, columns, RANK: tl.constexpr):
    """fp32 tile of left @ right, left (rows, RANK), right (RANK, columns)."""
    b_sum = tl.zeros([i_row.shape[0], i_column.shape[0]], tl.float32)
    if RANK <= UNROLL:
        for k in tl.static_range(RANK):
            b_sum = low_rank_load(b_sum, p_left, p_right, k, i_row, i_column, m_row, m_column, columns, RANK)
    else:
        for k in range(not_unrolled(RANK, columns)):
            b_sum = low_rank_load(b_sum, p_left, p_right, k, i_row, i_column, m_row, m_column, columns, RANK)
    return b_sum


@triton.jit
def updated_tile(
    b_weight, p_u, p_v, i_row, i_column, m_row, m_column, columns, beta, RANK: tl.constexpr,
):  # fmt: skip
    """W' of a tile, fp32, from the tile of W as it was loaded."""
    return updated_from(b_weight, low_rank_tile(p_u, p_v, i_row, i_column, m_row, m_column, columns, RANK), beta)


@triton.jit
def score_tile(
    b_updated, p_a, p_b, p_r, p_c, i_row, i_column, m_row, m_column, columns, alpha1, alpha2, RANK: tl.constexpr,
):  # fmt: skip
    """S of a tile, fp32, from its W'."""
    b_ab = low_rank_tile(p_a, p_b, i_row, i_column, m_row, m_column, columns, RANK)
    b_r = tl.load(p_r + i_row, mask=m_row, other=0.0).to(tl.float32)
    b_c = tl.load(p_c + i_column, mask=m_column, other=0.0).to(tl.float32)
    return score_from(b_updated, b_ab, b_r[:, None], b_c[None, :], alpha1, alpha2)


@triton.jit
def tile_indices(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Row and column indices of this program's tile, int64, and which of them exist. Tiles run along the rows of W."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    tile = tl.program_id(0)
    i_row = (tile // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i_column = (tile % across).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return i_row, i_column, i_row < rows, i_column < columns


@triton.jit
def scores_kernel(
    p_weight, p_u, p_v, p_a, p_b, p_r, p_c, p_score, rows, columns, stride_row, stride_column, beta, alpha1, alpha2,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    i_row, i_column, m_row, m_column = tile_indices(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    m_tile = m_row[:, None] & m_column[None, :]
    offsets = weight_offsets(i_row, i_column, stride_row, stride_column, UNIT)
    b_weight = tl.load(p_weight + offsets, mask=m_tile, other=0.0)
    b_updated = updated_tile(b_weight, p_u, p_v, i_row, i_column, m_row, m_column, columns, beta, RANK_W)
    b_score = score_tile(
        b_updated, p_a, p_b, p_r, p_c, i_row, i_column, m_row, m_column, columns, alpha1, alpha2, RANK_S
    )
    tl.store(p_score + i_row[:, None] * columns + i_column[None, :], b_score, mask=m_tile)


TILE = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64, "num_warps": 4}


def scores(weight: Tensor, factors: Factors, scales: Scales) -> Tensor:
    """S, fp32 (out, in): for inspection, and for patterns, which decide by all of it."""
    factors = checked(weight, factors)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows, columns = weight.shape
    grid = (cdiv(rows, TILE["BLOCK_ROWS"]) * cdiv(columns, TILE["BLOCK_COLUMNS"]),)
    if weight.numel():
        scores_kernel[grid](
            weight, *factors, out, rows, columns, *weight.stride(), *scales,
            RANK_W=factors.weight_rank, RANK_S=factors.score_rank, UNIT=unit_dimension(weight), **TILE,
        )  # fmt: skip
    return out


def unit_dimension(weight: Tensor) -> int:
    """The UNIT of `weight_offsets`. A dimension of size one has no stride that matters."""
    if weight.stride(1) == 1 or weight.shape[1] == 1:
        return 1
    return 0 if weight.stride(0) == 1 else -1


def checked(weight: Tensor, factors: Factors) -> Factors:
    """The factors contiguous. Raises TypeError for float64: the kernels compute in fp32."""
    for tensor in (weight, *factors):
        if tensor.dtype == torch.float64:
            raise TypeError(
                "the Triton kernels compute in fp32 and take float32, float16 and bfloat16, got float64;"
                " set PST_KERNELS_BACKEND=torch, or cast the layer"
            )
    return factors.map(Tensor.contiguous)


def checked_operands(operands: MaskedWeight) -> MaskedWeight:
    """With factors as `checked` leaves them, and the mask contiguous."""
    factors = checked(operands.weight, operands.factors)
    return operands._replace(factors=factors, mask=operands.mask.contiguous())
