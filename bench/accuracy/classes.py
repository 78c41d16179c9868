"""A data set of the largest classes of many labelled texts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

from pst_kernels.finetune import data
from pst_kernels.finetune.copies import drop_copies, near_copies
from pst_kernels.finetune.split import stratified

VALIDATION_SHARE, TEST_SHARE = 0.2, 0.3


def of_the_largest(examples: Iterable[data.Example], classes: int, most_each: int, seed: int) -> data.Dataset:
    """The three splits; no text of one has a near-copy in another."""
    distinct, copies = drop_copies(list(examples))
    by_label: dict[str, list[data.Example]] = defaultdict(list)
    for example in distinct:
        by_label[example.label].append(example)
    largest = sorted(by_label, key=lambda name: (-len(by_label[name]), name))[:classes]
    chosen: list[data.Example] = []
    for name in sorted(largest):
        found = by_label[name]
        chosen += random.Random(f"{seed}/{name}").sample(found, min(most_each, len(found)))
    groups = near_copies(chosen)
    rest, test, _ = stratified(chosen, TEST_SHARE, seed, groups)
    train, validation, _ = stratified(rest, VALIDATION_SHARE / (1.0 - TEST_SHARE), seed, groups)
    return data.Dataset(train, validation, test, sorted(largest), {"copies": copies})
