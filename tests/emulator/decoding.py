"""From an instruction to a function that executes it. What can be known before is found out once: where the operands
lie, how wide they are, and which numpy type they have.

A reader takes a block and returns an array with a value for every thread; a writer takes a block, such an array and the
mask of the threads that write (None: all). Arrays in registers are never changed, only replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import (
    BOOL,
    FLOATING,
    PAIRS,
    UNSIGNED,
    Array,
    as_bits,
    bf16_to_f32,
    f16_to_f32,
    f32_to_bf16,
    halves,
    join,
    numpy_type,
)
from .memory import GLOBAL_BASE, SHARED_BASE
from .parsing import Address, Bits, Instruction, Program, Unsupported

if TYPE_CHECKING:
    from .block import Block

Read = Callable[["Block"], Array]
Write = Callable[["Block", Array, "Array | None"], None]
Step = Callable[["Block", "Array | None"], None]

INSTRUCTIONS: dict[str, Callable[[Instruction, Decoder], Step]] = {}
CONTROL = {"bra": "bra", "ret": "ret", "exit": "ret", "bar": "bar", "barrier": "bar"}  # Block.run does them


def instruction(*names: str) -> Callable[[Any], Any]:
    """Registers a function from (instruction, decoder) to a step under the first words of instructions."""

    def register(make: Any) -> Any:
        INSTRUCTIONS.update(dict.fromkeys(names, make))
        return make

    return register


def _names(arguments: list[Any]) -> Iterator[str]:
    """Of registers, and other names, that an instruction's arguments hold."""
    for argument in arguments:
        if isinstance(argument, list):
            yield from _names(argument)
        elif isinstance(argument, Address):
            yield argument.base
        elif isinstance(argument, str):
            yield from argument.split("|")


