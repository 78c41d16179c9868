"""PTX text to a Program."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Unsupported(NotImplementedError):  # noqa: N818
    """A PTX instruction or operand this emulator does not implement."""


class Address(NamedTuple):
    """[base + offset]; a base is a register, a parameter or a name in shared memory."""

    base: str
    offset: int


class Bits(NamedTuple):
    """A floating-point constant, by its bits."""

    value: Any


@dataclass
class Instruction:
    predicate: str | None
    negated: bool
    op: list[str]  # add.rn.f32 is add, rn, f32
    args: list[Any]  # str: a register or a name; int; Bits; Address; or a list of those
    text: str

    @property
    def type(self) -> str:
        return self.op[-1]


@dataclass
class Program:
    name: str
    parameters: list[tuple[str, int]]  # and bytes
    instructions: list[Instruction]
    labels: dict[str, int]
    widths: dict[str, int]  # bits of a register, by its name or by its name without the number; 1: a predicate
    shared: int  # bytes
    threads: int  # 0: the text doesn't say
    shared_names: set[str] = field(default_factory=set)
    code: list = field(default_factory=list)  # instructions as decoding made them, on their first use


_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+(?:\|[^,\s]+)?")
_SHARED_NAME = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$.]+)")


def _operand(token: str) -> Any:
    token = token.strip()
    if token.startswith("{"):
        return [_operand(part) for part in token[1:-1].split(",")]
    if token.startswith("["):
        found = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", token)
        if not found:
            raise Unsupported(f"address {token}")
        return Address(found[1], int(found[2] or "0", 0))
    if token.startswith(("0f", "0F")):
        return Bits(np.uint32(int(token[2:], 16)))
    if token.startswith(("0d", "0D")):
        return Bits(np.uint64(int(token[2:], 16)))
    if re.match(r"^-?(0x[0-9a-fA-F]+|\d+)U?$", token):
        return int(token.rstrip("U"), 0)
    return token


def _statements(body: str) -> list[str]:
    """Without comments; a label is a statement that ends in a colon."""
    lines = re.sub(r"//[^\n]*", "", body).split("\n")
    found = []
    for line in lines:
        rest = line.strip()
        while label := re.match(r"^([$\w]+):\s*", rest):
            found.append(label[1] + ":")
            rest = rest[label.end() :]
        found += [statement.strip() for statement in rest.split(";") if statement.strip()]
    return found


def _body(ptx: str, start: int) -> str:
    """From behind the kernel's opening brace to the one that closes it."""
    depth = 1
    for brace in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return ptx[start : start + brace.start()]
    raise Unsupported("a kernel without an end")


def _declare(widths: dict[str, int], statement: str) -> None:
    declared = re.match(r"^\.reg\s+\.(\w+)\s+(.+)$", statement)
    if not declared:
        return
    width = 1 if declared[1] == "pred" else int(declared[1][1:])
    for name in declared[2].split(","):
        name = re.sub(r"<\d+>$", "", name.strip())
        if widths.setdefault(name, width) != width:  # registers of inline assembly have a scope, ours don't
            raise Unsupported(f"{name} is a register of {widths[name]} bits and one of {width}")


def parse(ptx: str, shared: int) -> Program:
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.S)
    if not head:
        raise Unsupported("no kernel entry")
    parameters = [
        (found[2], int(found[1][1:]) // 8)
        for found in re.finditer(r"\.param\s+\.([bfsu]\d+)[^,]*?\s([\w$]+)\s*(?:,|$)", head[2])
    ]
    threads = re.search(r"\.reqntid\s+(\d+)", head[3]) or re.search(r"\.maxntid\s+(\d+)", head[3])
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    widths: dict[str, int] = {}
    for statement in _statements(_body(ptx, head.end())):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement.startswith("."):
            _declare(widths, statement)
        elif statement not in "{}":
            found = re.match(r"^(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)$", statement, re.S)
            if not found:
                raise Unsupported(statement)
            op = found[3].replace("::", ".").split(".")
            args = [_operand(token) for token in _OPERANDS.findall(found[4])]
            instructions.append(Instruction(found[2], found[1] == "!", op, args, statement))
    names = set(_SHARED_NAME.findall(ptx))
    return Program(
        head[1], parameters, instructions, labels, widths, shared, int(threads[1]) if threads else 0, names,
        [None] * len(instructions),
    )  # fmt: skip
