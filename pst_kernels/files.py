"""Files that are whole or absent: written under a temporary name, then renamed. JSON with errors that say what to
do.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends, and vanishes when it raises.

    A process killed in between leaves the earlier file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; a checkpoint is as readable as any other new file
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG that is whole or absent."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def read_json(path: str | Path, expected: str) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError or ValueError that say what was `expected` there."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected {expected}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); expected {expected}, save it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} instead of an object; expected {expected}")
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
