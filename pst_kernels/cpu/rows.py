"""What is done to one row of W, in loops that the compiler turns into vector instructions.

Each loop writes one array and reads few: with more of them the compiler gives up telling that they do not overlap, and
leaves the loop scalar. All arithmetic is fp32; bf16 lies in uint16, its bits being the upper half of an fp32's.
"""

from __future__ import annotations

import numba
import numpy as np

# A product and a sum may become one fused instruction; sums keep their order, so that all passes see the same W' and S.
_options = {"fastmath": {"contract", "nsz"}, "error_model": "numpy", "nogil": True, "cache": True}
row = numba.njit(**_options)
# A sum along a row may be split over vector lanes.
reduction = numba.njit(**{**_options, "fastmath": {"contract", "nsz", "reassoc"}})

RANKS = 8  # columns of the factors that one loop takes: fewer would load and store the row more often
GROUP = 4  # rows that a sum down the columns takes at once
EVEN = np.uint64(0x0001000100010001)  # the even ones of eight flags of a byte each
GATHER = np.uint64((1 << 48) | (1 << 33) | (1 << 18) | (1 << 3))  # times such flags: four bits side by side from bit 48
SPREAD = np.uint64(1 | (1 << 15) | (1 << 30) | (1 << 45))  # times such bits, from bit 0: each where EVEN has one


@row
def widen(source, out):
    """bf16 bits, uint16, to fp32."""
    bits = out.view(np.uint32)
    for j in range(out.size):
        bits[j] = np.uint32(source[j]) << np.uint32(16)


