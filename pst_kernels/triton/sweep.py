"""How the kernels for threshold, mask and masked weight sweep over W: one read of W, and few of the factors.

A program owns BLOCK_J neighbours along j and `rows_per_program` along i, which it sweeps over BLOCK_I at a time. With
few ranks the right factors of its j stay in registers for the whole sweep (HELD), and the left factors of a step and
its tile of W travel through shared memory one step ahead (`num_stages`), so that what is broadcast to all threads is
read once, not once a thread.

(i, j) is (row, column) of W, or (column, row) where W is stored transposed (Conv1D): then U and V, A and B, R and C
change places, and the operands of products and sums with them, which leaves every bit of a score as it is. `n_i` and
`n_j` count them; "rows" here are the i.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks.packing import WORD
from .score import low_rank_step, not_unrolled, score_from, updated_from
from .tiles import versions
from .tiles.targets import Platform, cdiv

MOST_ROWS = 512  # of a program; more save little: it reads 64 bytes of factors for each j, at ranks 8 + 8
AT_ONCE = tl.constexpr(4)  # ranks whose vectors are loaded together where they are not held
WIDTH = 512  # of the matrix as which a flat vector of scores is swept


@triton.jit
def load_left(p_left, k, i, m_i, n_i, RANK: tl.constexpr, TRANSPOSED: tl.constexpr):
    offset = tl.full([], n_i, tl.int64) * k + i if TRANSPOSED else i * RANK + k
    return tl.load(p_left + offset, mask=m_i, other=0.0).to(tl.float32)


@triton.jit
def load_right(p_right, k, j, m_j, n_j, RANK: tl.constexpr, TRANSPOSED: tl.constexpr):
    offset = j * RANK + k if TRANSPOSED else tl.full([], n_j, tl.int64) * k + j
    return tl.load(p_right + offset, mask=m_j, other=0.0).to(tl.float32)


@triton.jit
def hold_right(p_right, j, m_j, n_j, RANK: tl.constexpr, HELD: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The right factor of a program's j, a vector a rank, where there are registers for it."""
    held = ()
    if HELD:
        for k in tl.static_range(RANK):
            held = held + (load_right(p_right, k, j, m_j, n_j, RANK, TRANSPOSED),)  # type: ignore[assignment]  # noqa: RUF005 (not in Triton)
    return held


