"""The compiled passes. Each takes one frame, the addresses and numbers that it needs, and works until no share is left.

A share is `share_rows` rows of W from `first` on. What a share finds or sums up goes into places of its own.
"""

from __future__ import annotations

import numba
import numpy as np

from pst_kernels.masks.packing import PAIRS, WORD

from . import row_loops as rows
from .jit import part, whole_pass
from .threads import pointer_to, take_share

_ADDRESSES = (
    "weight", "U", "V", "A", "B", "R", "C", "packed", "masked", "scores", "below", "found", "candidates", "places",
    "gradient", "dU", "dA", "dR", "partial",
)  # fmt: skip
_NUMBERS = (
    "next", "shares", "share_rows", "first", "last", "out", "columns", "update_rank", "score_rank", "capacity",
    "weight_is_bf16", "masked_is_bf16", "gradient_is_bf16", "through_magnitude",
)  # fmt: skip
# Sizes count elements; an address of 0 is a tensor that this call has no use for.
FRAME = np.dtype(
    [(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)] + [("lower", np.float32), ("upper", np.float32)]
)
ROOM = 8  # flags looked at together: places behind the last candidate that are written to before it is known if one is


@part
def _floats(address, height, width):
    return numba.carray(pointer_to(address), (height, width), np.float32)


@part
def _halves(address, height, width):
    return numba.carray(pointer_to(address), (height, width), np.uint16)


@part
def _words(address, height, width):
    return numba.carray(pointer_to(address), (height, width), np.uint32)


@part
def _integers(address, size):
    return numba.carray(pointer_to(address), (size,), np.int64)


@part
def _frame(address):
    return numba.carray(pointer_to(address), (1,), FRAME)[0]


@part
def _next_rows(address, f):
    """The next share, its first row, and the row behind its last; no rows where no share is left."""
    share = take_share(address)  # the frame's first number
    start = min(f.first + share * f.share_rows, f.last)
    return share, start, min(start + f.share_rows, f.last)


@part
def _width(f):
    """Words of a packed row."""
    return (f.columns + WORD - 1) // WORD


@part
def _flag_buffer(f):
    """A byte for each bit of a packed row; those of its padding stay 0."""
    return np.zeros(_width(f) * WORD, np.uint8)


@part
def _pair_buffer(f):
    return np.empty((2, f.columns), np.float32)


@part
def _update(f, i, i2, out):
    """out (2, columns) = W' of two rows, which may be the same."""
    weight, bits = _floats(f.weight, f.out, f.columns), _halves(f.weight, f.out, f.columns)
    U, V = _floats(f.U, f.out, f.update_rank), _floats(f.V, f.update_rank, f.columns)
    if f.weight_is_bf16 != 0:
        rows.widen(bits[i], out[0])
        rows.widen(bits[i2], out[1])
    else:
        rows.copy(weight[i], out[0])
        rows.copy(weight[i2], out[1])
    rows.add_products(U[i], U[i2], V, out[0], out[1])


@part
def _score(f, i, i2, updated, out, out2):
    """The scores of two rows, from their W'."""
    A, B = _floats(f.A, f.out, f.score_rank), _floats(f.B, f.score_rank, f.columns)
    R, C = _floats(f.R, 1, f.out)[0], _floats(f.C, 1, f.columns)[0]
    rows.start_score(updated[0], R[i], C, out)
    rows.start_score(updated[1], R[i2], C, out2)
    rows.add_products(A[i], A[i2], B, out, out2)


@part
def _store_masked(f, i, flags, updated, work):
    """Row i of M * W'."""
    floats, halves = _floats(f.masked, f.out, f.columns), _halves(f.masked, f.out, f.columns)
    rows.store_masked(flags, updated, work, floats[i], halves[i], f.masked_is_bf16 != 0)


