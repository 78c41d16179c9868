"""Instructions on the bits of registers."""

from __future__ import annotations

import numpy as np

from .arithmetic import binary, unary
from .decoding import Decoder, Step, instruction
from .formats import UNSIGNED, Array
from .parsing import Instruction

LOGICAL = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction(*LOGICAL)
def logical(ins: Instruction, decoder: Decoder) -> Step:
    return binary(LOGICAL[ins.op[0]], ins, decoder)


@instruction("not")
def invert(ins: Instruction, decoder: Decoder) -> Step:
    return unary(np.invert, ins, decoder)


@instruction("shl", "shr")
def shift(ins: Instruction, decoder: Decoder) -> Step:
    """By the width or more, nothing is left but the sign of a signed number that is shifted right."""
    width, left, signed = int(ins.type[1:]), ins.op[0] == "shl", ins.type[0] == "s"
    a, by, write = (
        decoder.fetch(ins.args[1], ins.type),
        decoder.reader(ins.args[2], np.uint32),
        decoder.writer(ins.args[0]),
    )

    def step(block, mask: Array | None) -> None:
        value, places = a(block), by(block)
        near = np.minimum(places, np.uint32(width - 1)).astype(value.dtype)
        shifted = value << near if left else value >> near
        over = places >= width
        if (left or not signed) and over.any():
            shifted[over] = 0
        write(block, shifted, mask)

    def by_a_constant(block, mask: Array | None) -> None:
        value = a(block)
        write(block, value << places if left else value >> places, mask)

    if isinstance(ins.args[2], int) and 0 <= ins.args[2] < width:
        places = np.full(decoder.threads, ins.args[2]).astype(f"{'i' if signed else 'u'}{width // 8}")
        return by_a_constant
    return step


@instruction("shf")
def funnel_shift(ins: Instruction, decoder: Decoder) -> Step:
    low, high, by = (decoder.reader(argument, np.uint32) for argument in ins.args[1:4])
    write, wraps, right = decoder.writer(ins.args[0]), "wrap" in ins.op, "r" in ins.op

    def step(block, mask: Array | None) -> None:
        both = low(block).astype(np.uint64) | (high(block).astype(np.uint64) << np.uint64(32))
        places = by(block).astype(np.uint64)
        places = places & np.uint64(31) if wraps else np.minimum(places, np.uint64(32))
        shifted = both >> places if right else (both << places) >> np.uint64(32)
        write(block, shifted.astype(np.uint32), mask)

    return step


@instruction("bfe")
def extract_field(ins: Instruction, decoder: Decoder) -> Step:
    width, signed = int(ins.type[1:]), ins.type[0] == "s"
    bits, write = decoder.reader(ins.args[1], UNSIGNED[width]), decoder.writer(ins.args[0])
    start, count = (decoder.reader(argument, np.uint32) for argument in ins.args[2:4])
    one = np.uint64(1)

    def step(block, mask: Array | None) -> None:
        first, many = (read(block).astype(np.uint64) & np.uint64(0xFF) for read in (start, count))
        many = np.minimum(many, np.uint64(width))
        filled = np.where(many < 64, (one << np.minimum(many, np.uint64(63))) - one, ~np.uint64(0))
        source = bits(block).astype(np.uint64)
        if signed:  # beyond the end lies the sign
            source = np.where(source >> np.uint64(width - 1) & one, source | ~np.uint64(2**width - 1), source)
        value = np.where(first < 64, source >> np.minimum(first, np.uint64(63)), np.uint64(0)) & filled
        if signed:
            top = np.minimum(first + np.maximum(many, one) - one, np.uint64(width - 1))
            value = np.where((source >> top & one == 1) & (many > 0), value | ~filled, value)
        write(block, value.astype(UNSIGNED[width]), mask)

    return step


@instruction("bfi")
def insert_field(ins: Instruction, decoder: Decoder) -> Step:
    width = int(ins.type[1:])
    a, b = (decoder.reader(argument, UNSIGNED[width]) for argument in ins.args[1:3])
    start, count = (decoder.reader(argument, np.uint32) for argument in ins.args[3:5])
    write, one, most = decoder.writer(ins.args[0]), np.uint64(1), np.uint64(63)

    def step(block, mask: Array | None) -> None:
        first, many = (read(block).astype(np.uint64) & np.uint64(0xFF) for read in (start, count))
        filled = np.where(many < 64, (one << np.minimum(many, most)) - one, ~np.uint64(0))
        field = np.where(first < 64, filled << np.minimum(first, most), np.uint64(0))
        inserted = a(block).astype(np.uint64) << np.minimum(first, most)
        write(block, ((b(block) & ~field) | (inserted & field)).astype(UNSIGNED[width]), mask)

    return step


@instruction("prmt")
def permute_bytes(ins: Instruction, decoder: Decoder) -> Step:
    a, b, selector = (decoder.reader(argument, np.uint32) for argument in ins.args[1:4])
    write, thread = decoder.writer(ins.args[0]), np.arange(decoder.threads)

    def step(block, mask: Array | None) -> None:
        source = np.stack([a(block), b(block)], axis=1).view(np.uint8)  # (threads, 8)
        chosen = selector(block)
        out = np.empty((block.threads, 4), np.uint8)
        for i in range(4):
            which = (chosen >> np.uint32(4 * i)).astype(np.int64)
            byte = source[thread, which & 7]
            sign = (byte.view(np.int8) >> np.int8(7)).view(np.uint8)
            out[:, i] = np.where(which & 8, sign, byte)
        write(block, out.view(np.uint32).reshape(-1), mask)

    return step


@instruction("lop3")
def logical_of_three(ins: Instruction, decoder: Decoder) -> Step:
    reads = [decoder.reader(argument, np.uint32) for argument in ins.args[1:4]]
    write, table = decoder.writer(ins.args[0]), ins.args[4]

    def step(block, mask: Array | None) -> None:
        a, b, c = (read(block) for read in reads)
        value = np.zeros(block.threads, np.uint32)
        for i in range(8):
            if table >> i & 1:
                value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        write(block, value, mask)

    return step


@instruction("popc")
def count_bits(ins: Instruction, decoder: Decoder) -> Step:
    read, write = decoder.reader(ins.args[1], UNSIGNED[int(ins.type[1:])]), decoder.writer(ins.args[0])
    return lambda block, mask: write(block, np.bitwise_count(read(block)).astype(np.uint32), mask)


@instruction("brev")
def reverse_bits(ins: Instruction, decoder: Decoder) -> Step:
    read, write = decoder.reader(ins.args[1], np.uint32), decoder.writer(ins.args[0])

    def step(block, mask: Array | None) -> None:
        value = read(block)
        out = np.zeros(block.threads, np.uint32)
        for i in range(32):
            out |= ((value >> np.uint32(i)) & np.uint32(1)) << np.uint32(31 - i)
        write(block, out, mask)

    return step


@instruction("clz")
def count_leading_zeros(ins: Instruction, decoder: Decoder) -> Step:
    width = int(ins.type[1:])
    read, write = decoder.reader(ins.args[1], UNSIGNED[width]), decoder.writer(ins.args[0])

    def step(block, mask: Array | None) -> None:
        write(block, np.array([width - int(value).bit_length() for value in read(block)], np.uint32), mask)

    return step
