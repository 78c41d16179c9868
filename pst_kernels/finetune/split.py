"""A part of the labelled texts, in the shares of the labels, in which no text has a near-copy in the rest."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from .reading import Example


def stratified(
    examples: Sequence[Example], share: float, seed: int, group_of: Mapping[Example, int]
) -> tuple[list[Example], list[Example], list[str]]:
    """(rest, part, labels): `part` takes `share` of every label, at least one text, and leaves one. Both keep order.

    Texts of one group stay together. `labels` are those that cannot be on both sides without tearing a group apart.
    """
    by_label: dict[str, list[int]] = defaultdict(list)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_label[example.label].append(index)
        if example in group_of:
            groups[group_of[example]].append(index)
    together = [members for members in groups.values() if len(members) > 1]
    grouped = {index for members in together for index in members}
    for label, indices in sorted(by_label.items()):
        if len(indices) < 2:
            raise ValueError(
                f"label {label!r} has one text only ({examples[indices[0]].source}), too few to split;"
                " add texts, or give --validation-file and --test-file"
            )
    sizes = {label: min(max(1, round(share * len(i))), len(i) - 1) for label, i in by_label.items()}
    chosen = _whole_groups(examples, together, share, seed, sizes)
    taken = Counter(examples[index].label for index in chosen)
    torn = []
    for label, indices in sorted(by_label.items()):
        single = [index for index in indices if index not in grouped]
        size = min(max(0, sizes[label] - taken[label]), len(single))
        chosen.update(random.Random(f"{seed}/{label}").sample(single, size))
        if not size + taken[label]:
            torn.append(label)
            chosen.update(random.Random(f"{seed}/{label}").sample(indices, sizes[label]))
    part = [example for index, example in enumerate(examples) if index in chosen]
    return [example for index, example in enumerate(examples) if index not in chosen], part, torn


def _whole_groups(
    examples: Sequence[Example], together: Sequence[list[int]], share: float, seed: int, sizes: Mapping[str, int]
) -> set[int]:
    """Groups that make up `share` of all grouped texts of every label, or less where the next one would be too large.

    A label with no other texts gets one group at least, the smallest that leaves a text of each label.
    """
    labels = {id(members): Counter(examples[i].label for i in members) for members in together}
    all_texts, all_grouped = Counter(e.label for e in examples), sum(labels.values(), Counter())
    order = list(together)
    random.Random(f"{seed}/groups").shuffle(order)
    taken: Counter[str] = Counter()
    chosen: list[list[int]] = []

    def take(members: list[int]) -> None:
        chosen.append(members)
        taken.update(labels[id(members)])

    for members in order:
        if all(
            taken[label] + count <= min(sizes[label], round(share * all_grouped[label]))
            for label, count in labels[id(members)].items()
        ):
            take(members)
    for label in sorted(all_grouped):
        if taken[label] or all_texts[label] > all_grouped[label]:
            continue
        fitting = [
            members
            for members in order
            if labels[id(members)][label]
            and all(taken[other] + count < all_texts[other] for other, count in labels[id(members)].items())
        ]
        if fitting:
            take(min(fitting, key=len))
    return {index for members in chosen for index in members}
