"""The exact threshold on the device: the k-th smallest score as (key, flat index), without storing the scores.

Guess, verify, refine, as cpu/select.py does, with everything decided on the device. Where the first range holds the
answer, W is read once:

    bracket           a range of scores that should hold the k-th, from the last threshold or from a sample
    gather            one read of W: count what lies below the range, collect (key, index) of what lies inside
    refine            if the count proves that the k-th is inside and all of it was collected, select among those few
    radix_histogram   else an exact radix search over W narrows the range, 8 bits a pass, until what lies inside can be
                      collected; five passes at most, the last over the indices of equal scores; then gather and refine

Which launches are made depends on the size of the weight alone: the host knows no value. A kernel whose turn it is not
returns at once (STATUS). No kernel waits for another program, and the loops that depend on the data, over the
candidates, go on no longer than there is room for them.

A key is the score as an int32 of the same order: -0.0 as 0.0, NaN above everything. Programs meet only in
integer atomics, and the order in which they collect does not matter, so the result has the same bits in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Factors, Scales
from .score import score_from, updated_from
from .sweep import (  # fmt: skip
    RARE,
    Sweep,
    flat_index,
    hold_rights,
    program_indices,
    step_scores,
    sweep_scores,
    sweep_weight,
)
from .tiles import targets, versions
from .tiles.targets import Platform

# Slots of the state, int64
STATUS = tl.constexpr(0)  # whose turn it is
LOWER = tl.constexpr(1)  # the range of keys, both ends in it
UPPER = tl.constexpr(2)
FIRST = tl.constexpr(3)  # where the range is one key: the range of its indices, both ends in it
LAST = tl.constexpr(4)
BELOW = tl.constexpr(5)  # how many lie below the range
COUNT = tl.constexpr(6)  # how many lie in it
RANK = tl.constexpr(7)  # of the answer among those in the range, from 0: for the radix passes
TICKET = tl.constexpr(8)  # programs that have finished
KEY = tl.constexpr(9)  # the answer
INDEX = tl.constexpr(10)
ROUTE = tl.constexpr(11)  # how the range was found
SLOTS = tl.constexpr(16)

SEARCH, COLLECT, FOUND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # STATUS
GUESS, SAMPLE, EVERYTHING, RADIX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # ROUTE
ROUTES = ("guess", "sample", "everything", "radix")

LARGEST_KEY = tl.constexpr(0xFFFFFFFF)
DIGIT = tl.constexpr(8)
BINS = tl.constexpr(256)
KEY_PASSES = tl.constexpr(4)
SAMPLES = tl.constexpr(8192)
FEW_EQUAL = tl.constexpr(8)  # scores of one key, whose indices are looked for without digits
MANY = tl.constexpr(versions.CANDIDATES_AT_ONCE)  # that a program looks at together which does nothing else
REFINING_WARPS = 16

# Margins either side of a guess, as fractions of all scores. Both sides of the wide one, 5 %, fit the room for
# candidates.
NARROW, WIDE = tl.constexpr(0.001), tl.constexpr(0.025)


def capacity_of(numel: int) -> int:
    """Room for candidates, 6.25 % and some: a bracket from a sample is expected to hold at most 5.6 % of the scores."""
    return numel // 16 + 16384


@triton.jit
def load_state(p_state):
    """All slots by one load; a scalar load a slot would be as many loads of every thread."""
    return tl.load(p_state + tl.arange(0, SLOTS))


@triton.jit
def slot_of(b_state, SLOT: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SLOTS) == SLOT, b_state, 0), 0)


@triton.jit
def key_of(score):
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def score_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def unsigned(key):
    """Keys from 0, for arithmetic on their digits."""
    return key.to(tl.int64) + 2147483648


@triton.jit
def signed(key):
    return (key - 2147483648).to(tl.int32)


@triton.jit
def sample_scores(
    n, p_weight, p_u, p_v, p_a, p_b, p_r, p_c, numel, columns, stride_row, stride_column, beta, alpha1, alpha2,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr,
):  # fmt: skip
    """Scores at the n-th of SAMPLES places, one at random in each of as many equal stretches, the same every time."""
    wide = n.to(tl.int64)
    start = wide * numel // SAMPLES
    length = (wide + 1) * numel // SAMPLES - start
    noise = n.to(tl.uint32) * 2654435761
    noise = (noise ^ (noise >> 15)) * 2246822519
    index = start + (noise ^ (noise >> 13)).to(tl.int64) % length
    if p_u is None:
        b_score = tl.load(p_weight + index)
    else:
        row, column = index // columns, index % columns
        b_uv = tl.zeros([n.shape[0]], tl.float32)
        for k in range(RANK_W):
            b_v = tl.load(p_v + tl.full([], columns, tl.int64) * k + column).to(tl.float32)
            b_uv = tl.fma(tl.load(p_u + row * RANK_W + k).to(tl.float32), b_v, b_uv)
        b_ab = tl.zeros([n.shape[0]], tl.float32)
        for k in range(RANK_S):
            b_b = tl.load(p_b + tl.full([], columns, tl.int64) * k + column).to(tl.float32)
            b_ab = tl.fma(tl.load(p_a + row * RANK_S + k).to(tl.float32), b_b, b_ab)
        b_weight = tl.load(p_weight + row * stride_row + column * stride_column).to(tl.float32)
        b_r, b_c = tl.load(p_r + row).to(tl.float32), tl.load(p_c + column).to(tl.float32)
        b_score = score_from(updated_from(b_weight, b_uv, beta), b_ab, b_r, b_c, alpha1, alpha2)
    return b_score


@triton.jit(do_not_specialize=("numel", "capacity"))
def bracket_kernel(
    p_state, p_guess, p_pruned, p_sample,
    p_weight, p_u, p_v, p_a, p_b, p_r, p_c, numel, columns, stride_row, stride_column, beta, alpha1, alpha2, capacity,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr,
):  # fmt: skip
    """One program. Resets the state and proposes a range of keys."""
    k = tl.load(p_pruned).to(tl.int64)
    fraction = k.to(tl.float32) / tl.full([], numel, tl.int64).to(tl.float32)
    lower = tl.full([], 0, tl.int64)
    upper = tl.full([], LARGEST_KEY, tl.int64)
    route = tl.full([], EVERYTHING, tl.int64)
    if numel > capacity:
        route = tl.full([], SAMPLE, tl.int64)
        if p_guess is not None:
            value, slope = tl.load(p_guess), tl.load(p_guess + 1)
            moved = fraction - tl.load(p_guess + 2)
            centre = value + slope * moved
            half = slope * tl.minimum(tl.load(p_guess + 3) + 0.25 * tl.abs(moved), WIDE)
            if (centre - half <= centre) & (centre <= centre + half):  # false for NaN
                lower = unsigned(key_of(centre - half))
                upper = unsigned(key_of(centre + half))
                route = tl.full([], GUESS, tl.int64)
        if (route == SAMPLE) & (k > 0):
            # The loops over ranks are unrolled: more samples a thread spill on sm_100, from rank 9 on.
            RUN: tl.constexpr = 256 if RANK_W + RANK_S <= 32 else 128
            for start in range(0, SAMPLES, RUN):
                n = start + tl.arange(0, RUN)
                b_score = sample_scores(
                    n, p_weight, p_u, p_v, p_a, p_b, p_r, p_c, numel, columns, stride_row, stride_column,
                    beta, alpha1, alpha2, RANK_W, RANK_S,
                )  # fmt: skip
                tl.store(p_sample + n, key_of(b_score))
            tl.debug_barrier()
            # The rank of the answer in the sample spreads as a binomial at most: five standard deviations either side.
            spread = 5.0 * tl.sqrt(fraction * SAMPLES * (1.0 - fraction)) + 2.0
            low_rank = tl.floor(fraction * SAMPLES - spread).to(tl.int32)
            high_rank = tl.ceil(fraction * SAMPLES + spread).to(tl.int32)
            b_key = tl.load(p_sample + tl.arange(0, SAMPLES))
            upper = tl.full([], 0, tl.int64)
            for bit in range(32):  # the largest key that has at most `rank` keys below it is the one of that rank
                step = tl.full([], 1, tl.int64) << (31 - bit)
                fewer = tl.sum((b_key < signed(lower + step)).to(tl.int32), 0)
                lower = tl.where(fewer <= low_rank, lower + step, lower)
                fewer = tl.sum((b_key < signed(upper + step)).to(tl.int32), 0)
                upper = tl.where(fewer <= high_rank, upper + step, upper)
            lower = tl.where(low_rank < 0, 0, lower)
            upper = tl.where(high_rank >= SAMPLES, LARGEST_KEY, upper)
    slot = tl.arange(0, SLOTS)
    state = tl.where(k > 0, COLLECT, FOUND).to(tl.int64) + tl.zeros([SLOTS], tl.int64)
    state = tl.where(slot == STATUS, state, 0)
    state = tl.where(slot == LOWER, lower, state)
    state = tl.where(slot == UPPER, upper, state)
    state = tl.where(slot == LAST, tl.full([], numel, tl.int64) - 1, state)
    state = tl.where(slot == INDEX, -1, state)  # nothing is pruned up to (0, -1): the answer for k = 0
    state = tl.where(slot == ROUTE, route, state)
    tl.store(p_state + slot, state)


@triton.jit
def gather_step(
    p_state, p_key, p_index, b_score, i, j, m_tile, n_i, n_j, lower, upper, first, last, capacity,
    TRANSPOSED: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """Of one step's tile: collects what lies in the range, returns how many of each j lie below it."""
    b_key = key_of(b_score)
    below = b_key < lower
    inside = m_tile & (b_key >= lower) & (b_key <= upper)
    if TIES:
        index = flat_index(i, j, n_i, n_j, tl.int64, TRANSPOSED)
        below = below | ((b_key == lower) & (index < first))
        inside = inside & (index >= first) & (index <= last)
    # An addition for each: few lie inside, and what threads would have to tell each other first takes longer.
    TYPE: tl.constexpr = p_index.dtype.element_ty  # a weight whose indices are int32 has no more candidates than that
    p_count = (p_state + COUNT).to(tl.pointer_type(TYPE), bitcast=True) + tl.zeros(b_key.shape, tl.int32)
    slot = tl.atomic_add(p_count, tl.full(b_key.shape, 1, TYPE), mask=inside, sem="relaxed")
    m_slot = inside & (slot < capacity)
    tl.store(p_key + slot, b_key, mask=m_slot)
    tl.store(p_index + slot, flat_index(i, j, n_i, n_j, TYPE, TRANSPOSED), mask=m_slot)
    return tl.sum((m_tile & below).to(tl.int32), 0)


