"""Compiled passes over a weight so small that all of it stays in a core's first cache: each is one call, on one thread.

A pass takes the address of its frame: int64 numbers, and addresses of contiguous fp32 tensors.
"""

from __future__ import annotations

import numba
import numpy as np

from pst_kernels.masks.packing import WORD

from . import row_loops
from .jit import part, reduction, row, whole_pass
from .kernels import _floats, _words
from .threads import pointer_to

# Of every frame, and what follows in those of the passes
FRAME = ("weight", "U", "V", "A", "B", "R", "C", "scales", "out", "columns", "weight_rank", "score_rank")
WEIGHT, U_, V_, A_, B_, R_, C_, SCALES, OUT, COLUMNS, WEIGHT_RANK, SCORE_RANK = range(len(FRAME))
SCORES = len(FRAME)
PACKED, MASKED, COUNT = range(len(FRAME), len(FRAME) + 3)
_, G_, THROUGH, DU, DV, DA, DB, DR, DC = range(len(FRAME), len(FRAME) + 9)
LONGEST = DC + 1
NOT_A_NUMBER = np.uint32(0xFFFFFFFF)  # as a key: after every score


@part
def _frame(address):
    """As long as the longest; a pass looks at its own part."""
    return numba.carray(pointer_to(address), (LONGEST,), np.int64)


@row
def add_scaled(source, scale, out):
    for j in range(out.size):
        out[j] += source[j] * scale


@row
def finish_scores(updated, R, C, scale, out):
    """out = |W'| + alpha1 A B, which is there, + alpha2 (R + C) of one row."""
    for j in range(out.size):
        out[j] = (abs(updated[j]) + out[j]) + (R + C[j]) * scale


@reduction
def dot(left, right):
    total = np.float32(0)
    for j in range(left.size):
        total += left[j] * right[j]
    return total


@row
def keys_of(scores, out):
    """uint32 in the order of the scores: NaN last, -0.0 equal to 0.0."""
    bits = scores.view(np.uint32)
    for j in range(out.size):
        one = bits[j]
        magnitude = one & np.uint32(0x7FFFFFFF)
        ordered = ~one if one != magnitude else one | np.uint32(0x80000000)
        ordered = np.uint32(0x80000000) if magnitude == 0 else ordered
        out[j] = NOT_A_NUMBER if magnitude > np.uint32(0x7F800000) else ordered


@part
def kth_key(keys, count):
    """The `count`-th smallest key, from 1, and how many of its equals are among the `count` smallest."""
    prefix, known, rest = np.uint32(0), np.uint32(0), count
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        bins = np.zeros(1 << 11, np.int32)
        low = np.uint32((1 << width) - 1)
        for p in range(keys.size):
            if (keys[p] & known) == prefix:
                bins[(keys[p] >> np.uint32(shift)) & low] += 1
        digit = 0
        while rest > bins[digit]:
            rest -= bins[digit]
            digit += 1
        prefix |= np.uint32(digit) << np.uint32(shift)
        known |= low << np.uint32(shift)
    return prefix, rest


@part
def _updated(frame, i, out):
    """out = row i of W'."""
    columns, rank = frame[COLUMNS], frame[WEIGHT_RANK]
    weight, U = _floats(frame[WEIGHT], frame[OUT], columns), _floats(frame[U_], frame[OUT], rank)
    V, beta = _floats(frame[V_], rank, columns), _floats(frame[SCALES], 1, 3)[0, 0]
    row_loops.copy(weight[i], out)
    for k in range(rank):
        add_scaled(V[k], U[i, k] * beta, out)


@part
def _score(frame, i, updated, out):
    """out = row i of S."""
    columns, rank, scales = frame[COLUMNS], frame[SCORE_RANK], _floats(frame[SCALES], 1, 3)[0]
    A, B = _floats(frame[A_], frame[OUT], rank), _floats(frame[B_], rank, columns)
    R, C = _floats(frame[R_], 1, frame[OUT])[0], _floats(frame[C_], 1, columns)[0]
    out[:] = 0.0
    for k in range(rank):
        add_scaled(B[k], A[i, k] * scales[1], out)
    finish_scores(updated, R[i], C, scales[2], out)


