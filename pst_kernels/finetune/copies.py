"""Which texts are copies, which have two labels, and which are alike enough to belong on one side of a split."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from .reading import Example

SHINGLE = 8  # words in a row that two texts must share to count as overlapping
OVERLAP = 0.3  # of the shorter text's shingles, above which two texts are near-copies
# A run of words that more texts have, or more than a tenth of them, is a prompt or a footer and says nothing.
MOST_TEXTS, MOST_SHARE, LEAST_TEXTS = 50, 0.1, 3
NAMED = 3  # of a long list, in a message


def canonical(text: str) -> str:
    """Single spaces and Unicode's composed form (NFC): texts that are equal in it are copies."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def drop_copies(examples: Sequence[Example]) -> tuple[list[Example], int]:
    """The first of every group of copies with one label, and how many were dropped.

    Copies with two labels are no duplicates: the first of each label stays.
    """
    first: dict[tuple[str, str], Example] = {}
    for example in examples:
        first.setdefault((canonical(example.text), example.label), example)
    return list(first.values()), len(examples) - len(first)


def two_labels(examples: Iterable[Example]) -> list[list[Example]]:
    """For each text that has several labels: the first example of each label."""
    found: dict[str, dict[str, Example]] = defaultdict(dict)
    for example in examples:
        found[canonical(example.text)].setdefault(example.label, example)
    return [list(labels.values()) for labels in found.values() if len(labels) > 1]


def near_copies(examples: Sequence[Example]) -> dict[Example, int]:
    """The number of its group, for every text that is like another one.

    Alike are texts that differ in case and punctuation only, and texts that share more than 30 % of the eight-word
    runs of the shorter one, runs that very many texts have left out. Groups are closed: what is like one member is in.
    """
    group = list(range(len(examples)))

    def top(i: int) -> int:
        while group[i] != i:
            group[i] = i = group[group[i]]
        return i

    def unite(i: int, j: int) -> None:
        group[max(top(i), top(j))] = min(top(i), top(j))

    equal: dict[str, int] = {}
    whole: dict[str, list[int]] = defaultdict(list)
    holders: dict[int, list[int]] = defaultdict(list)  # a shingle, as its hash to save memory -> who has it
    for i, example in enumerate(examples):
        unite(i, equal.setdefault(canonical(example.text), i))
        letters = re.sub(r"[\W_]+", " ", example.text).casefold().strip()
        if letters:  # emoji have none, and are not alike for that
            whole[letters].append(i)
        words = letters.split()
        for shingle in {hash(" ".join(words[k : k + SHINGLE])) for k in range(len(words) - SHINGLE + 1)}:
            holders[shingle].append(i)
    most = min(MOST_TEXTS, max(LEAST_TEXTS, round(MOST_SHARE * len(examples))))
    for members in whole.values():
        if len(members) <= most:
            for i in members[1:]:
                unite(i, members[0])
    sizes: Counter[int] = Counter()
    earlier: dict[int, list[list[int]]] = defaultdict(list)  # a text -> for each shared shingle, who had it before
    for members in holders.values():
        if len(members) <= most:
            sizes.update(members)
            for place, i in enumerate(members[1:], 1):
                earlier[i].append(members[:place])
    for i, lists in earlier.items():
        shared = Counter(j for members in lists for j in members)
        for j, count in shared.items():
            if count > OVERLAP * min(sizes[i], sizes[j]):
                unite(i, j)
    members_of = Counter(top(i) for i in range(len(examples)))
    return {example: top(i) for i, example in enumerate(examples) if members_of[top(i)] > 1}


def named(sources: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(sources) - NAMED:,} more" if len(sources) > NAMED else ""
    return ", ".join(sources[:NAMED]) + more