@triton.jit(do_not_specialize=("rows_per_program", "numel", "capacity"))
def gather_kernel(
    p_state, p_key, p_index,
    p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1,
    n_i, n_j, stride_i, stride_j, rows_per_program, numel, capacity, beta, alpha1, alpha2,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """Counts what lies below the range, collects what lies inside. TIES: the range may be one key and some indices."""
    b_state = load_state(p_state)
    if slot_of(b_state, STATUS) != COLLECT:
        return
    lower, upper = signed(slot_of(b_state, LOWER)), signed(slot_of(b_state, UPPER))
    first, last = slot_of(b_state, FIRST), slot_of(b_state, LAST)
    first_i, j, m_j = program_indices(n_j, rows_per_program, BLOCK_J, VECTOR)
    held_w, held_s, b_right_1 = hold_rights(
        p_right_w, p_right_s, p_right_1, j, m_j, n_j, RANK_W, RANK_S, HELD, TRANSPOSED
    )
    b_below = tl.zeros([BLOCK_J], tl.int32)
    for step in tl.range(0, rows_per_program, BLOCK_I, num_stages=STAGES):
        i, _, m_tile, _, b_score = step_scores(
            p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, held_w, held_s, b_right_1,
            first_i, step, j, m_j, n_i, n_j, stride_i, stride_j, numel, beta, alpha1, alpha2,
            RANK_W, RANK_S, UNIT, TRANSPOSED, HELD, BLOCK_I,
        )  # fmt: skip
        b_below += gather_step(
            p_state, p_key, p_index, b_score, i, j, m_tile, n_i, n_j, lower, upper, first, last, capacity,
            TRANSPOSED, TIES,
        )  # fmt: skip
    tl.atomic_add(p_state + BELOW, tl.sum(b_below, 0).to(tl.int64), sem="relaxed")


@triton.jit
def bin_of_rank(b_bins, rank):
    """The bin that holds the element of this rank, and the rank in it."""
    b_through = tl.cumsum(b_bins, 0)
    place = tl.sum((b_through <= rank).to(tl.int32), 0)
    return place.to(tl.int64), rank - tl.sum(tl.where(tl.arange(0, b_bins.shape[0]) < place, b_bins, 0), 0)


@triton.jit(do_not_specialize=("numel", "capacity", "index_bits"))
def refine_kernel(
    p_state, p_bins, p_key, p_index, p_guess, p_pruned, numel, capacity, index_bits, UPDATE: tl.constexpr
):
    """One program."""
    b_state = load_state(p_state)
    if slot_of(b_state, STATUS) != COLLECT:
        return
    refine(
        p_state, p_bins, p_key, p_index, p_guess, p_pruned, b_state, numel, capacity, index_bits, UPDATE, BINS, 0, MANY
    )


@triton.jit
def refine(
    p_state, p_bins, p_key, p_index, p_guess, p_pruned, b_state, numel, capacity, index_bits,
    UPDATE: tl.constexpr, RADIX_BINS: tl.constexpr, HELD_CANDIDATES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Selects among the candidates if the answer is proven to be one of them, else asks for a search."""
    k = tl.load(p_pruned).to(tl.int64)
    count = slot_of(b_state, COUNT)
    rank = k - slot_of(b_state, BELOW) - 1
    one = tl.full([], 1, tl.int64)
    if (rank < 0) | (rank >= count) | (count > capacity):
        tl.store(p_state + RANK, k - 1)
        tl.store(p_state + LOWER, one - 1)
        tl.store(p_state + UPPER, one - 1 + LARGEST_KEY)
        tl.store(p_state + ROUTE, one - 1 + RADIX)
        tl.store(p_state + STATUS, one - 1 + SEARCH)
        tl.store(p_bins + tl.arange(0, RADIX_BINS), tl.zeros([RADIX_BINS], tl.int32))
    else:
        lower, upper = slot_of(b_state, LOWER), slot_of(b_state, UPPER)
        key, index = candidate_of_rank(p_key, p_index, rank, count, lower, upper, index_bits, HELD_CANDIDATES, AT_ONCE)
        if UPDATE:
            update_guess(p_guess, b_state, key, count, k, numel)
        tl.store(p_state + KEY, key)
        tl.store(p_state + INDEX, index)
        tl.store(p_state + STATUS, one - 1 + FOUND)


@triton.jit
def candidate_of_rank(
    p_key, p_index, rank, count, lower, upper, index_bits, HELD: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """The candidate, (key, index), that has `rank` smaller ones; all keys are in the range. Up to HELD are held in
    registers, of more AT_ONCE are looked at together: a single program waits for each load.
    """
    if HELD == 0:
        key, index = candidate_by_digits(p_key, p_index, rank, count, lower, upper, index_bits, AT_ONCE)
    else:
        if count <= HELD:
            key, index = candidate_by_bits(p_key, p_index, rank, count, index_bits, HELD)
        else:
            key, index = candidate_by_digits(p_key, p_index, rank, count, lower, upper, index_bits, AT_ONCE)
    return key, index


@triton.jit
def candidate_by_bits(p_key, p_index, rank, count, index_bits, HELD: tl.constexpr):
    one = tl.full([], 1, tl.int64)
    key = tl.full([], 0, tl.int64)
    index = tl.full([], 0, tl.int64)
    n = tl.arange(0, HELD)
    m_n = n < count
    b_key = tl.load(p_key + n, mask=m_n, other=0)
    b_index = tl.load(p_index + n, mask=m_n, other=0).to(tl.int64)
    for bit in range(32):
        step = one << (31 - bit)
        fewer = tl.sum((m_n & (b_key < signed(key + step))).to(tl.int32), 0)
        key = tl.where(fewer <= rank, key + step, key)
    rank -= tl.sum((m_n & (b_key < signed(key))).to(tl.int32), 0)
    m_n = m_n & (b_key == signed(key))
    for bit in range(index_bits):
        step = one << (index_bits - 1 - bit)
        fewer = tl.sum((m_n & (b_index < index + step)).to(tl.int32), 0)
        index = tl.where(fewer <= rank, index + step, index)
    return key, index


@triton.jit
def candidate_by_digits(p_key, p_index, rank, count, lower, upper, index_bits, AT_ONCE: tl.constexpr):
    """By the digits of what a key is above the range's lower end: no more of them than the range has."""
    start = signed(lower)
    width = upper - lower
    passes = 1 + (width > 0xFF).to(tl.int32) + (width > 0xFFFF).to(tl.int32) + (width > 0xFFFFFF).to(tl.int32)
    above = tl.full([], 0, tl.uint32)
    equal = tl.full([], 0, tl.int32)
    for digit in range(passes):
        shift = DIGIT * (passes - 1 - digit)
        b_bins = tl.zeros([BINS], tl.int32)
        for first in range(0, count.to(tl.int32), AT_ONCE):
            n = first + tl.arange(0, AT_ONCE)
            m_n = n < count
            b_above = (tl.load(p_key + n, mask=m_n, other=0) - start).to(tl.uint32, bitcast=True) >> shift
            m_n = m_n & ((b_above >> DIGIT) == above)
            b_bins += tl.histogram((b_above & (BINS - 1)).to(tl.int32), BINS, mask=m_n)
        place, rank = bin_of_rank(b_bins, rank)
        equal = tl.sum(tl.where(tl.arange(0, BINS) == place, b_bins, 0), 0)
        above = (above << DIGIT) | place.to(tl.uint32)
    key = lower + above.to(tl.int64)
    index = tl.full([], 0, tl.int64)
    if equal <= FEW_EQUAL:  # as nearly always: their indices one after another, from the smallest
        TYPE: tl.constexpr = p_index.dtype.element_ty
        LARGEST: tl.constexpr = 0x7FFFFFFF if tl.int32 == TYPE else 0x7FFFFFFFFFFFFFFF
        last = tl.full([], -1, TYPE)
        for _ in range((rank + 1).to(tl.int32)):
            b_next = tl.full([AT_ONCE], LARGEST, TYPE)
            for first in range(0, count.to(tl.int32), AT_ONCE):
                n = first + tl.arange(0, AT_ONCE)
                m_n = n < count
                m_n = m_n & (tl.load(p_key + n, mask=m_n, other=0) == signed(key))
                b_index = tl.load(p_index + n, mask=m_n, other=LARGEST)
                b_next = tl.where(b_index > last, tl.minimum(b_next, b_index), b_next)
            last = tl.min(b_next, 0)
        index = last.to(tl.int64)
    else:
        turns = (index_bits + DIGIT - 1) // DIGIT
        for digit in range(turns):
            shift_index = DIGIT * (turns - 1 - digit)
            b_bins = tl.zeros([BINS], tl.int32)
            for first in range(0, count.to(tl.int32), AT_ONCE // 4):
                n = first + tl.arange(0, AT_ONCE // 4)
                m_n = n < count
                b_key = tl.load(p_key + n, mask=m_n, other=0)
                b_index = tl.load(p_index + n, mask=m_n, other=0).to(tl.int64) >> shift_index
                m_n = m_n & (b_key == signed(key)) & ((b_index >> DIGIT) == index)
                b_bins += tl.histogram((b_index & (BINS - 1)).to(tl.int32), BINS, mask=m_n)
            place, rank = bin_of_rank(b_bins, rank)
            index = (index << DIGIT) | place
    return key, index


@triton.jit
def update_guess(p_guess, b_state, key, count, k, numel):
    """The next guess; its slope is that of the range, its margin twice what this guess was off by."""
    value = score_of(signed(key))
    size = tl.full([], numel, tl.int64).to(tl.float32)
    fraction = k.to(tl.float32) / size
    width = score_of(signed(slot_of(b_state, UPPER))) - score_of(signed(slot_of(b_state, LOWER)))
    slope = width * (size / count.to(tl.float32))
    slope = tl.where((slope >= 0.0) & (slope < float("inf")), slope, 0.0)
    last = tl.load(p_guess) + tl.load(p_guess + 1) * (fraction - tl.load(p_guess + 2))
    margin = 2.0 * tl.abs(value - last) / slope
    margin = tl.where(margin > NARROW, margin, NARROW)
    margin = tl.where((last == last) & (slope > 0.0) & (margin < WIDE), margin, WIDE)
    tl.store(p_guess, value)
    tl.store(p_guess + 1, slope)
    tl.store(p_guess + 2, fraction)
    tl.store(p_guess + 3, margin)


@triton.jit(do_not_specialize=("rows_per_program", "numel", "capacity", "shift", "indices"))
def radix_histogram_kernel(
    p_state, p_bins,
    p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1,
    n_i, n_j, stride_i, stride_j, rows_per_program, numel, capacity, beta, alpha1, alpha2, shift, indices,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Counts the range's scores by the next 8 bits of their keys, or of the `indices` of one key; narrows the range."""
    if tl.load(p_state + STATUS) != SEARCH:
        return
    lower = tl.load(p_state + LOWER)
    first_i, j, m_j = program_indices(n_j, rows_per_program, BLOCK_J, VECTOR)
    held_w, held_s, b_right_1 = hold_rights(
        p_right_w, p_right_s, p_right_1, j, m_j, n_j, RANK_W, RANK_S, HELD, TRANSPOSED
    )
    b_bins = tl.zeros([BINS], tl.int32)
    for step in tl.range(0, rows_per_program, BLOCK_I, num_stages=STAGES):
        i, _, m_tile, _, b_score = step_scores(
            p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, held_w, held_s, b_right_1,
            first_i, step, j, m_j, n_i, n_j, stride_i, stride_j, numel, beta, alpha1, alpha2,
            RANK_W, RANK_S, UNIT, TRANSPOSED, HELD, BLOCK_I,
        )  # fmt: skip
        index = flat_index(i, j, n_i, n_j, tl.int64, TRANSPOSED)
        # The range is aligned, so its keys share all higher bits; for `indices` it is one key.
        b_offset = unsigned(key_of(b_score)) - lower
        m_tile = m_tile & ((b_offset == 0) | (indices == 0))
        b_digit = tl.where(indices != 0, index, b_offset) >> shift
        m_tile = m_tile & (b_digit >= 0) & (b_digit < BINS)
        b_digit = tl.reshape(tl.where(m_tile, b_digit, 0).to(tl.int32), [BLOCK_I * BLOCK_J])
        b_bins += tl.histogram(b_digit, BINS, mask=tl.reshape(m_tile, [BLOCK_I * BLOCK_J]))
    bins = tl.arange(0, BINS)
    tl.atomic_add(p_bins + bins, b_bins, mask=b_bins > 0)
    tl.debug_barrier()
    if tl.atomic_add(p_state + TICKET, tl.full([], 1, tl.int64), sem="acq_rel") == tl.num_programs(0) - 1:
        # Read where the atomics were, and reset. Not an exchange: AMD has none in its buffer instructions.
        b_bins = tl.atomic_and(p_bins + bins, tl.zeros([BINS], tl.int32))
        place, rank = bin_of_rank(b_bins, tl.load(p_state + RANK))
        inside = tl.sum(tl.where(bins == place, b_bins, 0), 0)
        one = tl.full([], 1, tl.int64)
        if indices != 0:
            tl.store(p_state + FIRST, place << shift)
            tl.store(p_state + LAST, ((place + 1) << shift) - 1)
        else:
            tl.store(p_state + LOWER, lower + (place << shift))
            tl.store(p_state + UPPER, lower + ((place + 1) << shift) - 1)
        tl.store(p_state + RANK, rank)
        tl.store(p_state + TICKET, one - 1)
        tl.store(p_state + COUNT, one - 1)
        tl.store(p_state + BELOW, one - 1)
        if (indices != 0) | (inside <= capacity):
            tl.store(p_state + STATUS, one - 1 + COLLECT)


def search(
    sweeps: tuple[Sweep, Sweep], sampled: tuple[Tensor | None, ...], num_pruned: Tensor, guess: Tensor | None,
    scales: Scales, platform: Platform,
) -> Tensor:  # fmt: skip
    """Run the search: the usual sweep and the rare one, and what a sample is taken from, (weight, U, V, A, B, R, C).

    Returns the state, whose KEY and INDEX are the answer.
    """
    usual, rare = sweeps
    weight = usual.operands[0]
    numel = weight.numel()
    capacity, index_bits = capacity_of(numel), max(1, (numel - 1).bit_length())
    state = weight.new_empty(SLOTS.value, dtype=torch.int64)
    bins = weight.new_empty(BINS.value, dtype=torch.int32)
    key = weight.new_empty(capacity, dtype=torch.int32)
    index = weight.new_empty(capacity, dtype=torch.int32 if numel < 2**31 else torch.int64)
    columns, strides = (weight.shape[1], weight.stride()) if weight.dim() == 2 else (numel, (numel, 1))
    registers = platform.all_registers
    bracket_kernel[(1,)](
        state, guess, num_pruned, key, *sampled, numel, columns, *strides, *scales, capacity,
        RANK_W=usual.constants["RANK_W"], RANK_S=usual.constants["RANK_S"], num_warps=4, **registers,
    )  # fmt: skip

    def collect(sweep: Sweep, ties: bool) -> None:
        gather_kernel[sweep.grid](
            state, key, index, *sweep.operands, *sweep.shape, numel, capacity, *scales, **sweep.constants, TIES=ties
        )
        refine_kernel[(1,)](
            state, bins, key, index, guess, num_pruned, numel, capacity, index_bits,
            UPDATE=guess is not None, num_warps=REFINING_WARPS, **platform.registers_for(REFINING_WARPS),
        )  # fmt: skip

    collect(usual, ties=False)
    if numel > capacity:  # else everything was collected, which cannot miss
        for digit in range(KEY_PASSES.value + 1):
            indices = digit == KEY_PASSES.value
            shift = max(0, index_bits - DIGIT.value) if indices else 32 - DIGIT.value * (digit + 1)
            radix_histogram_kernel[rare.grid](
                state, bins, *rare.operands, *rare.shape, numel, capacity, *scales, shift, int(indices),
                **rare.constants,
            )  # fmt: skip
        collect(rare, ties=True)
    return state


def route(state: Tensor) -> str:
    """Which way the range of a search was found; waits for the device."""
    return ROUTES[int(state[ROUTE.value])]


def threshold(weight: Tensor, factors: Factors, scales: Scales, num_pruned: Tensor, guess: Tensor) -> Tensor:
    """The state whose KEY and INDEX are the num_pruned-th smallest score; updates `guess`. Factors as of `checked`."""
    platform = targets.platform(weight.device)
    sweeps = sweep_weight(weight, factors, platform), sweep_weight(weight, factors, platform, RARE)
    return search(sweeps, (weight, *factors), num_pruned, guess, scales, platform)


def kth_value(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest score, from 1, and its flat index, by (score, index); NaN is the largest."""
    flat, platform = scores.reshape(-1), targets.platform(scores.device)
    rank = torch.full((), k, dtype=torch.int64, device=scores.device)
    sweeps = sweep_scores(flat, platform), sweep_scores(flat, platform, RARE)
    state = search(sweeps, (flat, *[None] * 6), rank, None, Scales(), platform)
    index = state[INDEX.value].clone()
    return flat.take(index), index  # indexing by a tensor would wait for the device
