"""Which weights a model's own code reads past the layer that holds them, told from the source of its classes.

`F.linear(x, self.q.weight)` never calls `self.q`: under PST such a layer would neither be pruned nor learn, and merging
would change the model. The same holds for weights that a model rescales in place.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

# What is asked of a weight without using its values.
HARMLESS = {"dtype", "device", "shape", "requires_grad", "ndim", "size", "dim", "numel", "is_meta", "is_cuda", "grad"}
QUESTIONS = {"isinstance", "hasattr", "id", "type", "getattr"}
# Methods that set a model up, and are no part of a forward.
SET_UP = re.compile(r"(^|_)(init|reset|tie|repr|load|save|prune|resize)")
IN_PLACE = re.compile(r"^(mul|div|add|sub|copy)_$")
FOREIGN_BASES = ("torch.", "transformers.modeling_utils", "transformers.integrations", "builtins")


class Read(NamedTuple):
    """One place in a class that uses a weight."""

    path: str  # of the layer, from `self`; its end alone if `anywhere`
    anywhere: bool
    method: str
    guards: tuple[tuple[Any, bool], ...]  # conditions of self alone, and what they must be for this place to run


class Bypass(NamedTuple):
    """Why a layer is not PST's to convert."""

    where: str  # class and method
    sometimes: bool  # whether the layer is called as well, on another path


def weights_read_past_their_layers(model: nn.Module) -> dict[str, Bypass]:
    """Layer name -> where its weight is read. Classes without source (typed at a prompt) tell nothing."""
    found: dict[str, Bypass] = {}
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for prefix, module in model.named_modules(remove_duplicate=False):
        kind: Any = type(module)
        reads, called = _reads(kind)
        for read in reads:
            if not all(_holds(condition, module) == wanted for condition, wanted in read.guards):
                continue
            where = f"{type(module).__qualname__}.{read.method}"
            inside = f"{prefix}." if prefix else ""
            if not read.anywhere:
                found.setdefault(inside + read.path, Bypass(where, read.path in called))
                continue
            for name in names:
                if name.startswith(inside) and name.endswith(f".{read.path}"):
                    found.setdefault(name, Bypass(where, False))
    return found


@functools.cache
def _reads(cls: type) -> tuple[list[Read], set[str]]:
    """The places of a class that use weights, and the layers that it calls."""
    methods: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        if not base.__module__.startswith(FOREIGN_BASES) and base.__module__ != "torch":
            for name, value in vars(base).items():
                if inspect.isfunction(value) and not SET_UP.search(name):
                    methods.setdefault(name, inspect.unwrap(value))
    if not any(_mentions_weight(method.__code__) for method in methods.values() if inspect.isfunction(method)):
        return [], set()
    reads: list[Read] = []
    called: set[str] = set()
    for name, method in methods.items():
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            continue
        reads += _walk(tree, name, (), harmless=False)
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        called |= {path for root, path in map(_chain, calls) if root == "self"}
    return reads, called


def _mentions_weight(code: CodeType) -> bool:
    return "weight" in code.co_names or any(_mentions_weight(c) for c in code.co_consts if isinstance(c, CodeType))


def _walk(node: ast.AST, method: str, guards: tuple[tuple[Any, bool], ...], harmless: bool) -> Iterator[Read]:
    if isinstance(node, (ast.If, ast.IfExp)):
        condition = _condition(node.test)
        yield from _walk(node.test, method, guards, harmless)
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            known = (*guards, (condition, wanted)) if condition is not None else guards
            children: list[Any] = branch if isinstance(branch, list) else [branch]
            for part in children:
                yield from _walk(part, method, known, harmless)
        return
    if isinstance(node, ast.Attribute):
        harmless = harmless or node.attr in HARMLESS or node.attr.startswith("_")
        if node.attr == "weight" and isinstance(node.ctx, ast.Load) and not harmless:
            root, path = _chain(node.value)
            if root == "self" and path:
                yield Read(path, False, method, guards)
    elif isinstance(node, ast.Call):
        changed = _changed_in_place(node)
        if changed:
            yield Read(changed, True, method, guards)
        harmless = harmless or (isinstance(node.func, ast.Name) and node.func.id in QUESTIONS)
    elif isinstance(node, ast.Compare):
        harmless = harmless or all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
    elif isinstance(node, ast.Subscript):
        harmless = False
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, method, guards, harmless)


def _changed_in_place(call: ast.Call) -> str:
    """`attention.output` of `block.attention.output.weight.div_(2)`, where `block` is some part of the model."""
    root, path = _chain(call.func)
    layer, weight, rest = path.partition(".weight.")
    known = weight and IN_PLACE.match(rest.removeprefix("data."))
    return layer if known and root not in ("", "self") and layer else ""


def _chain(node: Any) -> tuple[str, str]:
    """("self", "attention.q") of `self.attention.q`; ("", "") of what is no such chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, ".".join(reversed(parts))) if isinstance(node, ast.Name) else ("", "")


def _condition(test: ast.expr) -> Any:
    """A condition that only asks for attributes of `self`, compiled; None for another."""
    allowed = (
        ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Attribute, ast.Name, ast.Constant, ast.boolop, ast.unaryop, ast.cmpop,
        ast.expr_context,
    )  # fmt: skip
    nodes = list(ast.walk(test))
    if not all(isinstance(n, allowed) for n in nodes) or any(isinstance(n, ast.Name) and n.id != "self" for n in nodes):
        return None
    if any(isinstance(n, ast.Attribute) and n.attr == "training" for n in nodes):  # both come to pass
        return None
    return compile(ast.fix_missing_locations(ast.Expression(test)), "<condition>", "eval")


def _holds(condition: Any, module: nn.Module) -> bool | None:
    try:
        return bool(eval(condition, {"__builtins__": {}}, {"self": module}))
    except Exception:
        return None
