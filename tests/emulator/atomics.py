"""Atomic operations: one active thread after another, lowest first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .decoding import Decoder, Step, instruction
from .formats import UNSIGNED, Array, bf16_to_f32, f32_to_bf16, numpy_type
from .lanes import REDUCTIONS
from .moves import listed, space_of
from .parsing import Instruction, Unsupported

OPERATIONS = (*REDUCTIONS, "exch", "cas")


@instruction("atom")
def atomic(ins: Instruction, decoder: Decoder) -> Step:
    return _atomic(ins, decoder, listed(ins.args[0]), ins.args[1], ins.args[2:])


@instruction("red")
def atomic_without_result(ins: Instruction, decoder: Decoder) -> Step:
    return _atomic(ins, decoder, [], ins.args[0], ins.args[1:])


def _atomic(ins: Instruction, decoder: Decoder, names: list[str], where: Any, operands: list) -> Step:
    kind, space = ins.type, space_of(ins)
    operation = next((word for word in ins.op[1:] if word in OPERATIONS), None)
    if operation is None or kind.endswith("x2"):
        raise Unsupported(ins.text)
    width = 16 if kind == "bf16" else int(kind[1:])
    bits, size = UNSIGNED[width], width // 8
    address = decoder.address(where, space)
    values = [decoder.reader(operand, bits) for operand in listed(operands[0])]
    other = decoder.reader(operands[1], bits) if operation == "cas" else None
    writes = [decoder.writer(name) for name in names if name != "_"]
    result = _result(operation, kind)
    at_once = None if writes or kind == "bf16" else REDUCTIONS.get(operation)  # nobody asks what was there before

    def step(block, mask: Array | None) -> None:
        places = address(block)
        block.check(places, size * len(values), mask, space, ins)
        live = np.arange(block.threads) if mask is None else np.nonzero(mask)[0]
        memory = block.shared if space == "shared" else block.memory
        if space == "global":
            block.stats.store_bytes += len(live) * size * len(values)
        for j, read in enumerate(values):
            index = places[live] // size + j
            value = read(block)[live]
            if at_once:
                dtype = numpy_type(kind)
                at_once.at(memory.words[width].view(dtype), index, value.view(dtype))
                continue
            new = other(block)[live] if other else value
            old = _in_turn(memory.words[width], index, value, new, result)
            if writes:
                before = np.zeros(block.threads, bits)
                before[live] = old
                writes[j](block, before, mask)

    return step


def _in_turn(data: Array, index: Array, value: Array, new: Array, result: Callable[..., Array]) -> Array:
    """What each lane found; lanes with places of their own all at once, others in rounds, one of each place a round."""
    old = np.empty_like(value)
    left = np.arange(len(index))
    while len(left):
        _, first = np.unique(index[left], return_index=True)
        now = left[first]
        old[now] = data[index[now]]
        data[index[now]] = result(old[now], value[now], new[now])
        left = np.delete(left, first)
    return old


def _result(operation: str, kind: str) -> Callable[[Array, Array, Array], Array]:
    """Of what lies there, the operand, and for cas what is to replace it, all as bits."""
    if operation == "exch":
        return lambda old, value, new: value
    if operation == "cas":
        return lambda old, value, new: np.where(old == value, new, old)
    function = REDUCTIONS[operation]
    if kind == "bf16":
        return lambda old, value, new: f32_to_bf16(function(bf16_to_f32(old), bf16_to_f32(value)))
    dtype = numpy_type(kind)

    def applied(old: Array, value: Array, new: Array) -> Array:
        return function(old.view(dtype), value.view(dtype)).view(old.dtype)

    return applied
