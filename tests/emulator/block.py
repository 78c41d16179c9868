"""One thread block: its registers, one numpy array each, and the control flow of its threads.

As long as all threads go the same way, one program counter serves them all. After a branch that only some take, those
that are furthest behind go first, until they meet the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import decoding
from .formats import Array
from .memory import Global, MemoryFault, Shared
from .parsing import Instruction, Program

MOST_INSTRUCTIONS = 50_000_000  # a kernel that has not ended by then hangs


class Block:
    def __init__(
        self, program: Program, decoder: decoding.Decoder, memory: Global, parameters: dict[str, Array],
        place: tuple[int, ...], grid: tuple[int, ...], stats: Any,
    ) -> None:  # fmt: skip
        self.program, self.decoder, self.stats = program, decoder, stats
        self.memory, self.shared, self.parameters = memory, Shared(program.shared), parameters
        self.threads = decoder.threads
        self.registers = decoder.fresh_registers(place, grid)

    def check(self, address: Array, size: int, mask: Array | None, space: str, instruction: Instruction) -> None:
        """Raise a MemoryFault unless every active lane's `size` bytes are aligned and lie in memory."""
        if mask is not None:
            address = address[mask]
        memory = self.shared if space == "shared" else self.memory
        where = f"in {self.program.name}: {instruction.text}"
        if memory.outside(address, size):
            raise MemoryFault(f"{space} access outside memory {where}")
        if (address & (size - 1)).any():
            raise MemoryFault(f"misaligned {size}-byte {space} access {where}")
        if memory.outside_of_tensors(address, size):
            raise MemoryFault(f"access outside every tensor {where}")

    def run(self) -> None:
        code, decoder, registers, ops = self.program.code, self.decoder, self.registers, self.stats.ops
        end, executed = len(code), 0
        alive: Array | None = None  # None: all threads
        counters = np.zeros(self.threads, np.int64)  # of the threads, while they go different ways
        pc, uniform = 0, True
        try:
            while True:
                if uniform:
                    if pc >= end:
                        return
                    active = alive
                else:
                    live = counters < end
                    if alive is not None:
                        live &= alive
                    if not live.any():
                        return
                    pc = int(counters[live].min())
                    active = live & (counters == pc)
                    if active.all():
                        uniform, active = True, None
                executed += 1
                if executed > MOST_INSTRUCTIONS:
                    raise RuntimeError(f"{self.program.name}: no end after 50 million instructions")
                entry = code[pc]
                if entry is None:
                    entry = code[pc] = decoder.decode(self.program.instructions[pc])
                kind, step, guard, negated, target = entry
                mask = active
                if guard is not None:
                    predicate = registers[guard]
                    if negated:
                        predicate = ~predicate
                    mask = predicate if active is None else predicate & active
                    if mask.all():
                        mask = None
                if step is not None:
                    if mask is None or mask.any():
                        step(self, mask)
                        ops[kind] += 1
                elif kind == "bra":
                    every = np.ones(self.threads, bool) if active is None else active
                    taken = every if mask is None else mask
                    if not uniform:
                        counters[every] = np.where(taken, target, pc + 1)[every]
                    elif taken[every].all():
                        pc = target
                    elif not taken[every].any():
                        pc += 1
                    else:
                        counters[:] = np.where(taken, target, pc + 1)
                        uniform = False
                    continue
                elif kind == "ret":
                    if mask is None:
                        return
                    alive = ~mask if alive is None else alive & ~mask
                    if not alive.any():
                        return
                    if uniform:
                        counters[:] = pc + 1
                        uniform = False
                        continue
                elif not uniform and (counters[slice(None) if alive is None else alive] != pc).any():
                    raise RuntimeError(f"{self.program.name}: barrier reached by some threads only")
                if uniform:
                    pc += 1
                else:
                    counters[active] += 1
        finally:
            self.stats.instructions += executed
