"""A task from text that every machine has: which package of Python's standard library a docstring is from."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pst_kernels.finetune import data
from pst_kernels.finetune.copies import drop_copies, near_copies
from pst_kernels.finetune.split import stratified

PACKAGES = 20  # those with the most docstrings
MOST_EACH = 220
LEAST_WORDS = 6
VALIDATION_SHARE, TEST_SHARE = 0.2, 0.3
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def load(seed: int) -> data.Dataset:
    """The three splits; no text of one has a near-copy in another. They depend on the version of Python."""
    examples, copies = drop_copies(list(_examples(Path(sysconfig.get_paths()["stdlib"]))))
    by_package: dict[str, list[data.Example]] = defaultdict(list)
    for example in examples:
        by_package[example.label].append(example)
    largest = sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:PACKAGES]
    chosen: list[data.Example] = []
    for name in sorted(largest):
        found = by_package[name]
        chosen += random.Random(f"{seed}/{name}").sample(found, min(MOST_EACH, len(found)))
    groups = near_copies(chosen)
    rest, test, _ = stratified(chosen, TEST_SHARE, seed, groups)
    train, validation, _ = stratified(rest, VALIDATION_SHARE / (1.0 - TEST_SHARE), seed, groups)
    return data.Dataset(train, validation, test, sorted(largest), {"copies": copies})


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
