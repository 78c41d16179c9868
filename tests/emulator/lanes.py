"""Instructions between the threads of a warp."""

from __future__ import annotations

import numpy as np

from .decoding import Decoder, Step, instruction
from .formats import Array
from .moves import listed
from .parsing import Instruction, Unsupported

LANE = np.arange(32)


def warps(value: Array) -> Array:
    return value.reshape(-1, 32)


@instruction("shfl")
def shuffle(ins: Instruction, decoder: Decoder) -> Step:
    mode = ins.op[2]
    value, places, limits = (decoder.reader(argument, np.uint32) for argument in ins.args[1:4])
    writes = [decoder.writer(name) for name in ins.args[0].split("|")]

    def step(block, mask: Array | None) -> None:
        b, c = (warps(read(block)).astype(np.int64) for read in (places, limits))
        segment, clamp = (c >> 8) & 31, c & 31
        top = (LANE & segment) | (clamp & ~segment)
        if mode == "up":
            source = LANE - b
        elif mode == "down":
            source = LANE + b
        else:
            source = LANE ^ b if mode == "bfly" else (LANE & segment) | (b & ~segment)
        inside = source >= top if mode == "up" else source <= top
        source = np.where(inside, source, LANE) & 31
        writes[0](block, np.take_along_axis(warps(value(block)), source, 1).reshape(-1), mask)
        if len(writes) > 1:
            writes[1](block, inside.reshape(-1), mask)

    return step


@instruction("vote")
def vote(ins: Instruction, decoder: Decoder) -> Step:
    read, write = decoder.reader(ins.args[1], bool), decoder.writer(ins.args[0])

    def step(block, mask: Array | None) -> None:
        predicate = read(block)
        live = np.ones(block.threads, bool) if mask is None else mask
        ours = warps(predicate & live)
        if "ballot" in ins.op:
            result = (ours.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)
        elif "any" in ins.op:
            result = ours.any(1)
        elif "all" in ins.op:
            result = (ours | ~warps(live)).all(1)
        else:
            raise Unsupported(ins.text)
        write(block, np.repeat(result, 32), mask)

    return step


REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("redux")
def reduce(ins: Instruction, decoder: Decoder) -> Step:
    read, write, function = decoder.fetch(ins.args[1], ins.type), decoder.writer(ins.args[0]), REDUCTIONS[ins.op[2]]

    def step(block, mask: Array | None) -> None:
        if mask is not None and (warps(mask).any(1) != warps(mask).all(1)).any():
            raise Unsupported(f"by part of a warp: {ins.text}")
        value = warps(read(block))
        write(block, np.repeat(function.reduce(value, axis=1, dtype=value.dtype), 32), mask)

    return step


@instruction("elect")
def elect(ins: Instruction, decoder: Decoder) -> Step:
    """The first lane of each warp."""
    names = ins.args[0].split("|")
    lane, elected = decoder.writer(names[0]), decoder.writer(names[1])

    def step(block, mask: Array | None) -> None:
        lane(block, np.zeros(block.threads, np.uint32), mask)
        elected(block, decoder.lane == 0, mask)

    return step


def _whole_warps(ins: Instruction, mask: Array | None) -> None:
    if not {"m8n8", "b16"} <= set(ins.op):
        raise Unsupported(ins.text)
    if mask is not None:
        raise Unsupported(f"by part of the threads: {ins.text}")


@instruction("ldmatrix")
def load_matrix(ins: Instruction, decoder: Decoder) -> Step:
    """Up to four matrices of 8 x 8 halves; lane 8 j + i holds the address of row i of matrix j."""
    writes = [decoder.writer(name) for name in listed(ins.args[0])]
    address, count = decoder.address(ins.args[1], "shared"), len(listed(ins.args[0]))

    def step(block, mask: Array | None) -> None:
        _whole_warps(ins, mask)
        rows = warps(address(block))[:, : 8 * count]
        block.check(rows.reshape(-1), 16, None, "shared", ins)
        tile = block.shared.words[16].take((rows >> 1)[:, :, None] + np.arange(8)).reshape(-1, count, 8, 8)
        if "trans" in ins.op:
            tile = tile.swapaxes(2, 3)
        pairs = np.ascontiguousarray(tile.swapaxes(0, 1)).view(np.uint32)  # a lane has two neighbours of a row
        for j, write in enumerate(writes):
            write(block, pairs[j].reshape(-1), None)

    return step


@instruction("stmatrix")
def store_matrix(ins: Instruction, decoder: Decoder) -> Step:
    reads = [decoder.reader(name, np.uint32) for name in listed(ins.args[1])]
    address, count = decoder.address(ins.args[0], "shared"), len(reads)

    def step(block, mask: Array | None) -> None:
        _whole_warps(ins, mask)
        rows = warps(address(block))[:, : 8 * count]
        block.check(rows.reshape(-1), 16, None, "shared", ins)
        tile = np.stack([warps(read(block)) for read in reads], axis=1).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in ins.op:
            tile = tile.swapaxes(2, 3)
        block.shared.words[16][(rows >> 1)[:, :, None] + np.arange(8)] = tile.reshape(-1, 8 * count, 8)

    return step