@whole_pass
def scores(address):
    """S, fp32 (out, columns)."""
    f = _frame(address)
    updated, spare, out = _pair_buffer(f), np.empty(f.columns, np.float32), _floats(f.scores, f.out, f.columns)
    while True:
        _, start, stop = _next_rows(address, f)
        if start == stop:
            return
        for i in range(start, stop, 2):
            i2 = min(i + 1, stop - 1)  # the last row may have to be its own partner
            _update(f, i, i2, updated)
            _score(f, i, i2, updated, out[i], out[i2] if i2 != i else spare)


@whole_pass
def masked_weight(address):
    """M * W' from the packed mask."""
    f = _frame(address)
    updated, work, flags = _pair_buffer(f), np.empty(f.columns, np.float32), _flag_buffer(f)
    packed = _words(f.packed, f.out, _width(f))
    while True:
        _, start, stop = _next_rows(address, f)
        if start == stop:
            return
        for pair in range(start, stop, 2):
            _update(f, pair, min(pair + 1, stop - 1), updated)
            for i in range(pair, min(pair + 2, stop)):
                rows.unpack(packed[i], flags)
                _store_masked(f, i, flags, updated[i - pair], work)


@part
def _gather(f, i, share, found, scored, flags):
    """Row i's scores inside the bracket behind the `found` earlier ones of its share; what does not fit is counted."""
    candidates, places = _floats(f.candidates, f.shares, f.capacity)[share], _integers(f.places, f.shares * f.capacity)
    first = share * f.capacity
    eights = flags.view(np.uint64)
    for e in range(eights.size):
        if eights[e] != 0:
            stop = min(ROOM * (e + 1), f.columns)
            if found + ROOM <= f.capacity:
                for j in range(
                    ROOM * e, stop
                ):  # writes every score, and keeps its place if it is one: without a branch
                    candidates[found] = scored[j]
                    places[first + found] = i * f.columns + j
                    found += flags[j]
            else:
                for j in range(ROOM * e, stop):
                    found += flags[j]
    return found


@whole_pass
def prune(address):
    """The packed mask and, where it is wanted, M * W', as if all scores from `lower` on were kept.

    For each share: how many lie below the bracket [lower, upper], how many inside it, and these with their flat index,
    unless that many and ROOM more do not fit.
    """
    f = _frame(address)
    updated, scored, work = _pair_buffer(f), _pair_buffer(f), np.empty(f.columns, np.float32)
    kept, inside = _flag_buffer(f), _flag_buffer(f)
    packed = _words(f.packed, f.out, _width(f))
    below_of, found_of = _integers(f.below, f.shares), _integers(f.found, f.shares)
    while True:
        share, start, stop = _next_rows(address, f)
        if start == stop:
            return
        below, found = 0, 0
        for pair in range(start, stop, 2):
            _update(f, pair, min(pair + 1, stop - 1), updated)
            _score(f, pair, min(pair + 1, stop - 1), updated, scored[0], scored[1])
            for i in range(pair, min(pair + 2, stop)):
                row = scored[i - pair]
                rows.keep_from(row, f.lower, kept)
                below += f.columns - rows.count(kept)
                rows.inside(row, f.lower, f.upper, inside)
                found = _gather(f, i, share, found, row, inside)
                rows.pack(kept, packed[i])
                if f.masked != 0:
                    _store_masked(f, i, kept, updated[i - pair], work)
        below_of[share], found_of[share] = below, found


