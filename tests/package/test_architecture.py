"""The house: which room may import which, and how long a file and a list of parameters may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pst_kernels as pst

PACKAGE = Path(pst.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# What a room may import beside itself. Files of the root are rooms of their own; "*" is the rest of the root.
ALLOWED = {
    "reference": set(),
    "operands": set(),
    "env": set(),
    "notices": set(),
    "files": set(),
    "subcommands": set(),
    "masks": {"operands"},
    "cpu": {"operands", "masks", "env", "notices"},
    "triton": {"operands", "masks", "env", "files"},
    "weighing": {"operands"},
    "ops": {"operands", "masks", "env", "notices", "weighing", "cpu", "triton"},
    "functional": {"operands", "masks", "ops"},
    "config": {"files", "masks"},
    "layers": {"operands", "masks", "weighing", "ops", "functional", "config", "env", "cpu"},
    "bypass": set(),
    "refusals": {"operands", "layers", "bypass"},
    "targets": {"config", "layers", "bypass", "refusals"},
    "show": {"files", "masks", "weighing", "layers", "operands", "config", "functional", "export", "checkpoint"},
    "export": {"files", "masks", "layers", "operands", "bypass", "targets"},
}
# Files that measure or compare, and so look at what they serve.
TOOLS = {"triton": {"cpu", "files"}}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> list[str]:
    """Modules of the package that a file imports, absolute; `from x import y` counts as x.y where that is a module."""
    package = ["pst_kernels", *path.parts[:-1]]
    found = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "pst_kernels"]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "pst_kernels":
                found += [f"{module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    own = path.parts[0].removesuffix(".py")
    if own not in ALLOWED:
        return
    allowed = ALLOWED[own] | {own}
    if path.parts[:2] == ("triton", "tools"):
        allowed |= TOOLS["triton"]
    assert {room(module) for module in imports(path)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_room_reaches_into_the_attic(path):
    source = (PACKAGE / path).read_text(encoding="utf-8")
    assert "from ..." not in source
    assert source.count("\n") <= 600


def test_compiled_passes_import_leaves_only():
    """A folder inside of a room imports nothing of the room."""
    for folder, parent in (("cpu/compiled", "cpu"), ("triton/tiles", "triton")):
        for path in (PACKAGE / folder).glob("*.py"):
            modules = imports(path.relative_to(PACKAGE))
            inside = "pst_kernels." + folder.replace("/", ".")
            assert [m for m in modules if room(m) == parent and not m.startswith(inside)] == []


# The signatures of the method's own functions are public, and name each tensor.
PUBLIC = {"scores", "prune_mask", "pst_linear"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_function_takes_more_than_eight_parameters(path):
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        compiled = any(mark in decorators for mark in ("jit", "row", "part", "reduction", "whole_pass", "intrinsic"))
        # autograd takes tensors one by one
        prescribed = node.name == "forward" and [argument.arg for argument in node.args.args[:1]] == ["ctx"]
        public = path.name in ("functional.py", "reference.py") and node.name in PUBLIC
        if not (compiled or prescribed or public):
            count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
            assert count <= 8, f"{path}:{node.lineno} {node.name} takes {count}"
