"""The terminal: rich's where it is installed, plain text where it is not. Results never depend on it."""

from __future__ import annotations

from typing import Any

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Table
except ModuleNotFoundError:
    from .plain import Console, Progress, Table  # type: ignore[assignment]

    RichProgress = None  # type: ignore[assignment,misc]

__all__ = ["Console", "Table", "console", "progress"]


def console() -> Console:
    """As wide as the terminal is, and with room for every column where output goes to a file."""
    here = Console()
    return here if here.is_terminal else Console(width=160)


def progress(out: Any) -> Any:
    """A bar over steps, as a context; its `console` prints above the bar."""
    if RichProgress is None:
        return Progress(out)
    return RichProgress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=out,
    )  # fmt: skip
