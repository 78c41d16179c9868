"""The exact thresholds of all layers of a table: the search of select.py, each of its steps one launch for all layers.

    bracket   a program a layer
    gather    a program a tile
    refine    a program a layer: selects among its candidates, or asks for a search
    radix     four launches: 11, 11 and 10 bits of the keys, then 11 of the indices of equal scores; the last program to
              finish a layer narrows its range
    collect   gather and refine again, of the layers that were searched

The last two return at once where no layer is searched. Else every program goes through those layers one after another
and takes its share of each: often only one has missed, and then all programs work on it. No program waits for another.
Sums over programs are integers, and what the last one does depends on them alone, so their order does not matter.

The ranges are those of select.py, which looks at 8 bits a pass and stops where what is inside can be collected. So the
next guess, whose slope is that of the range, is the same too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .group_row import (
    CAPACITY,
    COPIES,
    FIRST_CANDIDATE,
    GUESS,
    INDEX_BITS,
    N_I,
    N_J,
    PRUNED,
    RADIX_BINS,
    ROWS,
    STRIDE_I,
    STRIDE_J,
    field_of,
    load_place,
    load_row,
    pointer_of,
    row_numel,
    row_operands,
    row_scales,
    row_sweep,
    tile_indices_at,
)  # fmt: skip
from .launch import Launch
from .select import (
    BELOW,
    COLLECT,
    COUNT,
    FIRST,
    FOUND,
    LAST,
    LOWER,
    MANY,
    RANK,
    REFINING_WARPS,
    SEARCH,
    SLOTS,
    STATUS,
    TICKET,
    UPPER,
    bin_of_rank,
    bracket_kernel,
    gather_step,
    key_of,
    load_state,
    refine,
    signed,
    slot_of,
    unsigned,
)  # fmt: skip
from .sweep import flat_index, hold_rights, step_scores
from .tiles import targets

if TYPE_CHECKING:
    from .group_table import Group

KEY_TURNS = tl.constexpr(3)  # radix launches over keys; one more over indices
DIGIT = tl.constexpr(11)
RARE_ROWS = tl.constexpr(64)  # short strips, for all programs share the layers that are searched
FEW = tl.constexpr(512)  # candidates that are held where a loop over layers takes registers too
LOOKED_AT = tl.constexpr(256)  # layers at a time, for one that waits


@triton.jit
def group_bracket_kernel(
    p_layers, p_state, p_key,
    W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    b_row = load_row(p_layers, layer)
    p_weight, p_u, p_v, p_a, p_b, p_r, p_c = row_operands(b_row, W_TYPE, F_TYPE, ALIGNED)
    columns, stride_row, stride_column = field_of(b_row, N_J), field_of(b_row, STRIDE_I), field_of(b_row, STRIDE_J)
    if TRANSPOSED:
        p_u, p_v, p_a, p_b, p_r, p_c = p_v, p_u, p_b, p_a, p_c, p_r
        columns, stride_row, stride_column = field_of(b_row, N_I), stride_column, stride_row
    beta, alpha1, alpha2 = row_scales(b_row)
    bracket_kernel(
        p_state + layer * SLOTS,
        pointer_of(b_row, GUESS, tl.float32, False), pointer_of(b_row, PRUNED, tl.int64, False),
        p_key + field_of(b_row, FIRST_CANDIDATE), p_weight, p_u, p_v, p_a, p_b, p_r, p_c,
        row_numel(b_row), columns, stride_row, stride_column, beta, alpha1, alpha2, field_of(b_row, CAPACITY),
        RANK_W, RANK_S,
    )  # fmt: skip


@triton.jit
def last_of(p_state, programs):
    """Whether this program is the last of so many to finish with a layer; it may read what the others have written."""
    tl.debug_barrier()  # a release of one thread is then one of all
    last = tl.atomic_add(p_state + TICKET, tl.full([], 1, tl.int64), sem="acq_rel") == programs - 1
    if last:
        tl.store(p_state + TICKET, tl.full([], 0, tl.int64))
    return last


@triton.jit
def refine_layer(b_row, p_state, p_bins, p_key, p_index, HELD_CANDIDATES: tl.constexpr, AT_ONCE: tl.constexpr):
    refine(
        p_state, p_bins, p_key, p_index, pointer_of(b_row, GUESS, tl.float32, False),
        pointer_of(b_row, PRUNED, tl.int64, False), load_state(p_state), row_numel(b_row), field_of(b_row, CAPACITY),
        field_of(b_row, INDEX_BITS).to(tl.int32), True, COPIES * RADIX_BINS,
        HELD_CANDIDATES, AT_ONCE,
    )  # fmt: skip


@triton.jit
def group_gather_kernel(
    p_layers, p_tiles, p_state, p_key, p_index,
    W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    layer, strip, block = load_place(p_tiles)
    p_state += layer * SLOTS
    b_state = load_state(p_state)
    if slot_of(b_state, STATUS) != COLLECT:
        return
    lower, upper = signed(slot_of(b_state, LOWER)), signed(slot_of(b_state, UPPER))
    b_row = load_row(p_layers, layer)
    (
        p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1,
        n_i, n_j, stride_i, stride_j, beta, alpha1, alpha2,
    ) = row_sweep(b_row, W_TYPE, F_TYPE, ALIGNED, TRANSPOSED)  # fmt: skip
    capacity, first_candidate = field_of(b_row, CAPACITY), field_of(b_row, FIRST_CANDIDATE)
    p_key += first_candidate
    p_index += first_candidate
    rows_per_program = field_of(b_row, ROWS)
    first_i, length, j, m_j = tile_indices_at(strip, block, n_i, n_j, rows_per_program, BLOCK_J, VECTOR)
    held_w, held_s, b_right_1 = hold_rights(
        p_right_w, p_right_s, p_right_1, j, m_j, n_j, RANK_W, RANK_S, HELD, TRANSPOSED
    )
    b_below = tl.zeros([BLOCK_J], tl.int32)
    for step in tl.range(0, length, BLOCK_I, num_stages=STAGES):
        i, _, m_tile, _, b_score = step_scores(
            p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, held_w, held_s, b_right_1,
            first_i, step, j, m_j, n_i, n_j, stride_i, stride_j, 0, beta, alpha1, alpha2,
            RANK_W, RANK_S, UNIT, TRANSPOSED, HELD, BLOCK_I,
        )  # fmt: skip
        b_below += gather_step(
            p_state, p_key, p_index, b_score, i, j, m_tile, n_i, n_j, lower, upper, 0, 0, capacity, TRANSPOSED, False
        )
    tl.atomic_add(p_state + BELOW, tl.sum(b_below, 0).to(tl.int64), sem="relaxed")


@triton.jit
def group_refine_kernel(p_layers, p_state, p_bins, p_key, p_index):
    """A program a layer: selects among what was collected, or asks for a search."""
    layer = tl.program_id(0)
    p_state += layer * SLOTS
    if slot_of(load_state(p_state), STATUS) == COLLECT:
        b_row = load_row(p_layers, layer)
        first = field_of(b_row, FIRST_CANDIDATE)
        refine_layer(b_row, p_state, p_bins + layer * (COPIES * RADIX_BINS), p_key + first, p_index + first, 0, MANY)


@triton.jit
def any_waits(p_state, layers, TURN: tl.constexpr):
    """Whether a layer is at this STATUS."""
    waiting = tl.full([], 0, tl.int32)
    for first in range(0, layers, LOOKED_AT):
        layer = first + tl.arange(0, LOOKED_AT)
        b_status = tl.load(p_state + layer * SLOTS + STATUS, mask=layer < layers, other=FOUND)
        waiting += tl.sum((b_status == TURN).to(tl.int32), 0)
    return waiting > 0


@triton.jit
def narrow(p_state, p_bins, b_state, shift, stop, indices, capacity):
    """Narrow a range to the bin of the answer's rank; to 2^stop keys, which is more, where those can be collected."""
    # Read where the atomics were, and reset. Not an exchange: AMD has none in its buffer instructions.
    b_copies = tl.atomic_and(p_bins + tl.arange(0, COPIES * RADIX_BINS), tl.zeros([COPIES * RADIX_BINS], tl.int32))
    b_bins = tl.sum(tl.reshape(b_copies, [COPIES, RADIX_BINS]), 0)
    bins = tl.arange(0, RADIX_BINS)
    place, rank = bin_of_rank(b_bins, slot_of(b_state, RANK))
    inside = tl.sum(tl.where(bins == place, b_bins, 0), 0)
    part = (place << shift) >> stop
    inside_part = tl.sum(tl.where(((bins.to(tl.int64) << shift) >> stop) == part, b_bins, 0), 0)
    lower = slot_of(b_state, LOWER)
    one = tl.full([], 1, tl.int64)
    if indices:
        tl.store(p_state + FIRST, place << shift)
        tl.store(p_state + LAST, ((place + 1) << shift) - 1)
    elif inside_part <= capacity:
        tl.store(p_state + LOWER, lower + (part << stop))
        tl.store(p_state + UPPER, lower + ((part + 1) << stop) - 1)
    else:
        tl.store(p_state + LOWER, lower + (place << shift))
        tl.store(p_state + UPPER, lower + ((place + 1) << shift) - 1)
    tl.store(p_state + RANK, rank)
    tl.store(p_state + COUNT, one - 1)
    tl.store(p_state + BELOW, one - 1)
    if indices | (inside_part <= capacity) | ((shift == 0) & (inside <= capacity)):
        tl.store(p_state + STATUS, one - 1 + COLLECT)


