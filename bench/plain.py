"""What the benchmark uses of rich, in plain text: a console, a table, and a line in the place of a progress bar."""

from __future__ import annotations

import re
from typing import Any


class Console:
    is_terminal = False

    def __init__(self, width: int = 160):
        self.width = width

    def print(self, *things: object) -> None:
        """Without rich's marks, such as [bold]."""
        print(*(re.sub(r"\[/?[a-z ]+\]", "", str(thing)) for thing in things), flush=True)


class Table:
    def __init__(self, title: str = ""):
        self.title = title
        self.columns: list[str] = []
        self.right: list[bool] = []
        self.rows: list[tuple[str, ...]] = []

    def add_column(self, name: str, justify: str = "left", **_: Any) -> None:
        self.columns.append(name)
        self.right.append(justify == "right")

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def add_section(self) -> None:
        """A line between rows, which plain text goes without."""

    def __str__(self) -> str:
        lines = [tuple(self.columns), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]

        def text(line: tuple[str, ...]) -> str:
            cells = zip(line, widths, self.right, strict=True)
            return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

        return "\n".join([self.title, *map(text, lines)])


class Progress:
    """Every step's description on a line of its own."""

    def __init__(self, console: Console):
        self.console = console

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add_task(self, description: str, total: int) -> int:
        return 0

    def update(self, task: int, description: str) -> None:
        self.console.print(description)

    def advance(self, task: int) -> None:
        """Nothing to draw."""
