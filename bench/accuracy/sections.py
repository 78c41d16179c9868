"""A task from text that a Debian machine has: which section of the archive a package with a one-line description is in.

Nothing of the package was chosen on it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from pst_kernels.finetune import data

from .classes import of_the_largest

SECTIONS = 20  # those with the most packages
MOST_EACH = 250
LEAST_WORDS = 3


def load(seed: int) -> data.Dataset:
    """The three splits; they depend on what the machine's apt knows."""
    try:
        told = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "the task 'section' reads Debian's package lists; there is no apt-cache here"
        ) from error
    examples = list(_examples(told))
    if not examples:
        raise RuntimeError(
            "the task 'section' reads Debian's package lists; apt-cache knows no package here: run apt-get update"
        )
    return of_the_largest(examples, SECTIONS, MOST_EACH, seed)


def _examples(told: str) -> Iterator[data.Example]:
    seen = set()
    for paragraph in told.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if line[:1].isalpha() and ": " in line)
        words, section = fields.get("Description", "").split(), fields.get("Section", "").rpartition("/")[2]
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        # one of a source and section: such packages are described alike
        if len(words) >= LEAST_WORDS and section and (source, section) not in seen:
            seen.add((source, section))
            yield data.Example(" ".join(words), section, fields["Package"])
