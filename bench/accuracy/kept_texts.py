"""The texts of a task in a file: another machine has another standard library and other packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pst_kernels.files import read_json, write_json
from pst_kernels.finetune import data

SPLITS = ("train", "validation", "test")


def load(folder: Path, source: str, make: Callable[[], data.Dataset]) -> data.Dataset:
    """From `folder`; what is not there is made, and kept there."""
    path = folder / f"{source}.json"
    if not path.is_file():
        write_json(path, dataclasses.asdict(make()))
    values = read_json(path, f"a file that --texts wrote for {source}")
    examples = {name: [data.Example(**one) for one in values[name]] for name in SPLITS}
    return data.Dataset(**values | examples)
