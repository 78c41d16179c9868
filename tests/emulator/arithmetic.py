"""Arithmetic on integers and floating-point numbers. The warnings of numpy are off while a grid runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decoding import Decoder, Step, instruction
from .formats import FLOATING, PAIRS, UNSIGNED, Array, numpy_type
from .parsing import Instruction, Unsupported


def binary(function: Callable[[Array, Array], Array], ins: Instruction, decoder: Decoder) -> Step:
    a, b = (decoder.fetch(argument, ins.type) for argument in ins.args[1:3])
    put = decoder.put(ins.args[0], ins.type)
    return lambda block, mask: put(block, function(a(block), b(block)), mask)


def unary(function: Callable[[Array], Array], ins: Instruction, decoder: Decoder) -> Step:
    a, put = decoder.fetch(ins.args[1], ins.type), decoder.put(ins.args[0], ins.type)
    return lambda block, mask: put(block, function(a(block)), mask)


def _no_saturation(ins: Instruction) -> None:
    if "sat" in ins.op or "cc" in ins.op:
        raise Unsupported(ins.text)


@instruction("add")
def add(ins: Instruction, decoder: Decoder) -> Step:
    _no_saturation(ins)
    return binary(np.add, ins, decoder)


@instruction("sub")
def subtract(ins: Instruction, decoder: Decoder) -> Step:
    _no_saturation(ins)
    return binary(np.subtract, ins, decoder)


@instruction("min")
def minimum(ins: Instruction, decoder: Decoder) -> Step:
    """Without .NaN a number wins over a NaN."""
    return binary(np.fmin if ins.type[0] in "fb" and "NaN" not in ins.op else np.minimum, ins, decoder)


@instruction("max")
def maximum(ins: Instruction, decoder: Decoder) -> Step:
    return binary(np.fmax if ins.type[0] in "fb" and "NaN" not in ins.op else np.maximum, ins, decoder)


def _high_product(a: Array, b: Array) -> Array:
    width = 8 * a.dtype.itemsize
    high = [((int(x) * int(y)) >> width) & (2**width - 1) for x, y in zip(a, b, strict=True)]
    return np.array(high, UNSIGNED[width])


def _product(ins: Instruction) -> tuple[Callable[[Array, Array], Array], str]:
    """Of two operands, and the type that it has."""
    kind = ins.type
    if kind[0] == "f" or kind.startswith("bf") or kind in PAIRS:
        return np.multiply, kind
    width = int(kind[1:])
    if "wide" in ins.op:
        result = kind[0] + str(2 * width)
        wide = numpy_type(result)
        return lambda a, b: a.astype(wide) * b.astype(wide), result
    if "hi" in ins.op:
        return _high_product, f"u{width}"
    return np.multiply, kind


@instruction("mul")
def multiply(ins: Instruction, decoder: Decoder) -> Step:
    _no_saturation(ins)
    product, kind = _product(ins)
    a, b = (decoder.fetch(argument, ins.type) for argument in ins.args[1:3])
    put = decoder.put(ins.args[0], kind)
    return lambda block, mask: put(block, product(a(block), b(block)), mask)


@instruction("mad")
def multiply_add(ins: Instruction, decoder: Decoder) -> Step:
    _no_saturation(ins)
    if ins.type[0] == "f":
        return fused_multiply_add(ins, decoder)
    product, kind = _product(ins)
    a, b = (decoder.fetch(argument, ins.type) for argument in ins.args[1:3])
    c, put = decoder.fetch(ins.args[3], kind), decoder.put(ins.args[0], kind)
    return lambda block, mask: put(block, product(a(block), b(block)) + c(block), mask)


@instruction("fma")
def fused_multiply_add(ins: Instruction, decoder: Decoder) -> Step:
    """The product is exact in float64; the sum is rounded there, and then once more."""
    _no_saturation(ins)
    a, b, c = (decoder.fetch(argument, ins.type) for argument in ins.args[1:4])
    put = decoder.put(ins.args[0], ins.type)

    def step(block, mask: Array | None) -> None:
        total = np.multiply(a(block), b(block), dtype=np.float64)
        total += c(block)
        put(block, total, mask)

    return step


@instruction("div")
def divide(ins: Instruction, decoder: Decoder) -> Step:
    """Integers towards zero; by zero all bits are set."""
    if ins.type[0] == "f":
        return binary(np.divide, ins, decoder)
    kind = numpy_type(ins.type)
    if ins.type[0] == "u":
        return binary(lambda a, b: np.where(b == 0, ~kind.type(0), a // np.maximum(b, 1)), ins, decoder)

    def signed(a: Array, b: Array) -> Array:
        size = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
        return np.where(b == 0, -1, np.sign(a) * np.sign(b) * size).astype(kind)

    return binary(signed, ins, decoder)


@instruction("rem")
def remainder(ins: Instruction, decoder: Decoder) -> Step:
    if ins.type[0] == "u":
        return binary(lambda a, b: a % np.maximum(b, 1), ins, decoder)
    return binary(lambda a, b: np.fmod(a, np.where(b == 0, b.dtype.type(1), b)), ins, decoder)


UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a,
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@instruction(*UNARY)
def of_one_operand(ins: Instruction, decoder: Decoder) -> Step:
    return unary(UNARY[ins.op[0]], ins, decoder)


ROUNDING = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(ins: Instruction, decoder: Decoder) -> Step:
    to, source = ins.op[-2:]
    if to in ("bf16x2", "f16x2"):  # of two numbers, the high one first
        high, low = (decoder.fetch(argument, "f32") for argument in ins.args[1:3])
        put = decoder.put(ins.args[0], to)
        return lambda block, mask: put(block, np.stack([low(block), high(block)]), mask)
    if "sat" in ins.op or "relu" in ins.op:
        raise Unsupported(ins.text)
    a = decoder.fetch(ins.args[1], source)
    if to == "tf32":
        return _convert_to_tf32(ins, decoder)
    rounding = next((ROUNDING[word] for word in ins.op if word in ROUNDING), None)
    if to[0] in "su":
        write, kind = decoder.writer(ins.args[0]), numpy_type(to)
        number = _clipped(kind, rounding or np.trunc) if source[0] in "fb" else lambda value: value.astype(kind)
        return lambda block, mask: write(block, number(a(block)), mask)
    put, wide = decoder.put(ins.args[0], to), FLOATING[64 if to == "f64" else 32]
    if rounding is None:
        return lambda block, mask: put(block, a(block).astype(wide), mask)
    return lambda block, mask: put(block, rounding(a(block)).astype(wide), mask)


def _convert_to_tf32(ins: Instruction, decoder: Decoder) -> Step:
    bits, write = decoder.reader(ins.args[1], np.uint32), decoder.writer(ins.args[0])
    half, kept = np.uint32(0x1000), np.uint32(0xFFFFE000)
    return lambda block, mask: write(block, (bits(block) + half) & kept, mask)


def _clipped(kind: np.dtype, rounding: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Of floating-point numbers: out of range becomes the nearest integer that there is, NaN zero."""
    least, most = np.iinfo(kind).min, np.iinfo(kind).max

    def clipped(value: Array) -> Array:
        whole = rounding(np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
        inside = np.where((whole > least) & (whole < most), whole, 0.0).astype(kind)
        return np.where(whole >= most, kind.type(most), np.where(whole <= least, kind.type(least), inside))

    return clipped
