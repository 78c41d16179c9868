"""What is done to a row of W, or to two, in loops that the compiler turns into vector instructions.

Values are computed in fp32; bf16 lies in uint16, its bits being the upper half of an fp32's.
"""

from __future__ import annotations

import numpy as np

from .jit import reduction, row

RANKS = 8  # columns of the factors that one loop takes: fewer would load and store the row more often
GROUP = 4  # rows that a sum down the columns takes at once
# Elements behind the last candidate that may be written to: a score is stored before it is known to be a candidate, as
# many at a time as flags are looked at together.
SLACK = 8
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
def add_products(left, left2, right, out, out2):
    """out (n,) += left (r,) @ right (r, n), and out2 likewise, r a multiple of RANKS.

    Two rows at once, because each load of `right` then serves two products.
    """
    for k in range(0, left.size, RANKS):
        a, b, c, d = left[k], left[k + 1], left[k + 2], left[k + 3]
        e, f, g, h = left[k + 4], left[k + 5], left[k + 6], left[k + 7]
        a2, b2, c2, d2 = left2[k], left2[k + 1], left2[k + 2], left2[k + 3]
        e2, f2, g2, h2 = left2[k + 4], left2[k + 5], left2[k + 6], left2[k + 7]
        r0, r1, r2, r3 = right[k], right[k + 1], right[k + 2], right[k + 3]
        r4, r5, r6, r7 = right[k + 4], right[k + 5], right[k + 6], right[k + 7]
        for j in range(out.size):
            first = (a * r0[j] + b * r1[j] + c * r2[j] + d * r3[j]) + (e * r4[j] + f * r5[j] + g * r6[j] + h * r7[j])
            second = (a2 * r0[j] + b2 * r1[j] + c2 * r2[j] + d2 * r3[j]) + (
                e2 * r4[j] + f2 * r5[j] + g2 * r6[j] + h2 * r7[j]
            )
            out[j] += first
            out2[j] += second


@row
def add_product(left, right, out):
    """out (n,) += left (r,) @ right (r, n), r a multiple of RANKS.

    Of one row alone: with itself as the second, `add_products` takes longer.
    """
    for k in range(0, left.size, RANKS):
        a, b, c, d = left[k], left[k + 1], left[k + 2], left[k + 3]
        e, f, g, h = left[k + 4], left[k + 5], left[k + 6], left[k + 7]
        r0, r1, r2, r3 = right[k], right[k + 1], right[k + 2], right[k + 3]
        r4, r5, r6, r7 = right[k + 4], right[k + 5], right[k + 6], right[k + 7]
        for j in range(out.size):
            out[j] += (a * r0[j] + b * r1[j] + c * r2[j] + d * r3[j]) + (e * r4[j] + f * r5[j] + g * r6[j] + h * r7[j])


@row
def start_score(updated, R, C, out):
    """out = |W'| + (R + C) of one row; R is its number, C (n,)."""
    for j in range(out.size):
        out[j] = abs(updated[j]) + (C[j] + R)


@row
def copy(source, out):
    for j in range(out.size):
        out[j] = source[j]


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
def collect(scores, flags, first, found, out, indices):
    """The scores whose flag is 1 behind the `found` earlier ones in `out`, and their flat indices, which begin at
    `first`, likewise. What does not fit is counted; returns how many there are now.
    """
    eights = flags.view(np.uint64)
    for e in range(eights.size):
        if eights[e] != 0:
            stop = min(SLACK * (e + 1), scores.size)
            if found + SLACK <= out.size:
                # writes every score, and moves on if it is a candidate: without a branch
                for j in range(SLACK * e, stop):
                    out[found] = scores[j]
                    indices[found] = first + j
                    found += flags[j]
            else:
                for j in range(SLACK * e, stop):
                    found += flags[j]
    return found


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


@row
def weigh(updated, p, q, out):
    """out = p W' q, of one row."""
    for j in range(out.size):
        out[j] = updated[j] * p * q[j]


@reduction
def dots(values, values2, right, out, out2):
    """out (r,) = right (r, n) @ values (n,), and out2 likewise, r a multiple of RANKS."""
    z = np.float32(0)
    for k in range(0, right.shape[0], RANKS):
        r0, r1, r2, r3 = right[k], right[k + 1], right[k + 2], right[k + 3]
        r4, r5, r6, r7 = right[k + 4], right[k + 5], right[k + 6], right[k + 7]
        a, b, c, d, e, f, g, h = z, z, z, z, z, z, z, z
        a2, b2, c2, d2, e2, f2, g2, h2 = z, z, z, z, z, z, z, z
        for j in range(values.size):
            x, y = values[j], values2[j]
            a += x * r0[j]
            b += x * r1[j]
            c += x * r2[j]
            d += x * r3[j]
            e += x * r4[j]
            f += x * r5[j]
            g += x * r6[j]
            h += x * r7[j]
            a2 += y * r0[j]
            b2 += y * r1[j]
            c2 += y * r2[j]
            d2 += y * r3[j]
            e2 += y * r4[j]
            f2 += y * r5[j]
            g2 += y * r6[j]
            h2 += y * r7[j]
        out[k], out[k + 1], out[k + 2], out[k + 3] = a, b, c, d
        out[k + 4], out[k + 5], out[k + 6], out[k + 7] = e, f, g, h
        out2[k], out2[k + 1], out2[k + 2], out2[k + 3] = a2, b2, c2, d2
        out2[k + 4], out2[k + 5], out2[k + 6], out2[k + 7] = e2, f2, g2, h2


@reduction
def total(values):
    result = np.float32(0)
    for j in range(values.size):
        result += values[j]
    return result


@reduction
def add_squares(values, out):
    """out (n,) += values^2; returns their sum."""
    result = np.float32(0)
    for j in range(out.size):
        square = values[j] * values[j]
        out[j] += square
        result += square
    return result


@row
def add_outer(left, rows, out):
    """out (r, n) += left (GROUP, r)^T @ rows (GROUP, n), r even."""
    r0, r1, r2, r3 = rows[0], rows[1], rows[2], rows[3]
    for k in range(0, out.shape[0], 2):
        a, b, c, d = left[0, k], left[1, k], left[2, k], left[3, k]
        a2, b2, c2, d2 = left[0, k + 1], left[1, k + 1], left[2, k + 1], left[3, k + 1]
        line, line2 = out[k], out[k + 1]
        for j in range(line.size):
            line[j] += a * r0[j] + b * r1[j] + c * r2[j] + d * r3[j]
            line2[j] += a2 * r0[j] + b2 * r1[j] + c2 * r2[j] + d2 * r3[j]


@row
def add_rows(rows, out):
    """out (n,) += the sum of rows (GROUP, n)."""
    r0, r1, r2, r3 = rows[0], rows[1], rows[2], rows[3]
    for j in range(out.size):
        out[j] += (r0[j] + r1[j]) + (r2[j] + r3[j])