@triton.jit
def rare_tile(tile, across, n_i, n_j, BLOCK_J: tl.constexpr, VECTOR: tl.constexpr):
    """`tile_indices_at` of one of the tiles that all programs share."""
    place = tl.full([], tile, tl.int64)
    return tile_indices_at(place // across, place % across, n_i, n_j, RARE_ROWS, BLOCK_J, VECTOR)


@triton.jit(do_not_specialize=("layers", "turn"))
def group_radix_kernel(
    p_layers, p_state, p_bins, layers, turn,
    W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Counts, by the digit of this `turn`, what lies in the range of each layer that is searched; narrows the range."""
    if not any_waits(p_state, layers, SEARCH):
        return
    indices = turn == KEY_TURNS
    for layer in range(layers):
        p_layer = p_state + tl.full([], layer, tl.int64) * SLOTS
        b_state = load_state(p_layer)
        if slot_of(b_state, STATUS) == SEARCH:
            lower, upper = slot_of(b_state, LOWER), slot_of(b_state, UPPER)
            b_row = load_row(p_layers, layer)
            (
                p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1,
                n_i, n_j, stride_i, stride_j, beta, alpha1, alpha2,
            ) = row_sweep(b_row, W_TYPE, F_TYPE, ALIGNED, TRANSPOSED)  # fmt: skip
            shift = tl.where(indices, field_of(b_row, INDEX_BITS) - DIGIT, 32 - DIGIT * (turn + 1))
            shift = tl.maximum(shift, 0)
            across = tl.cdiv(n_j, BLOCK_J)
            p_layer_bins = p_bins + tl.full([], layer, tl.int64) * (COPIES * RADIX_BINS)
            for tile in range(tl.program_id(0), across * tl.cdiv(n_i, RARE_ROWS), tl.num_programs(0)):
                first_i, length, j, m_j = rare_tile(tile, across, n_i, n_j, BLOCK_J, VECTOR)
                held_w, held_s, b_right_1 = hold_rights(
                    p_right_w, p_right_s, p_right_1, j, m_j, n_j, RANK_W, RANK_S, HELD, TRANSPOSED
                )
                for step in tl.range(0, length, BLOCK_I, num_stages=STAGES):
                    i, _, m_tile, _, b_score = step_scores(
                        p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, held_w, held_s, b_right_1,
                        first_i, step, j, m_j, n_i, n_j, stride_i, stride_j, 0, beta, alpha1, alpha2,
                        RANK_W, RANK_S, UNIT, TRANSPOSED, HELD, BLOCK_I,
                    )  # fmt: skip
                    b_key = unsigned(key_of(b_score))
                    m_tile = m_tile & (b_key >= lower) & (b_key <= upper)  # for indices, one key
                    index = flat_index(i, j, n_i, n_j, tl.int64, TRANSPOSED)
                    b_digit = tl.where(indices, index, b_key - lower) >> shift
                    b_bin = (j % COPIES)[None, :] * RADIX_BINS + b_digit.to(tl.int32)
                    tl.atomic_add(p_layer_bins + b_bin, m_tile.to(tl.int32), mask=m_tile, sem="relaxed")
            if last_of(p_layer, tl.num_programs(0)):
                narrow(p_layer, p_layer_bins, b_state, shift, 24 - 8 * turn, indices, field_of(b_row, CAPACITY))


@triton.jit(do_not_specialize=("layers",))
def group_collect_kernel(
    p_layers, p_state, p_bins, p_key, p_index, layers,
    W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gathers and refines the layers that were searched; their range may be one key and some indices."""
    if not any_waits(p_state, layers, COLLECT):
        return
    for layer in range(layers):
        p_layer = p_state + tl.full([], layer, tl.int64) * SLOTS
        b_state = load_state(p_layer)
        if slot_of(b_state, STATUS) == COLLECT:
            lower, upper = signed(slot_of(b_state, LOWER)), signed(slot_of(b_state, UPPER))
            first, last = slot_of(b_state, FIRST), slot_of(b_state, LAST)
            b_row = load_row(p_layers, layer)
            (
                p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1,
                n_i, n_j, stride_i, stride_j, beta, alpha1, alpha2,
            ) = row_sweep(b_row, W_TYPE, F_TYPE, ALIGNED, TRANSPOSED)  # fmt: skip
            capacity, first_candidate = field_of(b_row, CAPACITY), field_of(b_row, FIRST_CANDIDATE)
            across = tl.cdiv(n_j, BLOCK_J)
            b_below = tl.zeros([BLOCK_J], tl.int32)
            for tile in range(tl.program_id(0), across * tl.cdiv(n_i, RARE_ROWS), tl.num_programs(0)):
                first_i, length, j, m_j = rare_tile(tile, across, n_i, n_j, BLOCK_J, VECTOR)
                held_w, held_s, b_right_1 = hold_rights(
                    p_right_w, p_right_s, p_right_1, j, m_j, n_j, RANK_W, RANK_S, HELD, TRANSPOSED
                )
                for step in tl.range(0, length, BLOCK_I, num_stages=STAGES):
                    i, _, m_tile, _, b_score = step_scores(
                        p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, held_w, held_s, b_right_1,
                        first_i, step, j, m_j, n_i, n_j, stride_i, stride_j, 0, beta, alpha1, alpha2,
                        RANK_W, RANK_S, UNIT, TRANSPOSED, HELD, BLOCK_I,
                    )  # fmt: skip
                    b_below += gather_step(
                        p_layer, p_key + first_candidate, p_index + first_candidate, b_score, i, j, m_tile, n_i, n_j,
                        lower, upper, first, last, capacity, TRANSPOSED, True,
                    )  # fmt: skip
            tl.atomic_add(p_layer + BELOW, tl.sum(b_below, 0).to(tl.int64), sem="relaxed")
            if last_of(p_layer, tl.num_programs(0)):
                p_layer_bins = p_bins + tl.full([], layer, tl.int64) * (COPIES * RADIX_BINS)
                refine_layer(b_row, p_layer, p_layer_bins, p_key + first_candidate, p_index + first_candidate, FEW, FEW)


class Search:
    """Leaves the threshold of every layer in the group's state, and its next guess."""

    def __init__(self, group: Group) -> None:
        layers, usual, rare = len(group.members), group.gather, group.rare
        self.bracket = Launch(group_bracket_kernel, (layers,), **group.bracket_constants)
        self.gather = Launch(group_gather_kernel, usual.grid, **usual.constants)
        registers: dict[str, Any] = targets.platform(group.device).registers_for(REFINING_WARPS)
        self.refine = Launch(group_refine_kernel, (layers,), num_warps=REFINING_WARPS, **registers)
        turns = range(KEY_TURNS.value + 1) if group.can_miss else ()  # else every layer is collected whole
        self.radix = [Launch(group_radix_kernel, rare.grid, (layers, turn), **rare.constants) for turn in turns]
        self.collect = Launch(group_collect_kernel, rare.grid, (layers,), **rare.constants)

    def __call__(self, group: Group) -> None:
        key, index = group.candidates()
        rows, state, bins = group.rows, group.state, group.bins
        self.bracket(rows, state, key)
        self.gather(rows, group.gather.places, state, key, index)
        self.refine(rows, state, bins, key, index)
        for turn in self.radix:
            turn(rows, state, bins)
        if self.radix:
            self.collect(rows, state, bins, key, index)
