"""Number formats of PTX, as numpy holds them: a register is an unsigned integer of its width, read as its type says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray

UNSIGNED = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
SIGNED = {bits: np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
FLOATING = {bits: np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}
BOOL = np.dtype(bool)
PAIRS = ("f16x2", "bf16x2", "s16x2", "u16x2")  # two numbers in the halves of a 32-bit register


def numpy_type(name: str) -> np.dtype:
    """Of a PTX type that numpy has: s32, u16, b64, f32, pred."""
    if name == "pred":
        return BOOL
    return {"f": FLOATING, "s": SIGNED, "u": UNSIGNED, "b": UNSIGNED}[name[0]][int(name[1:])]


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_to_f32(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """Rounded to nearest, ties to even; every NaN becomes the one that the hardware makes."""
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (word + (((word >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def tf32(bits: Array) -> Array:
    """What a tensor core sees of an fp32 operand: its first 19 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def halves(word: Array) -> tuple[Array, Array]:
    return (word & np.uint32(0xFFFF)).astype(np.uint16), (word >> np.uint32(16)).astype(np.uint16)


def join(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def as_bits(value: Array, width: int) -> Array:
    """In a register of `width` bits: signed numbers extend their sign, others are filled with zeros."""
    if width == 1:
        return value.astype(bool)
    if value.dtype.kind == "b":
        return value.astype(UNSIGNED[width])
    bits = 8 * value.dtype.itemsize
    if bits == width:
        return value.view(UNSIGNED[width])
    if value.dtype.kind == "i":
        return value.astype(SIGNED[width]).view(UNSIGNED[width])
    return value.view(UNSIGNED[bits]).astype(UNSIGNED[width])