@whole_pass
def scores(address):
    """S, fp32 (out, columns)."""
    frame = _frame(address)
    updated, out = np.empty(frame[COLUMNS], np.float32), _floats(frame[SCORES], frame[OUT], frame[COLUMNS])
    for i in range(frame[OUT]):
        _updated(frame, i, updated)
        _score(frame, i, updated, out[i])


@whole_pass
def prune(address):
    """The packed mask without the `count` smallest scores, from 1, and M * W' into `masked` unless that is 0."""
    frame = _frame(address)
    out, columns = frame[OUT], frame[COLUMNS]
    width = (columns + WORD - 1) // WORD
    updated, scored = np.empty((out, columns), np.float32), np.empty(columns, np.float32)
    keys = np.empty((out, columns), np.uint32)
    for i in range(out):
        _updated(frame, i, updated[i])
        _score(frame, i, updated[i], scored)
        keys_of(scored, keys[i])
    last, ties = kth_key(keys.reshape(-1), frame[COUNT])
    packed, masked = _words(frame[PACKED], out, width), _floats(frame[MASKED], out, columns)
    flags = np.zeros(width * WORD, np.uint8)
    for i in range(out):
        if ties == 0:
            for j in range(columns):
                flags[j] = keys[i, j] >= last
        else:
            for j in range(columns):
                flags[j] = keys[i, j] > last
                if keys[i, j] == last:
                    flags[j] = ties == 0
                    ties -= ties > 0
        row_loops.pack(flags, packed[i])
        if frame[MASKED] != 0:
            row_loops.select(flags, updated[i], masked[i])


@whole_pass
def masked_weight(address):
    """M * W' from the packed mask, in the bits that `prune` has."""
    frame = _frame(address)
    out, columns = frame[OUT], frame[COLUMNS]
    width = (columns + WORD - 1) // WORD
    packed, masked = _words(frame[PACKED], out, width), _floats(frame[MASKED], out, columns)
    updated, flags = np.empty(columns, np.float32), np.zeros(width * WORD, np.uint8)
    for i in range(out):
        _updated(frame, i, updated)
        row_loops.unpack(packed[i], flags)
        row_loops.select(flags, updated, masked[i])


@whole_pass
def gradients(address):
    """dU, dV, dA, dB, dR and dC from all of G, fp32 (out, columns): see small.factor_gradients."""
    frame = _frame(address)
    out, columns, rank, score_rank = frame[OUT], frame[COLUMNS], frame[WEIGHT_RANK], frame[SCORE_RANK]
    beta, alpha1, alpha2 = _floats(frame[SCALES], 1, 3)[0]
    width = (columns + WORD - 1) // WORD
    G, packed = _floats(frame[G_], out, columns), _words(frame[PACKED], out, width)
    U, V = _floats(frame[U_], out, rank), _floats(frame[V_], rank, columns)
    A, B = _floats(frame[A_], out, score_rank), _floats(frame[B_], score_rank, columns)
    dU, dV = _floats(frame[DU], out, rank), _floats(frame[DV], rank, columns)
    dA, dB = _floats(frame[DA], out, score_rank), _floats(frame[DB], score_rank, columns)
    dR, dC = _floats(frame[DR], 1, out)[0], _floats(frame[DC], 1, columns)[0]
    updated, flags = np.empty(columns, np.float32), np.zeros(width * WORD, np.uint8)
    D, Q = np.empty(columns, np.float32), np.empty(columns, np.float32)
    dV[:], dB[:], dC[:] = 0.0, 0.0, 0.0
    for i in range(out):
        _updated(frame, i, updated)
        row_loops.unpack(packed[i], flags)
        row_loops.multiply(G[i], updated, D)
        row_loops.multiply_through(G[i], flags, updated, frame[THROUGH] != 0, Q)
        dR[i] = row_loops.total(D) * alpha2
        add_scaled(D, alpha2, dC)
        for k in range(rank):
            dU[i, k] = dot(Q, V[k]) * beta
            add_scaled(Q, U[i, k] * beta, dV[k])
        for k in range(score_rank):
            dA[i, k] = dot(D, B[k]) * alpha1
            add_scaled(D, A[i, k] * alpha1, dB[k])
