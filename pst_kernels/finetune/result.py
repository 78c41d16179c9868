"""What a method leaves behind, in a file that says it has ended. Imports nothing heavy: the command starts sooner."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_json


@dataclass
class Result:
    """For the table, the plot and results.json."""

    row: dict[str, Any]
    details: dict[str, Any]
    history: dict[str, list] = field(default_factory=dict)


def write_result(work: Path, method: str, result: Result) -> None:
    write_json(work / f"{method}.json", asdict(result))


def read_result(work: Path, method: str) -> Result | None:
    """The result of a method that has ended, or None."""
    path = work / f"{method}.json"
    return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
