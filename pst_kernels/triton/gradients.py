"""The six factor gradients from tiles of G = gy^T x.

With D = G * W' and Q = G * (M + |W'|), or G * M, all six are low-rank reductions:

    dU = beta Q V^T    dA = alpha1 D B^T    dR = alpha2 D.sum(1)
    dV = beta U^T Q    dB = alpha1 A^T D    dC = alpha2 D.sum(0)

G stays in the accumulator, a tile of it at a time. For many tokens (tables.G_STORED_TOKENS) the library makes it
instead, and the same kernels read its tiles there. While the scores rest U and V alone learn, from Q: the same kernels
without D, and with Q = G * M without W'.

A program makes (out, in) tiles of G over one of `split_k` parts of the tokens, with few ranks a sweep of several tiles
along a row. It gates each and reduces it, adds up the sums of its rows, and stores its partial sums in a place of its
own; a second kernel adds them in a fixed order. No atomics: the same bits every time. D and Q are products in fp32,
reduced by tensor cores as pairs of bf16 that hold 16 bits of each number (fp32 x: multiply-add in fp32).

Bytes a weight beyond x and gy, with tiles of 128 x 128, sweeps over n of them, 16-bit W, and r ranks of each kind in
fp32: 2 + 1/8 for W and mask, 8 r (1 + 1/n) / 128 for the factors, 4 (2 r + 1) (1 + 1/n) / 128 for the sums and as much
to add them up, and the gradients themselves. That is 5.25 for r = 8 and n = 1, 3.9 for n = 8, and 0.2 more for the
gradients of a 512 x 1024 matrix. All but W, mask, factors and gradients, 2.51 in all on that matrix, is what programs
share through memory, or what lies in the cache when it is read again.

`choice.sweep_length` weighs what a sweep saves against multiprocessors that it leaves idle. 4,096 x 4,096 has 1,024
tiles for the 132 of an H100, and 128 sweeps of eight take no longer than 1,024 of one. 512 x 1024 has only 32: there
sweeps of eight would take eight times as long, 100 us instead of 13 with 1,024 tokens by the same arithmetic, and would
save 0.7 MB of traffic, 0.2 us.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks.packing import packed_width
from ..operands import Factors, MaskedWeight, Needs, Scales
from .gradient_products import KEPT_ALONE, gate, product_of_pairs, product_tile, splitting
from .gradient_ranks import many_ranks_kernel
from .launch import Launch
from .matmul import Split, input_gradient, one_stride
from .ptx import split
from .score import checked_operands
from .tiles import choice, tables, targets
from .tiles.targets import Platform, cdiv


@triton.jit
def left_factors(p_u, p_a, beta, m_rows, RANK_W: tl.constexpr, RANK_S: tl.constexpr, ROWS: tl.constexpr):
    """[beta U, A] of a tile's rows, fp32 (ROWS, 16), zero past the last rank."""
    r = tl.arange(0, ROWS)
    k = tl.arange(0, 16)
    m_u = m_rows[:, None] & (k < RANK_W)[None, :]
    m_a = m_rows[:, None] & ((k >= RANK_W) & (k < RANK_W + RANK_S))[None, :]
    b_u = tl.load(p_u + (r[:, None] * RANK_W + k[None, :]), mask=m_u, other=0.0).to(tl.float32)
    if RANK_S == 0:
        return b_u * beta
    else:
        b_a = tl.load(p_a + (r[:, None] * RANK_S + (k - RANK_W)[None, :]), mask=m_a, other=0.0).to(tl.float32)
        return b_u * beta + b_a