@row
def narrow(source, out):
    """fp32 to bf16 bits, uint16, to nearest even; NaN stays NaN."""
    bits = source.view(np.uint32)
    for j in range(out.size):
        one = bits[j]
        rounded = (one + np.uint32(0x7FFF) + ((one >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (one & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[j] = np.uint16(0x7FC0) if nan else np.uint16(rounded)


@row
def add_product(left, right, out):
    """out (n,) += left (r,) @ right (r, n), r a multiple of RANKS."""
    for k in range(0, left.size, RANKS):
        a, b, c, d, e, f, g, h = (
            left[k], left[k + 1], left[k + 2], left[k + 3], left[k + 4], left[k + 5], left[k + 6], left[k + 7]
        )  # fmt: skip
        r0, r1, r2, r3, r4, r5, r6, r7 = (
            right[k], right[k + 1], right[k + 2], right[k + 3], right[k + 4], right[k + 5], right[k + 6], right[k + 7]
        )  # fmt: skip
        for j in range(out.size):
            out[j] += (
                a * r0[j] + b * r1[j] + c * r2[j] + d * r3[j] + e * r4[j] + f * r5[j] + g * r6[j] + h * r7[j]
            )  # fmt: skip


@row
def update(weight, weight_bits, is_bf16, U, V, out):
    """out = W' of one row: that of `weight`, or of `weight_bits` if `is_bf16`, plus U V."""
    if is_bf16:
        widen(weight_bits, out)
    else:
        for j in range(out.size):
            out[j] = weight[j]
    add_product(U, V, out)


@row
def score(updated, A, B, R, C, out):
    """out = |W'| + A B + (R + C) of one row; R is its number, C (n,)."""
    for j in range(out.size):
        out[j] = abs(updated[j]) + (C[j] + R)
    add_product(A, B, out)


@row
def keep_from(scores, lower, out):
    """out, a byte a weight: 1 where the score is not below `lower`, NaN included."""
    for j in range(scores.size):
        out[j] = not scores[j] < lower


@row
def inside(scores, lower, upper, out):
    """out, a byte a weight: 1 where lower <= score <= upper."""
    for j in range(scores.size):
        out[j] = (scores[j] >= lower) & (scores[j] <= upper)


@row
def count(flags):
    """How many of the flags, a byte each, are 1."""
    total = np.int32(0)
    for j in range(flags.size):
        total += flags[j]
    return total


@row
def pack(flags, out):
    """Flags, a byte each and as many as the words have bits, to packed words (the order of bits is packing.py's)."""
    eights = flags.view(np.uint64)
    for w in range(out.size):
        word = np.uint64(0)
        for q in range(4):
            eight = eights[4 * w + q]
            even = (((eight & EVEN) * GATHER) >> np.uint64(48)) & np.uint64(15)
            odd = ((((eight >> np.uint64(8)) & EVEN) * GATHER) >> np.uint64(48)) & np.uint64(15)
            word |= (even | (odd << np.uint64(16))) << np.uint64(4 * q)
        out[w] = np.uint32(word)


@row
def unpack(words, out):
    """Packed words to flags, a byte each; the inverse of `pack`."""
    eights = out.view(np.uint64)
    for w in range(words.size):
        word = np.uint64(words[w])
        for q in range(4):
            even = (word >> np.uint64(4 * q)) & np.uint64(15)
            odd = (word >> np.uint64(16 + 4 * q)) & np.uint64(15)
            eights[4 * w + q] = ((even * SPREAD) & EVEN) | (((odd * SPREAD) & EVEN) << np.uint64(8))


@row
def select(flags, source, out):
    """out = source where the flag is 1, else 0: also where source is NaN or infinite."""
    for j in range(source.size):
        out[j] = source[j] if flags[j] else np.float32(0)


@row
def store_masked(flags, updated, work, out, out_bits, is_bf16):
    """A row of M * W' into `out`, or by way of `work` into `out_bits` if `is_bf16`."""
    if is_bf16:
        select(flags, updated, work)
        narrow(work, out_bits)
    else:
        select(flags, updated, out)


@row
def multiply(left, right, out):
    for j in range(out.size):
        out[j] = left[j] * right[j]


@row
def multiply_through(gradient, flags, updated, through_magnitude, out):
    """out = G * (M + |W'|), or G * M without `through_magnitude`."""
    if through_magnitude:
        for j in range(out.size):
            out[j] = gradient[j] * (np.float32(flags[j]) + abs(updated[j]))
    else:
        select(flags, gradient, out)


@reduction
def dot_each(row, right, out):
    """out (r,) = right (r, n) @ row (n,), r a multiple of RANKS."""
    zero = np.float32(0)
    for k in range(0, right.shape[0], RANKS):
        r0, r1, r2, r3, r4, r5, r6, r7 = (
            right[k], right[k + 1], right[k + 2], right[k + 3], right[k + 4], right[k + 5], right[k + 6], right[k + 7]
        )  # fmt: skip
        a, b, c, d, e, f, g, h = zero, zero, zero, zero, zero, zero, zero, zero
        for j in range(row.size):
            one = row[j]
            a += one * r0[j]
            b += one * r1[j]
            c += one * r2[j]
            d += one * r3[j]
            e += one * r4[j]
            f += one * r5[j]
            g += one * r6[j]
            h += one * r7[j]
        out[k], out[k + 1], out[k + 2], out[k + 3] = a, b, c, d
        out[k + 4], out[k + 5], out[k + 6], out[k + 7] = e, f, g, h


@reduction
def total(row):
    result = np.float32(0)
    for j in range(row.size):
        result += row[j]
    return result


@row
def add_outer(left, rows, out):
    """out (r, n) += left (GROUP, r)^T @ rows (GROUP, n)."""
    r0, r1, r2, r3 = rows[0], rows[1], rows[2], rows[3]
    for k in range(out.shape[0]):
        a, b, c, d, line = left[0, k], left[1, k], left[2, k], left[3, k], out[k]
        for j in range(line.size):
            line[j] += a * r0[j] + b * r1[j] + c * r2[j] + d * r3[j]


@row
def add_rows(rows, out):
    """out (n,) += the sum of rows (GROUP, n)."""
    r0, r1, r2, r3 = rows[0], rows[1], rows[2], rows[3]
    for j in range(out.size):
        out[j] += (r0[j] + r1[j]) + (r2[j] + r3[j])