class Decoder:
    """For one program, run by blocks of `threads`."""

    def __init__(self, program: Program, threads: int) -> None:
        self.program, self.threads = program, threads
        self.lane = np.arange(threads) % 32
        self._slots: dict[str, tuple[int, int]] = {}
        self._initial: list[Array] = []
        self._poison: dict[int, Array] = {}
        index = np.arange(threads)
        for name, value in {
            "%tid.x": index, "%tid.y": 0 * index, "%tid.z": 0 * index, "%ntid.x": 0 * index + threads,
            "%ntid.y": 0 * index + 1, "%ntid.z": 0 * index + 1, "%laneid": self.lane, "%warpid": index // 32,
            **{f"%{kind}.{axis}": 0 * index for kind in ("ctaid", "nctaid") for axis in "xyz"},
        }.items():  # fmt: skip
            self._slots[name] = len(self._initial), 32
            self._initial.append(value.astype(np.uint32))
        for name in {name for ins in program.instructions for name in _names([ins.predicate, *ins.args])}:
            self._add(name)

    def _add(self, name: str) -> None:
        """What is read before it is written is poison: all bits are set."""
        width = self.declared(name)
        if width is not None and name not in self._slots:
            self._slots[name] = len(self._initial), width
            if width not in self._poison:  # one for all: arrays in registers are never changed
                kind, bits = (bool, True) if width == 1 else (UNSIGNED[width], 2**width - 1)
                self._poison[width] = np.full(self.threads, bits, kind)
            self._initial.append(self._poison[width])

    def fresh_registers(self, place: tuple[int, ...], grid: tuple[int, ...]) -> list[Array]:
        registers = self._initial.copy()
        for kind, values in (("ctaid", place), ("nctaid", grid)):
            for axis, value in zip("xyz", values, strict=True):
                registers[self._slots[f"%{kind}.{axis}"][0]] = np.full(self.threads, value, np.uint32)
        return registers

    def slot(self, name: str) -> tuple[int, int]:
        """Place in Block.registers, and width in bits."""
        if name not in self._slots:
            raise Unsupported(f"register {name}")
        return self._slots[name]

    def width(self, name: str) -> int:
        return self.slot(name)[1]

    def declared(self, name: str) -> int | None:
        widths = self.program.widths
        return widths.get(name, widths.get(re.sub(r"\d+$", "", name)))

    def decode(self, ins: Instruction) -> tuple[str, Step | None, int | None, bool, int]:
        """Kind, step (None: control flow), place of the guarding predicate, whether it is negated, branch target."""
        kind = ins.op[0]
        guard = None if ins.predicate is None else self.slot(ins.predicate)[0]
        if kind in CONTROL:
            target = self.program.labels[ins.args[0]] if kind == "bra" else 0
            return CONTROL[kind], None, guard, ins.negated, target
        if kind not in INSTRUCTIONS:
            raise Unsupported(ins.text)
        return kind, INSTRUCTIONS[kind](ins, self), guard, ins.negated, 0

    # -- operands as bits
    def constant(self, argument: Any, dtype: np.dtype) -> Array | None:
        """The value for every thread of what is no register."""
        bits = 8 * dtype.itemsize
        if isinstance(argument, int):
            if dtype == BOOL:
                return np.full(self.threads, bool(argument))
            return np.full(self.threads, argument & (2**bits - 1), UNSIGNED[bits]).view(dtype)
        if isinstance(argument, Bits):
            return np.full(self.threads, argument.value).astype(UNSIGNED[bits]).view(dtype)
        if argument in self.program.shared_names:
            return np.full(self.threads, SHARED_BASE, UNSIGNED[bits]).view(dtype)
        return None

    def reader(self, argument: Any, dtype: Any) -> Read:
        dtype = np.dtype(dtype)
        constant = self.constant(argument, dtype)
        if constant is not None:
            return lambda block: constant
        slot, width = self.slot(argument)
        bits = 8 * dtype.itemsize
        if dtype == BOOL:
            return (lambda b: b.registers[slot]) if width == 1 else (lambda b: b.registers[slot].astype(bool))
        if width != bits:
            return lambda b: b.registers[slot].astype(UNSIGNED[bits]).view(dtype)
        if dtype.kind == "u":
            return lambda b: b.registers[slot]
        return lambda b: b.registers[slot].view(dtype)

    def writer(self, name: str) -> Write:
        if name == "_":
            return lambda block, value, mask: None
        slot, width = self.slot(name)
        bits = BOOL if width == 1 else UNSIGNED[width]

        def write(block: Block, value: Array, mask: Array | None) -> None:
            if value.dtype is not bits:
                value = as_bits(value, width)
            if mask is not None:
                value = np.where(mask, value, block.registers[slot])
            block.registers[slot] = value

        return write

    def address(self, argument: Address, space: str) -> Read:
        """Offsets into the memory of a space, int64."""
        if space == "shared":
            base, offset = self.reader(argument.base, np.uint32), argument.offset - SHARED_BASE
            return lambda block: base(block).astype(np.int64) + offset
        base, offset = self.reader(argument.base, np.int64), argument.offset - GLOBAL_BASE
        return lambda block: base(block) + offset

    # -- operands as numbers
    def fetch(self, argument: Any, kind: str) -> Read:
        """By PTX type: bf16 as float32; pairs as (2, threads), low halves first, in float32 or 16-bit integers."""
        if kind == "bf16":
            bits = self.reader(argument, np.uint16)
            return lambda block: bf16_to_f32(bits(block))
        if kind in PAIRS:
            word = self.reader(argument, np.uint32)
            widen = {"bf16x2": bf16_to_f32, "f16x2": f16_to_f32}.get(kind, lambda half: half.view(numpy_type(kind[:3])))
            return lambda block: np.stack([widen(half) for half in halves(word(block))])
        return self.reader(argument, numpy_type(kind))

    def put(self, name: str, kind: str) -> Write:
        """The other way."""
        write = self.writer(name)
        if kind == "bf16":
            return lambda block, value, mask: write(block, f32_to_bf16(value.astype(np.float32)), mask)
        if kind in PAIRS:
            narrow = {
                "bf16x2": lambda half: f32_to_bf16(half.astype(np.float32)),
                "f16x2": lambda half: half.astype(np.float16).view(np.uint16),
            }.get(kind, lambda half: half.astype(numpy_type(kind[:3])).view(np.uint16))
            return lambda block, value, mask: write(block, join(narrow(value[0]), narrow(value[1])), mask)
        if kind[0] == "f":
            floating = FLOATING[int(kind[1:])]
            return lambda block, value, mask: write(block, value.astype(floating, copy=False), mask)
        return write
