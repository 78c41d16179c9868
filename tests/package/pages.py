"""README and the pages of docs/: the Python that they show, and what they say it prints."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = {path.stem: path for path in (README, *sorted((ROOT / "docs").glob("*.md")))}


def blocks(page: str) -> list[tuple[str, str | None]]:
    """The Python of a page, block by block, and what each is said to print."""
    found = re.findall(r"```(python|text)\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.S)
    following = [*found[1:], ("", "")][: len(found)]
    return [
        (text, then if after == "text" else None)
        for (kind, text), (after, then) in zip(found, following, strict=True)
        if kind == "python"
    ]
