"""mma.sync of sm_80, by warps, and wgmma of sm_90, by warpgroups, which is done at once.

Products are exact, for they are of numbers that float64 holds with room; a sum is in float64, and rounded to fp32 when
it is added to the accumulator. Which lane holds which elements is in PTX's manual; below, lane 4 g + t.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from .decoding import Decoder, Read, Step, instruction
from .formats import Array, bf16_to_f32, f16_to_f32, tf32
from .memory import SHARED_BASE, MemoryFault
from .parsing import Instruction, Unsupported

NUMBERS: dict[str, Callable[[Array], Array]] = {"bf16": bf16_to_f32, "f16": f16_to_f32, "tf32": tf32}


def _stacked(block, reads: list[Read]) -> Array:
    return np.stack([read(block) for read in reads])


def _left(words: Array, kind: str, warps: int) -> Array:
    """(warps, 16, k) in float64 of registers (2 or 4, threads), where register 2 j + i holds rows g + 8 i."""
    if kind == "tf32":
        a = tf32(words).reshape(-1, 2, warps, 8, 4).transpose(2, 1, 3, 0, 4)  # w, i, g, j, t
    else:
        pairs = NUMBERS[kind](words.view(np.uint16))
        a = pairs.reshape(-1, 2, warps, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5)
    return a.astype(np.float64).reshape(warps, 16, -1)


def _right(words: Array, kind: str, warps: int) -> Array:
    """(warps, k, 8) in float64 of registers (1 or 2, threads), where register i holds rows from 8 i, or 4 i of tf32."""
    if kind == "tf32":
        b = tf32(words).reshape(-1, warps, 8, 4).transpose(1, 0, 3, 2)  # w, i, t, g
    else:
        b = NUMBERS[kind](words.view(np.uint16)).reshape(-1, warps, 8, 4, 2).transpose(1, 0, 3, 4, 2)
    return b.astype(np.float64).reshape(warps, -1, 8)


@instruction("mma")
def multiply_by_warps(ins: Instruction, decoder: Decoder) -> Step:
    shape = next(word for word in ins.op if re.match(r"m\d+n\d+k\d+", word))
    kind = ins.op[-3]
    shapes = {"tf32": ("m16n8k8", "m16n8k4"), "f16": ("m16n8k16", "m16n8k8"), "bf16": ("m16n8k16", "m16n8k8")}
    if shape not in shapes.get(kind, ()) or ins.op[-2] != kind or ins.op[-4] != "f32" or ins.op[-1] != "f32":
        raise Unsupported(ins.text)
    reads_a, reads_b = ([decoder.reader(name, np.uint32) for name in names] for names in ins.args[1:3])
    reads_c = [decoder.reader(name, np.float32) for name in ins.args[3]]
    writes = [decoder.writer(name) for name in ins.args[0]]
    warps = decoder.threads // 32

    def step(block, mask: Array | None) -> None:
        if mask is not None:
            raise Unsupported(f"by part of the threads: {ins.text}")
        product = _left(_stacked(block, reads_a), kind, warps) @ _right(_stacked(block, reads_b), kind, warps)
        # accumulator 2 i + j holds row g + 8 i and column 2 t + j
        product = product.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        total = (product + _stacked(block, reads_c)).astype(np.float32)
        for write, value in zip(writes, total, strict=True):
            write(block, value, None)

    return step


@functools.lru_cache(maxsize=1024)
def _places(descriptor: int, rows: int, k: int, size: int, mn_major: bool) -> Array:
    """Of the elements (rows, k) in shared memory that a descriptor of a matrix stands for, as offsets in bytes."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    span = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]  # bytes of one swizzled row
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    elements = span // size  # in a row
    if mn_major:
        far = (stride, leading) if span == 16 else (leading, stride)
        place = start + (r % elements) * size + (c % 8) * span + (r // elements) * far[0] + (c // 8) * far[1]
    elif span == 16:
        place = start + (r % 8) * 16 + (r // 8) * stride + (c % elements) * size + (c // elements) * leading
    else:
        place = start + (r % 8) * span + (r // 8) * stride + c * size
    bits = {16: 0, 128: 7, 64: 3, 32: 1}[span]
    place = place ^ (((place >> 7) & bits) << 4)
    return (place - SHARED_BASE).astype(np.int32)


def _from_shared(block, ins: Instruction, descriptors: Array, rows: int, k: int, kind: str, mn_major: bool) -> Array:
    """(warpgroups, rows, k) in float64, where each warpgroup has a descriptor."""
    size = 4 if kind == "tf32" else 2
    if len({int(descriptor) >> 62 for descriptor in descriptors}) > 1:
        raise Unsupported(f"descriptors of different swizzle: {ins.text}")
    places = np.stack([_places(int(descriptor), rows, k, size, mn_major) for descriptor in descriptors])
    if places.min() < 0 or places.max() + size > block.shared.data.size or (places & (size - 1)).any():
        raise MemoryFault(f"shared access outside memory in {block.program.name}: {ins.text}")
    return NUMBERS[kind](block.shared.words[8 * size].take(places // size)).astype(np.float64)


@instruction("wgmma")
def multiply_by_warpgroups(ins: Instruction, decoder: Decoder) -> Step:
    if ins.op[1] != "mma_async":
        return lambda block, mask: None  # fence, commit_group, wait_group
    shape = next(re.fullmatch(r"m64n(\d+)k(\d+)", word) for word in ins.op if word.startswith("m64"))
    n, k, kind = int(shape[1]), int(shape[2]), ins.type
    flags = list(ins.args[4:])
    if kind not in NUMBERS or ins.op[-2] != kind or ins.op[-3] != "f32" or flags[:2] != [1, 1]:
        raise Unsupported(ins.text)
    if decoder.threads % 128:
        raise Unsupported(f"by part of a warpgroup: {ins.text}")
    groups = decoder.threads // 128
    left_in_registers = isinstance(ins.args[1], list)
    majors = [0, *flags[2:], 0] if left_in_registers else [*flags[2:], 0, 0]
    if left_in_registers:
        reads_a = [decoder.reader(name, np.uint32) for name in ins.args[1]]
    else:
        descriptor_a = decoder.reader(ins.args[1], np.uint64)
    descriptor_b = decoder.reader(ins.args[2], np.uint64)
    added = decoder.reader(ins.args[3], bool)
    sums = [decoder.reader(name, np.float32) for name in ins.args[0]]
    writes = [decoder.writer(name) for name in ins.args[0]]

    def step(block, mask: Array | None) -> None:
        if mask is not None:
            raise Unsupported(f"by part of the threads: {ins.text}")
        if left_in_registers:
            a = _left(_stacked(block, reads_a), kind, 4 * groups).reshape(groups, 64, k)
        else:
            a = _from_shared(block, ins, descriptor_a(block)[::128], 64, k, kind, bool(majors[0]))
        b = _from_shared(block, ins, descriptor_b(block)[::128], n, k, kind, bool(majors[1]))
        product = a @ b.swapaxes(1, 2)
        # accumulator 4 l + 2 i + j holds row g + 8 i of the warp's 16, and column 8 l + 2 t + j
        product = product.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        before = np.where(added(block), _stacked(block, sums), np.float32(0))
        total = (product + before).astype(np.float32)
        for write, value in zip(writes, total, strict=True):
            write(block, value, None)

    return step
