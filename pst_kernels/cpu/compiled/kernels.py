"""The compiled passes. Each takes the address of its arguments, one record, and works until no task is left.

A task is `rows_per_task` rows of W, counted from `first` on. What a task finds or sums up has memory of its own.
"""

from __future__ import annotations

import numba
import numpy as np

from pst_kernels.masks.packing import PAIRS, WORD

from . import row_loops
from .jit import part, whole_pass
from .threads import pointer_to, take_task
from .views import record_of

_ADDRESSES = (
    "weight", "U", "V", "A", "B", "R", "C", "packed", "masked", "scores", "below", "found", "candidate_scores",
    "candidate_indices", "gradient", "dU", "dA", "dR", "partial", "p", "q", "of_rows",
)  # fmt: skip
_NUMBERS = (
    "next", "tasks", "rows_per_task", "first", "last", "out", "columns", "weight_rank", "score_rank", "capacity",
    "weight_is_bf16", "masked_is_bf16", "gradient_is_bf16", "through_magnitude",
)  # fmt: skip
# Sizes count elements; an address of 0 is a tensor that this call has no use for.
ARGUMENTS = np.dtype(
    [(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)] + [("lower", np.float32), ("upper", np.float32)]
)
_arguments = record_of("record_of_kernels", ARGUMENTS)


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
def _next_rows(address, args):
    """The next task, its first row, and the row behind its last; no rows where no task is left."""
    task = take_task(address)  # `next`, the first number of the record
    start = min(args.first + task * args.rows_per_task, args.last)
    return task, start, min(start + args.rows_per_task, args.last)


@part
def _width(args):
    """Words of a packed row."""
    return (args.columns + WORD - 1) // WORD


@part
def _flag_buffer(args):
    """A byte for each bit of a packed row; those of its padding stay 0."""
    return np.zeros(_width(args) * WORD, np.uint8)


@part
def _pair_buffer(args):
    return np.empty((2, args.columns), np.float32)


@part
def _update(args, i, i2, out):
    """out (2, columns) = W' of two rows, which may be the same."""
    weight, bits = _floats(args.weight, args.out, args.columns), _halves(args.weight, args.out, args.columns)
    U, V = _floats(args.U, args.out, args.weight_rank), _floats(args.V, args.weight_rank, args.columns)
    if args.weight_is_bf16 != 0:
        row_loops.widen(bits[i], out[0])
        row_loops.widen(bits[i2], out[1])
    else:
        row_loops.copy(weight[i], out[0])
        row_loops.copy(weight[i2], out[1])
    row_loops.add_products(U[i], U[i2], V, out[0], out[1])


@part
def _score(args, i, i2, updated, out, out2):
    """The scores of two rows, from their W'."""
    A, B = _floats(args.A, args.out, args.score_rank), _floats(args.B, args.score_rank, args.columns)
    R, C = _floats(args.R, 1, args.out)[0], _floats(args.C, 1, args.columns)[0]
    row_loops.start_score(updated[0], R[i], C, out)
    row_loops.start_score(updated[1], R[i2], C, out2)
    row_loops.add_products(A[i], A[i2], B, out, out2)


@part
def _store_masked(args, i, flags, updated, work):
    """Row i of M * W'."""
    floats, halves = _floats(args.masked, args.out, args.columns), _halves(args.masked, args.out, args.columns)
    row_loops.store_masked(flags, updated, work, floats[i], halves[i], args.masked_is_bf16 != 0)


@whole_pass
def scores(address):
    """S, fp32 (out, columns)."""
    args = _arguments(address)
    updated, spare = _pair_buffer(args), np.empty(args.columns, np.float32)
    out = _floats(args.scores, args.out, args.columns)
    while True:
        _, start, stop = _next_rows(address, args)
        if start == stop:
            return
        for i in range(start, stop, 2):
            i2 = min(i + 1, stop - 1)  # the last row may have to be its own partner
            _update(args, i, i2, updated)
            _score(args, i, i2, updated, out[i], out[i2] if i2 != i else spare)


@whole_pass
def masked_weight(address):
    """M * W' from the packed mask."""
    args = _arguments(address)
    updated, work, flags = _pair_buffer(args), np.empty(args.columns, np.float32), _flag_buffer(args)
    packed = _words(args.packed, args.out, _width(args))
    while True:
        _, start, stop = _next_rows(address, args)
        if start == stop:
            return
        for pair in range(start, stop, 2):
            _update(args, pair, min(pair + 1, stop - 1), updated)
            for i in range(pair, min(pair + 2, stop)):
                row_loops.unpack(packed[i], flags)
                _store_masked(args, i, flags, updated[i - pair], work)


@whole_pass
def prune(address):
    """The packed mask and, where it is wanted, M * W', as if all scores from `lower` on were kept.

    For each task: how many lie below the bracket [lower, upper], how many inside it, and these with their flat index,
    unless that many and row_loops.SLACK more do not fit.
    """
    args = _arguments(address)
    updated, scored, work = _pair_buffer(args), _pair_buffer(args), np.empty(args.columns, np.float32)
    kept, inside = _flag_buffer(args), _flag_buffer(args)
    packed = _words(args.packed, args.out, _width(args))
    below_of, found_of = _integers(args.below, args.tasks), _integers(args.found, args.tasks)
    while True:
        task, start, stop = _next_rows(address, args)
        if start == stop:
            return
        below, found, room = 0, 0, task * args.capacity
        scores = _floats(args.candidate_scores, args.tasks, args.capacity)[task]
        indices = _integers(args.candidate_indices, args.tasks * args.capacity)[room : room + args.capacity]
        for pair in range(start, stop, 2):
            _update(args, pair, min(pair + 1, stop - 1), updated)
            _score(args, pair, min(pair + 1, stop - 1), updated, scored[0], scored[1])
            for i in range(pair, min(pair + 2, stop)):
                row = scored[i - pair]
                row_loops.keep_from(row, args.lower, kept)
                below += args.columns - row_loops.count(kept)
                row_loops.inside(row, args.lower, args.upper, inside)
                found = row_loops.collect(row, inside, i * args.columns, found, scores, indices)
                row_loops.pack(kept, packed[i])
                if args.masked != 0:
                    _store_masked(args, i, kept, updated[i - pair], work)
        below_of[task], found_of[task] = below, found