@whole_pass
def gradients(address):
    """From rows of G: dU, dA and dR of these rows, each share's part of dV, dB and dC, and rows of M * W' for dx.

    With D = G * W' and Q = G * (M + |W'|): dU = Q V^T, dA = D B^T, dR = the sum of D along its rows; and down its
    columns, U^T Q, A^T D and the sum of D, which are added to a share's (2 r + 1, columns) of `partial` in this order.
    """
    f = _frame(address)
    updated, work, G = _pair_buffer(f), np.empty(f.columns, np.float32), np.empty(f.columns, np.float32)
    D, Q = np.empty((rows.GROUP, f.columns), np.float32), np.empty((rows.GROUP, f.columns), np.float32)
    left_U = np.empty((rows.GROUP, f.update_rank), np.float32)
    left_A = np.empty((rows.GROUP, f.score_rank), np.float32)
    spare = np.empty(max(f.update_rank, f.score_rank), np.float32)
    flags = _flag_buffer(f)
    packed = _words(f.packed, f.out, _width(f))
    gradient = _floats(f.gradient, f.last - f.first, f.columns)
    gradient_bits = _halves(f.gradient, f.last - f.first, f.columns)
    U, V = _floats(f.U, f.out, f.update_rank), _floats(f.V, f.update_rank, f.columns)
    A, B = _floats(f.A, f.out, f.score_rank), _floats(f.B, f.score_rank, f.columns)
    dU, dA, dR = _floats(f.dU, f.out, f.update_rank), _floats(f.dA, f.out, f.score_rank), _floats(f.dR, 1, f.out)[0]
    parts = f.update_rank + f.score_rank + 1
    partial = _floats(f.partial, f.shares * parts, f.columns)
    while True:
        share, start, stop = _next_rows(address, f)
        if start == stop:
            return
        sums = partial[share * parts : (share + 1) * parts]
        for group in range(start, stop, rows.GROUP):
            for pair in range(group, group + rows.GROUP, 2):
                for i in range(max(pair, stop), pair + 2):  # rows of zeros fill up the last group
                    D[i - group], Q[i - group], left_U[i - group], left_A[i - group] = 0.0, 0.0, 0.0, 0.0
                if pair >= stop:
                    continue
                _update(f, pair, min(pair + 1, stop - 1), updated)
                for i in range(pair, min(pair + 2, stop)):
                    q, row = i - group, updated[i - pair]
                    rows.unpack(packed[i], flags)
                    if f.masked != 0:
                        _store_masked(f, i, flags, row, work)
                    if f.gradient_is_bf16 != 0:
                        rows.widen(gradient_bits[i - f.first], G)
                    else:
                        rows.copy(gradient[i - f.first], G)
                    rows.multiply(G, row, D[q])
                    rows.multiply_through(G, flags, row, f.through_magnitude != 0, Q[q])
                    dR[i] = rows.total(D[q])
                    rows.copy(U[i], left_U[q])
                    rows.copy(A[i], left_A[q])
                q, alone = pair - group, pair + 1 == stop
                rows.dots(Q[q], Q[q + 1], V, dU[pair], spare if alone else dU[pair + 1])
                rows.dots(D[q], D[q + 1], B, dA[pair], spare if alone else dA[pair + 1])
            rows.add_outer(left_U, Q, sums[: f.update_rank])
            rows.add_outer(left_A, D, sums[f.update_rank : f.update_rank + f.score_rank])
            rows.add_rows(D, sums[parts - 1])


@part
def _drop_one(place, packed, columns, masked, masked_bits):
    i, j = place // columns, place % columns
    bit = np.uint32(j % WORD // 2 + PAIRS * (j % 2))
    packed[i, j // WORD] &= ~(np.uint32(1) << bit)
    if masked.size:
        masked[place] = 0.0
    if masked_bits.size:
        masked_bits[place] = 0


@part
def drop(places, packed, columns, masked, masked_bits):
    """Clear the bits of weights at flat indices, and their places in M * W', fp32 and bf16, empty if there is none."""
    for p in range(places.size):
        _drop_one(places[p], packed, columns, masked, masked_bits)


@part
def drop_first(scores, places, value, count, packed, columns, masked, masked_bits):
    """`drop` the first `count` candidates by (score, index), the last of which has this value; returns its index."""
    smaller = 0
    for p in range(scores.size):
        smaller += scores[p] < value
    ties, last = count - smaller, np.int64(-1)
    for p in range(scores.size):
        if scores[p] <= value:
            if scores[p] == value:
                if ties == 0:
                    continue
                ties -= 1
                last = places[p]
            _drop_one(places[p], packed, columns, masked, masked_bits)
    return last
