"""Labelled texts: reading, dropping copies, and a split in which no test text has a twin in training."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .bbc import bbc_news, drop_reprints
from .copies import canonical, drop_copies, named, near_copies, two_labels
from .reading import Example, read_file
from .split import stratified

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2


@dataclass
class Dataset:
    """The three splits, the label names in order of their number, and how many texts each step dropped."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is odd about the texts and was not refused

    def split(self, name: str) -> list[Example]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def summary(self) -> str:
        """One sentence: what was read, what was dropped, and how the rest is split."""
        n = self.counts
        reprints = f" and {n['reprints']} reprints" if n["reprints"] else ""
        held_out = f", {n['held_out']} that are held out dropped from training" if n["held_out"] else ""
        near = f", {n['near_copies']:,} near-copies kept with their like" if n["near_copies"] else ""
        return (
            f"{n['read']:,} texts of {len(self.labels)} labels, {n['copies']} copies{reprints} dropped{held_out}{near}:"
            f" {n['train']:,} for training, {n['validation']:,} for validation, {n['test']:,} for the test"
        )

    def fingerprint(self) -> str:
        """Changes when any text, label or the order changes: a resumed run must see the same data."""
        digest = hashlib.sha256()
        for name in SPLITS:
            for example in self.split(name):
                digest.update(json.dumps([name, example.text, example.label]).encode())
        return digest.hexdigest()[:16]


def load(
    train_file: Path | None, validation_file: Path | None, test_file: Path | None,
    text_column: str, label_column: str, seed: int,
) -> Dataset:  # fmt: skip
    """The three splits. Without a training file: BBC News. A split without a file is taken out of the training texts.

    Copies are dropped before the split, and so is a training text that stands in a given validation or test file.
    Near-copies (three hypotheses of one premise, an article and its reprint) stay, together on one side of the split.
    """
    if train_file is None and (validation_file or test_file):
        raise ValueError("--validation-file and --test-file need --train-file too; give all, or none for the BBC demo")
    if train_file is None:
        texts = bbc_news()
        train, copies, reprints = drop_reprints(texts)
        return _split({"train": train}, seed, {"read": len(texts), "copies": copies, "reprints": reprints}, [], {})
    files = {
        name: read_file(path, text_column, label_column)
        for name, path in (("train", train_file), ("validation", validation_file), ("test", test_file))
        if path is not None
    }
    notes = _one_spelling(files)
    read = len(files["train"])
    if contradictions := two_labels(example for examples in files.values() for example in examples):
        notes.append(_tell_two_labels(contradictions))
    files["train"], copies = drop_copies(files["train"])
    counts = {"read": read, "copies": copies, "reprints": 0, "two_labels": len(contradictions)}
    held_out = {canonical(e.text) for name in files if name != "train" for e in files[name]}
    files["train"] = [example for example in files["train"] if canonical(example.text) not in held_out]
    counts["held_out"] = read - copies - len(files["train"])
    if not files["train"]:
        raise ValueError("no training text is left: every one of them stands in the validation or test file as well")
    group_of = near_copies([example for examples in files.values() for example in examples])
    counts["near_copies"] = sum(example in group_of for example in files["train"])
    held_groups = {group_of.get(e) for name in files if name != "train" for e in files[name]} - {None}
    if close := [example.source for example in files["train"] if group_of.get(example) in held_groups]:
        notes.append(
            f"{len(close):,} training texts are near-copies of texts in the validation or test file and stay:"
            f" {named(close)}; remove them if the test should judge new texts only"
        )
    return _split(files, seed, counts, notes, group_of)


def _split(
    given: dict[str, list[Example]], seed: int, counts: dict[str, int], notes: list[str],
    group_of: Mapping[Example, int],
) -> Dataset:  # fmt: skip
    """Take what was not given out of the training texts."""
    train = given["train"]
    labels = sorted({example.label for example in train})
    if len(labels) < 2:
        raise ValueError(f"training needs at least two labels, but every text has {labels[0]!r}; see --label-column")
    for example in (example for name in given if name != "train" for example in given[name]):
        if example.label not in labels:
            raise ValueError(
                f"{example.source} has label {example.label!r}, which no training text has; known: {labels}"
            )
    shares = {"test": TEST_SHARE, "validation": VALIDATION_SHARE / (1 if "test" in given else 1 - TEST_SHARE)}
    for number, (name, share) in enumerate(shares.items()):
        if name not in given:
            train, given[name], torn = stratified(train, share, seed + number, group_of)
            if torn:
                notes.append(
                    f"all texts of {', '.join(map(repr, torn))} are near-copies of each other, so some are for training"
                    f" and some for {name}, which they make easy; give --{name}-file with other texts"
                )
    counts = {"held_out": 0, "near_copies": 0, "two_labels": 0} | counts
    counts |= {"train": len(train), "validation": len(given["validation"]), "test": len(given["test"])}
    return Dataset(train, given["validation"], given["test"], labels, counts, notes)


def _tell_two_labels(contradictions: Sequence[list[Example]]) -> str:
    places = [" and ".join(f"{e.source} ({e.label!r})" for e in examples) for examples in contradictions]
    texts = "1 text has" if len(places) == 1 else f"{len(places):,} texts have"
    used = "is" if len(places) == 1 else "are"
    return f"{texts} more than one label and {used} used with each: {named(places)}; remove the wrong lines, if any are"


def _one_spelling(files: dict[str, list[Example]]) -> list[str]:
    """Give labels such as 1 and 1.0, one number in two spellings, the shorter one, in place; what to tell about it."""
    seen = Counter(example.label for examples in files.values() for example in examples)
    spellings: dict[str, list[str]] = defaultdict(list)
    for label in seen:
        if re.fullmatch(r"-?\d+(\.0+)?", label):
            spellings[label.partition(".")[0]].append(label)
    read_as = {label: min(labels, key=len) for labels in spellings.values() for label in sorted(labels, key=len)[1:]}
    notes = []
    for label, instead in sorted(read_as.items()):
        first = next(e.source for examples in files.values() for e in examples if e.label == label)
        notes.append(
            f"label {label!r} (of {seen[label]:,} texts, first {first}) is read as {instead!r}, the same number"
        )
    if read_as:
        for name, examples in files.items():
            files[name] = [replace(e, label=read_as.get(e.label, e.label)) for e in examples]
    return notes
