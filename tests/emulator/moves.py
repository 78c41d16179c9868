"""Instructions that move data: loads, stores, asynchronous copies and moves between registers."""

from __future__ import annotations

import numpy as np

from .decoding import Decoder, Step, instruction
from .formats import SIGNED, UNSIGNED, Array
from .parsing import Instruction, Unsupported


def listed(argument: object) -> list:
    return argument if isinstance(argument, list) else [argument]


def space_of(ins: Instruction) -> str:
    return "shared" if "shared" in ins.op else "global"


def lanes(block, mask: Array | None) -> int:
    return block.threads if mask is None else np.count_nonzero(mask)


@instruction("ld")
def load(ins: Instruction, decoder: Decoder) -> Step:
    destinations = [decoder.writer(name) for name in listed(ins.args[0])]
    if "param" in ins.op:
        base, offset = ins.args[1]
        if offset:
            raise Unsupported(ins.text)
        return lambda block, mask: destinations[0](block, block.parameters[base], mask)
    space, width = space_of(ins), int(ins.type[1:])
    address = decoder.address(ins.args[1], space)
    size = width // 8
    signed = SIGNED[width] if ins.type[0] == "s" else None

    def step(block, mask: Array | None) -> None:
        places = address(block)
        block.check(places, size * len(destinations), mask, space, ins)
        memory = block.shared
        if space == "global":
            memory = block.memory
            block.stats.load_bytes += size * len(destinations) * lanes(block, mask)
        for j, write in enumerate(destinations):
            value = memory.load(places + j * size if j else places, width, mask)
            write(block, value if signed is None else value.view(signed), mask)

    return step


@instruction("st")
def store(ins: Instruction, decoder: Decoder) -> Step:
    space, width = space_of(ins), int(ins.type[1:])
    sources = [decoder.reader(name, UNSIGNED[width]) for name in listed(ins.args[1])]
    address = decoder.address(ins.args[0], space)
    size = width // 8

    def step(block, mask: Array | None) -> None:
        places = address(block)
        block.check(places, size * len(sources), mask, space, ins)
        memory = block.shared
        if space == "global":
            memory = block.memory
            block.stats.store_bytes += size * len(sources) * lanes(block, mask)
        for j, read in enumerate(sources):
            memory.store(places + j * size, read(block), width, mask)

    return step


@instruction("cp")
def copy_async(ins: Instruction, decoder: Decoder) -> Step:
    """Done at once, so that there is nothing to wait for."""
    if {"commit_group", "wait_group", "wait_all"} & set(ins.op):
        return lambda block, mask: None
    if ins.op[1] != "async" or "bulk" in ins.op:
        raise Unsupported(ins.text)
    to, source = decoder.address(ins.args[0], "shared"), decoder.address(ins.args[1], "global")
    size = ins.args[2]
    wanted = decoder.reader(ins.args[3] if len(ins.args) > 3 else size, np.uint32)  # bytes; the rest becomes zero
    width = 32 if size == 4 else 64

    def step(block, mask: Array | None) -> None:
        here, there, have = to(block), source(block), wanted(block)
        block.check(here, size, mask, "shared", ins)
        fetched = have != 0
        if mask is not None:
            fetched = fetched & mask
        if ((have != size) & fetched).any():
            raise Unsupported(f"part of a copy: {ins.text}")
        if fetched.any():
            block.check(there, size, fetched, "global", ins)
            block.stats.load_bytes += size * np.count_nonzero(fetched)
        for j in range(0, size, width // 8):
            value = block.memory.load(there + j, width, fetched)
            block.shared.store(here + j, np.where(fetched, value, value.dtype.type(0)), width, mask)

    return step


@instruction("mov")
def move(ins: Instruction, decoder: Decoder) -> Step:
    to, source = ins.args
    if isinstance(source, list):
        return _pack(decoder, to, source)
    if isinstance(to, list):
        return _unpack(decoder, to, source, int(ins.type[1:]))
    read = decoder.reader(source, bool if ins.type == "pred" else UNSIGNED[int(ins.type[1:])])
    write = decoder.writer(to)
    return lambda block, mask: write(block, read(block), mask)


def _pack(decoder: Decoder, to: str, sources: list) -> Step:
    width, write = decoder.width(to), decoder.writer(to)
    part = width // len(sources)
    reads = [decoder.reader(source, UNSIGNED[part]) for source in sources]

    def step(block, mask: Array | None) -> None:
        parts = np.stack([read(block) for read in reads], axis=1)  # the lowest first, as in memory
        write(block, parts.view(UNSIGNED[width]).reshape(-1), mask)

    return step


def _unpack(decoder: Decoder, to: list, source: str, width: int) -> Step:
    read = decoder.reader(source, UNSIGNED[width])
    part = width // len(to)
    writes = [decoder.writer(name) for name in to]

    def step(block, mask: Array | None) -> None:
        parts = np.ascontiguousarray(read(block)).view(UNSIGNED[part]).reshape(-1, len(writes))
        for j, write in enumerate(writes):
            write(block, parts[:, j].copy(), mask)

    return step


@instruction("cvta")
def convert_address(ins: Instruction, decoder: Decoder) -> Step:
    read, write = decoder.reader(ins.args[1], UNSIGNED[int(ins.type[1:])]), decoder.writer(ins.args[0])
    return lambda block, mask: write(block, read(block), mask)


@instruction("fence", "membar", "nanosleep", "griddepcontrol", "prefetch", "discard", "setmaxnreg")
def nothing(ins: Instruction, decoder: Decoder) -> Step:
    """To do when one thread block runs at a time."""
    return lambda block, mask: None


@instruction("createpolicy")
def create_policy(ins: Instruction, decoder: Decoder) -> Step:
    write = decoder.writer(ins.args[0])
    return lambda block, mask: write(block, np.zeros(block.threads, np.uint64), mask)


@instruction("trap")
def trap(ins: Instruction, decoder: Decoder) -> Step:
    def step(block, mask: Array | None) -> None:
        raise RuntimeError(f"{block.program.name}: trap")

    return step