@triton.jit
def right_factors(
    p_v, p_b, m_columns, columns, RANK_W: tl.constexpr, RANK_S: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """[V; B] of a tile's columns, fp32 (16, COLUMNS), zero past the last rank."""
    c = tl.arange(0, COLUMNS)
    k = tl.arange(0, 16)
    m_v = (k < RANK_W)[:, None] & m_columns[None, :]
    m_b = ((k >= RANK_W) & (k < RANK_W + RANK_S))[:, None] & m_columns[None, :]
    b_v = tl.load(p_v + (k[:, None] * columns + c[None, :]), mask=m_v, other=0.0).to(tl.float32)
    if RANK_S == 0:
        return b_v
    else:
        b_b = tl.load(p_b + ((k - RANK_W)[:, None] * columns + c[None, :]), mask=m_b, other=0.0).to(tl.float32)
        return b_v + b_b


@triton.jit
def columns_of(b, PART: tl.constexpr, PARTS: tl.constexpr):
    """One of so many equal parts of a tile's columns, which stay in the registers that they are in."""
    if PARTS == 1:
        return b
    else:
        b_halves = tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1))
        b_first, b_second = tl.split(b_halves)
        if PART < PARTS // 2:
            return columns_of(b_first, PART, PARTS // 2)
        else:
            return columns_of(b_second, PART - PARTS // 2, PARTS // 2)


@triton.jit
def mask_words(p_mask, words, r_in, i_columns, EVEN: tl.constexpr, COLUMNS: tl.constexpr):
    """The words of the mask for so many columns of a tile, (rows, COLUMNS // 32)."""
    w = tl.arange(0, COLUMNS // 32)
    if not EVEN:
        w = tl.minimum(w, (words - 1 - i_columns // 32).to(tl.int32))
    return tl.load(p_mask + i_columns // 32 + (r_in[:, None] * words + w[None, :]))


@triton.jit(do_not_specialize=["tokens", "tokens_per_split", "sweep_length"])
def factor_gradients_kernel(
    p_gy, p_x, p_g, p_weight, p_u, p_v, p_a, p_b, p_mask, p_row_sums, p_column_sums,
    tokens, tokens_per_split, sweep_length, rows, columns, stride, words, beta,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, WEIGHT_ALONG_ROWS: tl.constexpr, THROUGH: tl.constexpr,
    G_STORED: tl.constexpr, FAST: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PARTS: tl.constexpr,
    WORDS_AT_ONCE: tl.constexpr, STRAIGHT: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """The partial sums of `sweep_length` tiles side by side; the grid is (sweeps of a row, row tiles, split_k).

    row_sums is fp32 (split_k * sweeps, rows, RANKS): Q V^T, D B^T and D.sum(1); column_sums (split_k * row tiles,
    RANKS, columns): (beta U)^T Q, A^T D and D.sum(0). G_STORED: G is read from p_g, and p_gy and p_x are not.

    All ranks of a kind stand side by side in one operand, which is loaded and split once. Each product has the other
    kind's half zeroed, so that dU and dA are two halves of one accumulator, and so are dV and dB. A tile is reduced in
    PARTS of its columns, so that W', D and Q of one part are in registers at a time.

    Without SCORES nothing is made of D: the sums are Q V^T and (beta U)^T Q alone, RANKS is RANK_W, and where the gate
    needs no W' none is read.
    """
    RANKS: tl.constexpr = RANK_W + RANK_S + 1 if SCORES else RANK_W
    OF_SCORES: tl.constexpr = RANK_S if SCORES else 0
    # Q is G or zero then, and has no low part.
    WHOLE: tl.constexpr = FAST and G_STORED and not SCORES and not THROUGH and p_g.dtype.element_ty == tl.bfloat16
    COLUMNS: tl.constexpr = BLOCK_COLUMNS // PARTS
    EXACT: tl.constexpr = p_v.dtype.element_ty == tl.bfloat16 and p_b.dtype.element_ty == tl.bfloat16
    i_rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    r = tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, COLUMNS)
    k = tl.arange(0, 16)
    m_rows = i_rows + r < rows
    r_in = r
    if not EVEN:
        r_in = tl.minimum(r, (rows - 1 - i_rows).to(tl.int32))
    of_weight = k < RANK_W
    exists = k < RANK_W + OF_SCORES
    b_left = left_factors(p_u + i_rows * RANK_W, p_a + i_rows * RANK_S, beta, m_rows, RANK_W, OF_SCORES, BLOCK_ROWS)
    b_left_high, b_left_low = split(b_left, FAST, SPLIT)
    b_u_high, b_u_low = b_left_high, b_left_low
    if SCORES:
        b_u_high = tl.where(of_weight[None, :], b_left_high, 0.0)
        b_u_low = tl.where(of_weight[None, :], b_left_low, 0.0)
        b_a_high = tl.where(of_weight[None, :], 0.0, b_left_high)
        b_a_low = tl.where(of_weight[None, :], 0.0, b_left_low)
    z = tl.program_id(2).to(tl.int64)
    p_row_sums += ((z * tl.num_programs(0) + tl.program_id(0)) * rows + i_rows) * RANKS
    p_column_sums += (z * tl.num_programs(1) + tl.program_id(1)) * RANKS * columns
    p_dc = p_column_sums + tl.full([], RANK_W + RANK_S, tl.int64) * columns
    p_mask += i_rows * words
    p_weight += i_rows * (1 if WEIGHT_ALONG_ROWS else stride)

    b_row_sum = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    b_dr = tl.zeros((BLOCK_ROWS,), tl.float32)
    first = tl.program_id(0) * sweep_length
    last = tl.minimum(first + sweep_length, tl.cdiv(columns, BLOCK_COLUMNS))
    # What does not change from tile to tile must not be held in registers through the products over tokens.
    for step in tl.range(first, last, num_stages=1, disable_licm=True):
        i_columns = tl.full([], step, tl.int64) * BLOCK_COLUMNS
        b_g = product_tile(
            p_gy, p_x, p_g, tokens, tokens_per_split, rows, columns, i_rows, i_columns, G_STORED, UPCAST, EVEN,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip
        if WORDS_AT_ONCE:
            b_words = mask_words(p_mask, words, r_in, i_columns, EVEN, BLOCK_COLUMNS)
        for part in tl.static_range(PARTS):
            # True, here and below, for only a matrix of whole tiles has more than one part, and one of one row is
            # STRAIGHT: a branch keeps the compiler from holding operands of several products at once.
            if columns > part:
                i = i_columns + part * COLUMNS
                m_columns = i + c < columns
                c_in = c
                if not EVEN:
                    c_in = tl.minimum(c, (columns - 1 - i).to(tl.int32))
                if WEIGHT_ALONG_ROWS:
                    o_weight = r_in[:, None] + c_in[None, :] * stride
                    p_part = p_weight + i * stride
                else:
                    o_weight = r_in[:, None] * stride + c_in[None, :]
                    p_part = p_weight + i
                b_right = right_factors(p_v + i, p_b + i, m_columns, columns, RANK_W, OF_SCORES, COLUMNS)
                b_right_high, b_right_low = split(b_right, FAST, SPLIT)
                b_v_high, b_v_low = b_right_high, b_right_low
                if SCORES:
                    b_v_high = tl.where(of_weight[:, None], b_right_high, 0.0)
                    b_v_low = tl.where(of_weight[:, None], b_right_low, 0.0)
                b_part = columns_of(b_g, part, PARTS)
                b_sum = tl.zeros((COLUMNS, 16), tl.float32)
                b_updated = b_part
                if SCORES or THROUGH:  # noqa: SIM102 (of constants)
                    if STRAIGHT or rows > part + 1:
                        b_weight = tl.load(p_part + o_weight).to(tl.float32)
                        b_updated = product_of_pairs(b_u_high, b_u_low, b_v_high, b_v_low, b_weight, FAST, EXACT)
                        if SCORES:
                            b_d = b_part * b_updated
                            b_dr += tl.sum(b_d, 1)
                            tl.store(p_dc + i + c, tl.sum(b_d, 0), mask=m_columns)
                            b_high, b_low = split(b_d, FAST, SPLIT)
                            b_b_high = tl.where(of_weight[:, None], 0.0, b_right_high)
                            b_b_low = tl.where(of_weight[:, None], 0.0, b_right_low)
                            b_row_sum = product_of_pairs(
                                b_high, b_low, tl.trans(b_b_high), tl.trans(b_b_low), b_row_sum, FAST, EXACT
                            )
                            b_sum = product_of_pairs(tl.trans(b_high), tl.trans(b_low), b_a_high, b_a_low, b_sum, FAST)
                if rows > part:
                    if WORDS_AT_ONCE:
                        b_part_words = columns_of(b_words, part, PARTS)
                    else:
                        b_part_words = mask_words(p_mask, words, r_in, i, EVEN, COLUMNS)
                    b_gate = gate(b_updated, b_part_words, THROUGH, BLOCK_ROWS, COLUMNS)
                    if WHOLE:
                        b_high = (b_part * b_gate).to(tl.bfloat16)
                        b_low = b_high
                    else:
                        b_high, b_low = split(b_part * b_gate, FAST, SPLIT)
                    b_row_sum = product_of_pairs(
                        b_high, b_low, tl.trans(b_v_high), tl.trans(b_v_low), b_row_sum, FAST, EXACT, WHOLE
                    )
                    b_sum = product_of_pairs(
                        tl.trans(b_high), tl.trans(b_low), b_u_high, b_u_low, b_sum, FAST, False, WHOLE
                    )
                o_column = k[None, :] * columns + c[:, None]
                tl.store(p_column_sums + i + o_column, b_sum, mask=exists[None, :] & m_columns[:, None])
    if SCORES:
        tl.store(p_row_sums + (r * RANKS + (RANK_W + RANK_S)), b_dr, mask=m_rows)
    tl.store(p_row_sums + (r[:, None] * RANKS + k[None, :]), b_row_sum, mask=m_rows[:, None] & exists[None, :])


@triton.jit
def add_partials_kernel(
    p_row_sums, p_column_sums, p_du, p_dv, p_da, p_db, p_dr, p_dc, row_partials, column_partials, rows, columns,
    beta, alpha1, alpha2, RANK_W: tl.constexpr, RANK_S: tl.constexpr, SCORES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The six gradients: partial sums added one after another, scaled, each number put where it belongs.

    Without SCORES there are sums for dU and dV alone, and nothing else is written.
    """
    RANKS: tl.constexpr = RANK_W + RANK_S + 1 if SCORES else RANK_W
    numel = tl.full([], RANKS, tl.int64) * rows
    programs = tl.cdiv(numel, BLOCK)
    block = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    if block < programs:
        i = block * BLOCK + tl.arange(0, BLOCK)
        for partial in range(row_partials):
            b_sum += tl.load(p_row_sums + numel * partial + i, mask=i < numel, other=0.0)
        row, rank = i // RANKS, i % RANKS
        exists = i < numel
        tl.store(p_du + row * RANK_W + rank, b_sum * beta, mask=exists & (rank < RANK_W))
        if SCORES:
            rank -= RANK_W
            tl.store(p_da + row * RANK_S + rank, b_sum * alpha1, mask=exists & (rank >= 0) & (rank < RANK_S))
            tl.store(p_dr + row, b_sum * alpha2, mask=exists & (rank == RANK_S))
    else:
        i = (block - programs) * BLOCK + tl.arange(0, BLOCK)
        numel = tl.full([], RANKS, tl.int64) * columns
        for partial in range(column_partials):
            b_sum += tl.load(p_column_sums + numel * partial + i, mask=i < numel, other=0.0)
        rank = i // columns
        exists = i < numel
        tl.store(p_dv + i, b_sum, mask=exists & (rank < RANK_W))  # U came with its beta
        if SCORES:
            rank -= RANK_W
            i -= tl.full([], RANK_W, tl.int64) * columns
            tl.store(p_db + i, b_sum * alpha1, mask=exists & (rank >= 0) & (rank < RANK_S))
            o_dc = i - tl.full([], RANK_S, tl.int64) * columns
            tl.store(p_dc + o_dc, b_sum * alpha2, mask=exists & (rank == RANK_S))


class Problem(NamedTuple):
    """What the launches depend on beside their plan."""

    dtypes: tuple[torch.dtype, ...]  # of x, gy, W, U, V, A and B
    shape: tuple[int, int]
    ranks: tuple[int, int]  # of W', of S
    stride: int  # of W, along the dimension whose stride is not 1
    along_columns: bool
    tokens: int
    through_magnitude: int
    scales: Scales
    scores: bool  # whether A, B, R and C learn too


@functools.lru_cache(maxsize=1024)
def _launches(problem: Problem, plan: choice.GradientPlan, platform: Platform) -> tuple[Launch, Launch]:
    """Of the partial sums, and of their sums."""
    (rows, columns), (rank_w, rank_s), x = problem.shape, problem.ranks, problem.dtypes[0]
    scores = problem.scores
    tile, sweeps, down, split_k = plan.tile, plan.sweeps, plan.down, plan.split_k
    sizes = rows, columns, problem.stride, packed_width(columns), problem.scales.beta
    constants = {
        "RANK_W": rank_w, "RANK_S": rank_s, "WEIGHT_ALONG_ROWS": not problem.along_columns,
        "THROUGH": problem.through_magnitude, "G_STORED": plan.g_stored, "UPCAST": platform.interpreted,
        "EVEN": rows % tile.rows == 0 and columns % tile.columns == 0,
        "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth,
        "SCORES": scores, **splitting(x, platform), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    tokens = problem.tokens, plan.tokens_per_split
    if plan.few_ranks:
        # Else Q needs no W', and D has a branch of its own, taken with two rows or more: it needs fewer registers, but
        # not on sm_120.
        straight = bool(problem.through_magnitude) or plan.g_stored or platform.architecture == "sm_120" or rows == 1
        straight = straight or not scores
        sums = Launch(
            factor_gradients_kernel, (sweeps, down, split_k), (*tokens, plan.sweep_length, *sizes), PARTS=plan.parts,
            WORDS_AT_ONCE=plan.words_at_once, STRAIGHT=straight, **constants, **platform.all_registers,
        )  # fmt: skip
    else:
        registers = platform.all_registers if x == torch.float32 else {}  # the others take what they need
        sums = Launch(many_ranks_kernel, (sweeps, down, split_k), (*tokens, *sizes), WIDTH=16, **constants, **registers)
    block, ranks = 256, _sums_of(problem.ranks, scores)
    add = Launch(
        add_partials_kernel, (cdiv(rows * ranks, block) + cdiv(columns * ranks, block),),
        (split_k * sweeps, split_k * down, rows, columns, *problem.scales),
        RANK_W=rank_w, RANK_S=rank_s, SCORES=scores, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return sums, add


def _sums_of(ranks: tuple[int, int], scores: bool) -> int:
    """Sums of a row, or of a column: one a rank, and with those of the scores one for R, or C."""
    return sum(ranks) + 1 if scores else ranks[0]


def factor_gradients(gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: int) -> Factors:
    """dU, dV, dA, dB, dR and dC in fp32; operands as of `checked_operands`, `through_magnitude` as `gate` takes it."""
    if not x.shape[0] or not operands.weight.numel():
        return _zeros(operands.factors)
    plan = _plan(x, operands, x.shape[0], True)
    return Factors(*_reduced(gy, x, gy.T @ x if plan.g_stored else x, operands, through_magnitude, plan, True))


def update_gradients(gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: int) -> tuple[Tensor, Tensor]:
    """dU and dV alone: half of the products with G, and without a gate by |W'| no read of W."""
    if not x.shape[0] or not operands.weight.numel():
        return _zeros(operands.factors)[:2]
    plan = _plan(x, operands, x.shape[0], False)
    dU, dV = _reduced(gy, x, gy.T @ x if plan.g_stored else x, operands, through_magnitude, plan, False)
    return dU, dV


def gradients_of_stored(G: Tensor, operands: MaskedWeight, through_magnitude: int) -> Factors:
    """`factor_gradients` of a G (out, in), contiguous, in fp32 or bf16."""
    if not G.numel():
        return _zeros(operands.factors)
    enough = max(tables.G_STORED_TOKENS.values())
    return Factors(*_reduced(G, G, G, operands, through_magnitude, _plan(G, operands, enough, True), True))


def _zeros(factors: Factors) -> Factors:
    return factors.map(lambda factor: torch.zeros_like(factor, dtype=torch.float32))


def _plan(x: Tensor, operands: MaskedWeight, tokens: int, scores: bool) -> choice.GradientPlan:
    weight, factors, *_ = operands
    (rows, columns), ranks = weight.shape, (factors.weight_rank, factors.score_rank)
    architecture = targets.platform(x.device).architecture
    return choice.gradient_plan(architecture, x.dtype, weight.dtype, (rows, columns), tokens, ranks, scores)


def _reduced(
    gy: Tensor, x: Tensor, G: Tensor, operands: MaskedWeight, through_magnitude: int, plan: choice.GradientPlan,
    scores: bool,
) -> list[Tensor]:  # fmt: skip
    """Of gy and x, or of G where the plan says that it is stored; the others are looked at for their dtype alone."""
    weight, factors, mask, scales = operands
    (rows, columns), tokens = weight.shape, x.shape[0]
    weight, stride, along_columns = one_stride(weight)
    ranks = factors.weight_rank, factors.score_rank
    dtypes = tuple([t.dtype for t in (x, gy, weight, *factors[:4])])
    problem = Problem(dtypes, (rows, columns), ranks, stride, along_columns, tokens, through_magnitude, scales, scores)
    sums, add = _launches(problem, plan, targets.platform(x.device))
    like: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    width = _sums_of(ranks, scores)
    row_sums = torch.empty((plan.split_k * plan.sweeps, rows, width), **like)
    column_sums = torch.empty((plan.split_k * plan.down, width, columns), **like)
    found = [torch.empty_like(factor, dtype=torch.float32) for factor in (factors if scores else factors[:2])]
    sums(gy, x, G, weight, *factors[:4], mask, row_sums, column_sums)
    add(row_sums, column_sums, *found, *found[:1] * (len(factors) - len(found)))  # in the place of what isn't written
    return found


def linear_backward(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs: Needs, split: Split | None = None
) -> tuple[Tensor, ...]:  # fmt: skip
    """dx in gy's dtype and the six factor gradients in fp32; empty tensors in place of what is not needed.

    `split` is that of the forward, if it made one.
    """
    operands = checked_operands(operands)
    dx = input_gradient(gy, operands, split) if needs.input else gy.new_empty(0)
    if needs.factors:
        return dx, *factor_gradients(gy, x, operands, through_magnitude)
    return dx, *(gy.new_empty(0, dtype=torch.float32) for _ in operands.factors)


def rested_backward(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs: Needs, split: Split | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dU and dV with Q = G * M * (1 + |W'|), or G * M, by the same kernels without the part of the scores."""
    operands = checked_operands(operands)
    dx = input_gradient(gy, operands, split) if needs.input else gy.new_empty(0)
    if not needs.factors:
        return dx, gy.new_empty(0, dtype=torch.float32), gy.new_empty(0, dtype=torch.float32)
    return dx, *update_gradients(gy, x, operands, KEPT_ALONE if through_magnitude else False)
