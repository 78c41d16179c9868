"""A terminal's width where there is one, and room for every column where output goes to a file."""

from rich.console import Console


def console() -> Console:
    here = Console()
    return here if here.is_terminal else Console(width=160)
