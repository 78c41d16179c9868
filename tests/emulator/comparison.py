"""Comparison and selection."""

from __future__ import annotations

import numpy as np

from .decoding import Decoder, Step, instruction
from .formats import UNSIGNED, Array
from .parsing import Instruction, Unsupported

ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
WITH = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction("setp")
def set_predicate(ins: Instruction, decoder: Decoder) -> Step:
    """A comparison with a NaN is false, and true under a name that ends in u."""
    how, kind = ins.op[1], ins.type
    if kind.endswith("x2"):
        raise Unsupported(ins.text)
    a, b = decoder.fetch(ins.args[1], kind), decoder.fetch(ins.args[2], kind)
    names = ins.args[0].split("|")
    writes = [decoder.writer(name) for name in names]
    other = decoder.reader(ins.args[3], bool) if len(ins.args) > 3 else None
    combine = WITH[ins.op[2]] if other else None
    floating = kind[0] == "f" or kind == "bf16"

    def compared(x: Array, y: Array) -> Array:
        if how in ORDERED and not (floating and how == "ne"):
            return ORDERED[how](x, y)
        nan = np.isnan(x) | np.isnan(y)
        if how == "ne":
            return (x != y) & ~nan
        if how in ("num", "nan"):
            return nan if how == "nan" else ~nan
        return ORDERED[how[:2]](x, y) | nan

    if how not in ORDERED and not (floating and (how in ("num", "nan") or (how[2:] == "u" and how[:2] in ORDERED))):
        raise Unsupported(ins.text)

    def step(block, mask: Array | None) -> None:
        value = compared(a(block), b(block))
        second = ~value if len(writes) > 1 else value
        for write, result in zip(writes, (value, second), strict=False):
            write(block, combine(result, other(block)) if combine and other else result, mask)

    return step


@instruction("selp")
def select(ins: Instruction, decoder: Decoder) -> Step:
    a, b = (decoder.reader(argument, UNSIGNED[int(ins.type[1:])]) for argument in ins.args[1:3])
    predicate, write = decoder.reader(ins.args[3], bool), decoder.writer(ins.args[0])
    return lambda block, mask: write(block, np.where(predicate(block), a(block), b(block)), mask)
