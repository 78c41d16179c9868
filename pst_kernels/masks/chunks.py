"""Chunks of columns, by which lists of kept weights are ordered: the pointers to what each row keeps in each chunk."""

from __future__ import annotations

import numpy as np

CHUNK = 128  # columns: an offset fits a byte, and a chunk of 64 tokens in fp32 is 32 KB, a core's first cache
MOST = 2**31 - 1  # kept weights: the pointers are int32


def chunks_of(columns: int) -> int:
    return -(-columns // CHUNK)


def fill_pointers(counts: np.ndarray, pointers: np.ndarray) -> None:
    """int32 pointers (runs + 1,) for the number of kept weights of every run; `counts` may be pointers[1:].

    Raises ValueError where int32 cannot count them.
    """
    total = int(counts.sum(dtype=np.int64))
    if total > MOST:
        raise ValueError(
            f"weight keeps {total} weights, but lists of kept weights hold at most {MOST}; split the layer, or keep"
            " it dense"
        )
    np.cumsum(counts, out=pointers[1:])
    pointers[0] = 0