@whole_pass
def gradients(address):
    """From rows of G: dU, dA and dR of these rows, each task's part of dV, dB and dC, and rows of M * W' for dx.

    With D = G * W' and Q = G * (M + |W'|): dU = Q V^T, dA = D B^T, dR = the sum of D along its rows. Down the columns,
    U^T Q, A^T D and the sum of D are added, in this order, to a task's (weight_rank + score_rank + 1, columns) of
    `partial`. Without `through_magnitude`, Q = G * M.

    With `q`, Q = G * (M + p |W'| q), the sums of G^2 along rows are stored, and those down the columns added to one
    more row of `partial`.
    """
    args = _arguments(address)
    updated, work, G = _pair_buffer(args), np.empty(args.columns, np.float32), np.empty(args.columns, np.float32)
    D, Q = np.empty((row_loops.GROUP, args.columns), np.float32), np.empty((row_loops.GROUP, args.columns), np.float32)
    left_U = np.empty((row_loops.GROUP, args.weight_rank), np.float32)
    left_A = np.empty((row_loops.GROUP, args.score_rank), np.float32)
    spare = np.empty(max(args.weight_rank, args.score_rank), np.float32)
    flags = _flag_buffer(args)
    packed = _words(args.packed, args.out, _width(args))
    gradient = _floats(args.gradient, args.last - args.first, args.columns)
    gradient_bits = _halves(args.gradient, args.last - args.first, args.columns)
    U, V = _floats(args.U, args.out, args.weight_rank), _floats(args.V, args.weight_rank, args.columns)
    A, B = _floats(args.A, args.out, args.score_rank), _floats(args.B, args.score_rank, args.columns)
    dU, dA = _floats(args.dU, args.out, args.weight_rank), _floats(args.dA, args.out, args.score_rank)
    dR = _floats(args.dR, 1, args.out)[0]
    sum_of_D, weighs = args.weight_rank + args.score_rank, args.q != 0
    parts = sum_of_D + 1 + weighs
    partial = _floats(args.partial, args.tasks * parts, args.columns)
    p, of_rows = _floats(args.p, 1, args.out)[0], _floats(args.of_rows, 1, args.out)[0]
    across, weighed = _floats(args.q, 1, args.columns)[0], np.empty(args.columns, np.float32)
    while True:
        task, start, stop = _next_rows(address, args)
        if start == stop:
            return
        sums = partial[task * parts : (task + 1) * parts]
        for group in range(start, stop, row_loops.GROUP):
            for pair in range(group, group + row_loops.GROUP, 2):
                for i in range(max(pair, stop), pair + 2):  # rows of zeros fill up the last group
                    D[i - group], Q[i - group], left_U[i - group], left_A[i - group] = 0.0, 0.0, 0.0, 0.0
                if pair >= stop:
                    continue
                _update(args, pair, min(pair + 1, stop - 1), updated)
                for i in range(pair, min(pair + 2, stop)):
                    q, row = i - group, updated[i - pair]
                    row_loops.unpack(packed[i], flags)
                    if args.masked != 0:
                        _store_masked(args, i, flags, row, work)
                    if args.gradient_is_bf16 != 0:
                        row_loops.widen(gradient_bits[i - args.first], G)
                    else:
                        row_loops.copy(gradient[i - args.first], G)
                    row_loops.multiply(G, row, D[q])
                    if weighs:
                        of_rows[i] = row_loops.add_squares(G, sums[sum_of_D + 1])
                        row_loops.weigh(row, p[i], across, weighed)
                        row = weighed
                    row_loops.multiply_through(G, flags, row, args.through_magnitude != 0, Q[q])
                    dR[i] = row_loops.total(D[q])
                    row_loops.copy(U[i], left_U[q])
                    row_loops.copy(A[i], left_A[q])
                q, alone = pair - group, pair + 1 == stop
                row_loops.dots(Q[q], Q[q + 1], V, dU[pair], spare if alone else dU[pair + 1])
                row_loops.dots(D[q], D[q + 1], B, dA[pair], spare if alone else dA[pair + 1])
            row_loops.add_outer(left_U, Q, sums[: args.weight_rank])
            row_loops.add_outer(left_A, D, sums[args.weight_rank : sum_of_D])
            row_loops.add_rows(D, sums[sum_of_D])


@part
def _drop_one(index, packed, columns, masked, masked_bits):
    i, j = index // columns, index % columns
    bit = np.uint32(j % WORD // 2 + PAIRS * (j % 2))
    packed[i, j // WORD] &= ~(np.uint32(1) << bit)
    if masked.size:
        masked[index] = 0.0
    if masked_bits.size:
        masked_bits[index] = 0


@part
def drop(indices, packed, columns, masked, masked_bits):
    """Clear the bits of weights at flat indices, and zero these in M * W', flat fp32 or bf16 or both empty."""
    for p in range(indices.size):
        _drop_one(indices[p], packed, columns, masked, masked_bits)


@part
def drop_first(scores, indices, value, count, packed, columns, masked, masked_bits):
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
                last = indices[p]
            _drop_one(indices[p], packed, columns, masked, masked_bits)
    return last