@triton.jit
def low_rank_of(
    b_sum, p_left, p_right, k, i, j, m_i, m_j, n_i, n_j, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What one rank adds, with both of its vectors loaded."""
    b_left = load_left(p_left, k, i, m_i, n_i, RANK, TRANSPOSED)
    return low_rank_step(b_sum, b_left, load_right(p_right, k, j, m_j, n_j, RANK, TRANSPOSED))


@triton.jit
def low_rank(
    p_left, p_right, held, i, j, m_i, m_j, n_i, n_j,
    RANK: tl.constexpr, HELD: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    b_sum = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    if HELD:
        for k in tl.static_range(RANK):
            b_left = load_left(p_left, k, i, m_i, n_i, RANK, TRANSPOSED)
            b_sum = low_rank_step(b_sum, b_left, held[k])
    else:
        for first in range(0, not_unrolled(RANK // AT_ONCE * AT_ONCE, n_i + n_j), AT_ONCE):
            for k in tl.static_range(AT_ONCE):
                b_sum = low_rank_of(b_sum, p_left, p_right, first + k, i, j, m_i, m_j, n_i, n_j, RANK, TRANSPOSED)
        for k in tl.static_range(RANK // AT_ONCE * AT_ONCE, RANK):
            b_sum = low_rank_of(b_sum, p_left, p_right, k, i, j, m_i, m_j, n_i, n_j, RANK, TRANSPOSED)
    return b_sum


@triton.jit
def program_indices(n_j, rows_per_program, BLOCK_J: tl.constexpr, VECTOR: tl.constexpr):
    """This program's first i, its j, and which of these exist."""
    across = tl.cdiv(n_j, BLOCK_J)
    program = tl.program_id(0)
    j = (program % across).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    # No more neighbours than VECTOR to a thread: the held factors take that many registers a rank. Said as a divisor,
    # for with neighbours that are not contiguous Triton 3.6 would put a warp's threads along i.
    return (program // across).to(tl.int64) * rows_per_program, tl.multiple_of(j, VECTOR), j < n_j


@triton.jit
def load_weight(p_weight, i, j, m_tile, stride_i, stride_j, UNIT: tl.constexpr):
    offset = i[:, None] * stride_i + (j[None, :] if UNIT else j[None, :] * stride_j)
    return tl.load(p_weight + offset, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def step_updated(
    p_weight, p_left_w, p_right_w, held_w, i, j, m_i, m_j, m_tile, n_i, n_j, stride_i, stride_j, beta,
    RANK_W: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """W' of one step's tile."""
    b_weight = load_weight(p_weight, i, j, m_tile, stride_i, stride_j, UNIT)
    b_uv = low_rank(p_left_w, p_right_w, held_w, i, j, m_i, m_j, n_i, n_j, RANK_W, HELD, TRANSPOSED)
    return updated_from(b_weight, b_uv, beta)


@triton.jit
def step_score(
    b_updated, p_left_s, p_right_s, held_s, p_left_1, b_right_1, i, j, m_i, m_j, n_i, n_j, alpha1, alpha2,
    RANK_S: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """S of one step's tile, from its W'."""
    b_ab = low_rank(p_left_s, p_right_s, held_s, i, j, m_i, m_j, n_i, n_j, RANK_S, HELD, TRANSPOSED)
    b_left_1 = tl.load(p_left_1 + i, mask=m_i, other=0.0).to(tl.float32)
    return score_from(b_updated, b_ab, b_left_1[:, None], b_right_1[None, :], alpha1, alpha2)


@triton.jit
def flat_index(i, j, n_i, n_j, dtype: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Position in the flattened W."""
    i, j = i.to(dtype), j.to(dtype)
    return j[None, :] * n_i + i[:, None] if TRANSPOSED else i[:, None] * n_j + j[None, :]


@triton.jit
def hold_rights(
    p_right_w, p_right_s, p_right_1, j, m_j, n_j,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, HELD: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What a program holds for its whole sweep: the right factors of W', of AB, and of R + C."""
    held_w = hold_right(p_right_w, j, m_j, n_j, RANK_W, HELD, TRANSPOSED)
    held_s = hold_right(p_right_s, j, m_j, n_j, RANK_S, HELD, TRANSPOSED)
    if p_right_1 is None:
        b_right_1 = tl.zeros([j.shape[0]], tl.float32)
    else:
        b_right_1 = tl.load(p_right_1 + j, mask=m_j, other=0.0).to(tl.float32)
    return held_w, held_s, b_right_1


@triton.jit
def step_indices(first_i, step, m_j, n_i, BLOCK_I: tl.constexpr):
    """The i of one step, which of them exist, and which of the tile's weights do."""
    i = first_i + step + tl.arange(0, BLOCK_I)
    m_i = i < n_i
    return i, m_i, m_i[:, None] & m_j[None, :]


@triton.jit
def step_scores(
    p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, held_w, held_s, b_right_1,
    first_i, step, j, m_j, n_i, n_j, stride_i, stride_j, numel, beta, alpha1, alpha2,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One step of every kernel that sweeps over scores: i, which i and which weights exist, W' and S of the tile.

    Without `p_left_1` the weight is a vector of `numel` scores itself, and W' is S.
    """
    i, m_i, m_tile = step_indices(first_i, step, m_j, n_i, BLOCK_I)
    if p_left_1 is None:
        m_tile = m_tile & (flat_index(i, j, n_i, n_j, tl.int64, TRANSPOSED) < numel)
        b_updated = load_weight(p_weight, i, j, m_tile, stride_i, stride_j, UNIT)
        b_score = b_updated
    else:
        b_updated = step_updated(
            p_weight, p_left_w, p_right_w, held_w, i, j, m_i, m_j, m_tile, n_i, n_j, stride_i, stride_j, beta,
            RANK_W, UNIT, TRANSPOSED, HELD,
        )  # fmt: skip
        b_score = step_score(
            b_updated, p_left_s, p_right_s, held_s, p_left_1, b_right_1, i, j, m_i, m_j, n_i, n_j, alpha1, alpha2,
            RANK_S, TRANSPOSED, HELD,
        )  # fmt: skip
    return i, m_i, m_tile, b_updated, b_score


class SweepTile(NamedTuple):
    """A step's tile, how many of its j a thread holds, and whether the right factors are held for a whole sweep."""

    block_i: int
    block_j: int
    vector: int
    held: bool
    warps: int
    stages: int


def tile_of(ranks: int) -> SweepTile:
    """The tile for so many ranks in all, the same on every target: registers for the held factors decide."""
    if ranks <= 16:
        return SweepTile(2, 512, 4, True, 4, 3)  # of 34 that were timed on an H100 the fastest in all
    if ranks <= 32:
        return SweepTile(versions.MANY_HELD_ROWS, 256, 1, True, 8, 2)
    return RARE


def tile_for_words(tile: SweepTile, transposed: bool) -> SweepTile:
    """Of a kernel that packs or reads words of the mask: a step is one word's 32 columns where the columns of W run
    along i.
    """
    if transposed:
        return tile._replace(block_i=WORD, block_j=versions.TRANSPOSED_ACROSS, vector=1, warps=8, stages=2)
    return tile


RARE = SweepTile(2, 512, 2, False, 8, 1)  # for many ranks, and for passes that are hardly ever needed: quick to compile


class Sweep(NamedTuple):
    """One launch over all of W: its grid, its arguments in the order of the kernels that sweep, and its constants."""

    grid: tuple[int]
    operands: tuple[Any, ...]  # weight, left and right of UV, of AB and of R + C; None where W is a vector of scores
    shape: tuple[int, int, int, int, int]  # n_i, n_j, stride_i, stride_j, rows_per_program
    constants: dict[str, Any]


def programs_wanted(device: torch.device) -> int:
    """Two to every multiprocessor; one where programs run one after another anyway."""
    if device.type != "cuda":
        return 1
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def rows_to_sweep(n_i: int, n_j: int, tile: SweepTile, device: torch.device) -> int:
    """The most rows of a program that leave as many programs as are wanted; fewer read the factors more often."""
    strips = -(-programs_wanted(device) // -(-n_j // tile.block_j))
    return max(tile.block_i, min(MOST_ROWS, n_i // strips // tile.block_i * tile.block_i))


def sweep_weight(
    weight: Tensor, factors: tuple[Tensor, ...], platform: Platform, tile: SweepTile | None = None
) -> Sweep:
    """Over a weight of any strides; contiguous `factors`: U, V, A, B, R and C, or U and V alone."""
    lefts, rights = factors[::2], factors[1::2]
    (n_i, n_j), (stride_i, stride_j) = weight.shape, weight.stride()
    ranks = [left.shape[1] for left in lefts if left.dim() == 2]
    transposed = stride_i == 1 and stride_j != 1 and n_i > 1
    if transposed:
        lefts, rights, n_i, n_j, stride_i, stride_j = rights, lefts, n_j, n_i, stride_j, stride_i
    tile = tile or tile_of(sum(ranks))
    rows_per_program = rows_to_sweep(n_i, n_j, tile, weight.device)
    operands = (weight, *(f for pair in zip(lefts, rights, strict=True) for f in pair))
    constants = {
        "RANK_W": ranks[0], **({"RANK_S": ranks[1]} if len(ranks) > 1 else {}), "UNIT": stride_j == 1 or n_j == 1,
        "TRANSPOSED": transposed, **tile_constants(tile, platform),
    }  # fmt: skip
    grid = (cdiv(n_i, rows_per_program) * cdiv(n_j, tile.block_j),)
    return Sweep(grid, operands, (n_i, n_j, stride_i, stride_j, rows_per_program), constants)


def sweep_scores(scores: Tensor, platform: Platform, tile: SweepTile | None = None) -> Sweep:
    """Over a contiguous vector of fp32 scores, as rows of WIDTH."""
    rows, tile = cdiv(scores.numel(), WIDTH), tile or tile_of(0)
    rows_per_program = rows_to_sweep(rows, WIDTH, tile, scores.device)
    constants = {"RANK_W": 0, "RANK_S": 0, "UNIT": True, "TRANSPOSED": False, **tile_constants(tile, platform)}
    grid = (cdiv(rows, rows_per_program) * cdiv(WIDTH, tile.block_j),)
    return Sweep(grid, (scores, *[None] * 6), (rows, WIDTH, WIDTH, 1, rows_per_program), constants)


def tile_constants(tile: SweepTile, platform: Platform) -> dict[str, Any]:
    return {
        "HELD": tile.held, "VECTOR": tile.vector, "BLOCK_I": tile.block_i, "BLOCK_J": tile.block_j,
        "STAGES": tile.stages, "num_warps": tile.warps, **platform.all_registers,
    }  # fmt: skip
