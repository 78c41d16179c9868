"""The mask from a threshold, as packed bits, and the masked weight M * W' that library GEMMs take.

One read of W makes the mask; the same pass can write the masked weight. Made later, a masked weight reads the bits
instead of A, B, R and C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks.packing import WORD, packed_width
from ..operands import Factors, MaskedWeight, Scales
from .score import checked, checked_operands
from .select import INDEX, KEY, key_of, signed, threshold
from .sweep import (
    SweepTile,
    hold_right,
    hold_rights,
    program_indices,
    step_indices,
    step_scores,
    step_updated,
    sweep_weight,
    tile_for_words,
    tile_of,
)
from .tiles import targets
from .tiles.targets import Platform

BITS = tl.constexpr(WORD)


@triton.jit
def bit_of(column):
    """Where the flag of a column lies in its word: see packing.py."""
    within = column % BITS
    return (within // 2 + (within % 2) * 16).to(tl.int32)


@triton.jit
def store_words(p_mask, b_kept, i, j, m_i, m_j, n_i, n_j, TRANSPOSED: tl.constexpr):
    """Pack the flags of a tile. Where i is the column, a step is the 32 columns of one word."""
    BLOCK_I: tl.constexpr = b_kept.shape[0]
    BLOCK_J: tl.constexpr = b_kept.shape[1]
    if TRANSPOSED:
        b_word = tl.sum(b_kept.to(tl.int32) << bit_of(i)[:, None], 0)
        word = tl.min(i, 0) // BITS
        tl.store(p_mask + j * tl.cdiv(n_i, BITS) + word, b_word, mask=m_j & (word * BITS < n_i))
    else:
        b_bits = b_kept.to(tl.int32) << bit_of(j)[None, :]
        b_word = tl.sum(tl.reshape(b_bits, [BLOCK_I, BLOCK_J // BITS, BITS]), 2)
        word = tl.min(j, 0) // BITS + tl.arange(0, BLOCK_J // BITS)
        width = tl.cdiv(n_j, BITS)
        m_word = m_i[:, None] & (word < width)[None, :]
        tl.store(p_mask + i[:, None] * width + word[None, :], b_word, mask=m_word)


@triton.jit
def load_flags(p_mask, i, j, m_i, m_j, n_i, n_j, TRANSPOSED: tl.constexpr):
    """The flags of a tile, bool."""
    BLOCK_I: tl.constexpr = i.shape[0]
    BLOCK_J: tl.constexpr = j.shape[0]
    if TRANSPOSED:
        word = tl.min(i, 0) // BITS
        b_word = tl.load(p_mask + j * tl.cdiv(n_i, BITS) + word, mask=m_j & (word * BITS < n_i), other=0)
        return ((b_word[None, :] >> bit_of(i)[:, None]) & 1) != 0
    else:
        word = tl.min(j, 0) // BITS + tl.arange(0, BLOCK_J // BITS)
        width = tl.cdiv(n_j, BITS)
        m_word = m_i[:, None] & (word < width)[None, :]
        b_word = tl.load(p_mask + i[:, None] * width + word[None, :], mask=m_word, other=0)
        b_words = tl.broadcast_to(b_word[:, :, None], [BLOCK_I, BLOCK_J // BITS, BITS])
        return ((tl.reshape(b_words, [BLOCK_I, BLOCK_J]) >> bit_of(j)[None, :]) & 1) != 0


@triton.jit
def store_masked(p_out, b_updated, b_kept, i, j, m_tile, n_i, n_j, TRANSPOSED: tl.constexpr):
    """M * W' of a tile into a contiguous (out, in)."""
    offset = j[None, :] * n_i + i[:, None] if TRANSPOSED else i[:, None] * n_j + j[None, :]
    tl.store(p_out + offset, tl.where(b_kept, b_updated, 0.0).to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def load_threshold(p_state, n_i, n_j, TRANSPOSED: tl.constexpr):
    """The key of the last pruned weight, its row and its column; the row is -1 where nothing is pruned."""
    index = tl.load(p_state + INDEX)
    n_row = n_i if TRANSPOSED else n_j
    return signed(tl.load(p_state + KEY)), tl.where(index < 0, -1, index // n_row), index % n_row


@triton.jit
def kept(b_score, i, j, key, last_row, last_column, TRANSPOSED: tl.constexpr):
    """Which weights of a tile come after the threshold."""
    b_key = key_of(b_score)
    if TRANSPOSED:
        after = (j > last_row)[None, :] | ((j == last_row)[None, :] & (i > last_column)[:, None])
    else:
        after = (i > last_row)[:, None] | ((i == last_row)[:, None] & (j > last_column)[None, :])
    return (b_key > key) | ((b_key == key) & after) | (last_row < 0)


@triton.jit(do_not_specialize=("rows_per_program",))
def mask_kernel(
    p_mask, p_out, p_state,
    p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1,
    n_i, n_j, stride_i, stride_j, rows_per_program, beta, alpha1, alpha2,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Prunes up to and with (KEY, INDEX); `p_out` may be None."""
    key, last_row, last_column = load_threshold(p_state, n_i, n_j, TRANSPOSED)
    first_i, j, m_j = program_indices(n_j, rows_per_program, BLOCK_J, VECTOR)
    held_w, held_s, b_right_1 = hold_rights(
        p_right_w, p_right_s, p_right_1, j, m_j, n_j, RANK_W, RANK_S, HELD, TRANSPOSED
    )
    for step in tl.range(0, rows_per_program, BLOCK_I, num_stages=STAGES):
        i, m_i, m_tile, b_updated, b_score = step_scores(
            p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, held_w, held_s, b_right_1,
            first_i, step, j, m_j, n_i, n_j, stride_i, stride_j, 0, beta, alpha1, alpha2,
            RANK_W, RANK_S, UNIT, TRANSPOSED, HELD, BLOCK_I,
        )  # fmt: skip
        b_kept = m_tile & kept(b_score, i, j, key, last_row, last_column, TRANSPOSED)
        store_words(p_mask, b_kept, i, j, m_i, m_j, n_i, n_j, TRANSPOSED)
        if p_out is not None:
            store_masked(p_out, b_updated, b_kept, i, j, m_tile, n_i, n_j, TRANSPOSED)


@triton.jit(do_not_specialize=("rows_per_program",))
def masked_weight_kernel(
    p_mask, p_out, p_weight, p_left_w, p_right_w, n_i, n_j, stride_i, stride_j, rows_per_program, beta,
    RANK_W: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_i, j, m_j = program_indices(n_j, rows_per_program, BLOCK_J, VECTOR)
    held_w = hold_right(p_right_w, j, m_j, n_j, RANK_W, HELD, TRANSPOSED)
    for step in tl.range(0, rows_per_program, BLOCK_I, num_stages=STAGES):
        i, m_i, m_tile = step_indices(first_i, step, m_j, n_i, BLOCK_I)
        b_updated = step_updated(
            p_weight, p_left_w, p_right_w, held_w, i, j, m_i, m_j, m_tile, n_i, n_j, stride_i, stride_j, beta,
            RANK_W, UNIT, TRANSPOSED, HELD,
        )  # fmt: skip
        b_kept = load_flags(p_mask, i, j, m_i, m_j, n_i, n_j, TRANSPOSED)
        store_masked(p_out, b_updated, b_kept, i, j, m_tile, n_i, n_j, TRANSPOSED)


def mask_from(state: Tensor, weight: Tensor, factors: Factors, scales: Scales, masked: Tensor | None = None) -> Tensor:
    """The packed mask from a threshold's state; `masked`, contiguous (out, in) of any dtype, is filled with M * W'."""
    mask = weight.new_empty((weight.shape[0], packed_width(weight.shape[1])), dtype=torch.int32)
    tile = _tile(weight, factors.weight_rank + factors.score_rank)
    sweep = sweep_weight(weight, factors, targets.platform(weight.device), tile)
    if weight.numel():
        mask_kernel[sweep.grid](mask, masked, state, *sweep.operands, *sweep.shape, *scales, **sweep.constants)
    return mask


def _tile(weight: Tensor, ranks: int) -> SweepTile:
    return tile_for_words(tile_of(ranks), weight.stride(0) == 1 and weight.stride(1) != 1)


def prune_mask(
    weight: Tensor, factors: Factors, scales: Scales, num_pruned: Tensor, guess: Tensor, masked: Tensor | None = None
) -> Tensor:
    """The packed mask, and from the same pass M * W' into `masked`, contiguous (out, in), where it is given."""
    factors = checked(weight, factors)
    if not weight.numel():
        return weight.new_empty((weight.shape[0], packed_width(weight.shape[1])), dtype=torch.int32)
    state = threshold(weight, factors, scales, num_pruned, guess)
    return mask_from(state, weight, factors, scales, masked)


def masked_weight(operands: MaskedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """M * W' in `dtype`, or in `out`, contiguous (out, in), where it is given."""
    operands = checked_operands(operands)
    if out is None:
        out = torch.empty(operands.weight.shape, dtype=dtype, device=operands.weight.device)
    return fill_masked_weight(operands, out, targets.platform(out.device))


def fill_masked_weight(operands: MaskedWeight, out: Tensor, platform: Platform) -> Tensor:
    """M * W' into `out`, which is returned; operands as of `checked_operands`."""
    weight, (U, V, *_), mask, (beta, _, _) = operands
    sweep = sweep_weight(weight, (U, V), platform, _tile(weight, U.shape[1]))
    if weight.numel():
        masked_weight_kernel[sweep.grid](mask, out, *sweep.operands, *sweep.shape, beta, **sweep.constants)
    return out
