"""A task from text that every machine has: which package of Python's standard library a docstring is from."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pst_kernels.finetune import data

from .classes import of_the_largest

PACKAGES = 20  # those with the most docstrings
MOST_EACH = 220
LEAST_WORDS = 6
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def load(seed: int) -> data.Dataset:
    """The three splits; they depend on the version of Python."""
    return of_the_largest(_examples(Path(sysconfig.get_paths()["stdlib"])), PACKAGES, MOST_EACH, seed)


def _examples(library: Path) -> Iterator[data.Example]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if NOT_THE_LIBRARY.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few files are there to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                words = (ast.get_docstring(node) or "").split()
                if len(words) >= LEAST_WORDS:
                    yield data.Example(" ".join(words), parts[0].removesuffix(".py"), "/".join(parts))
