"""Addresses as arrays, for the compiled passes: that so much lies there is the caller's word.

Each has a name of its own: Numba tells compiled functions apart by name and a number, and each process gives numbers
anew. Of two with one name, code that was kept on disk could call the other.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .jit import part
from .threads import pointer_to


@part
def floats_at(address, size):
    return numba.carray(pointer_to(address), (size,), np.float32)


@part
def halves_at(address, size):
    return numba.carray(pointer_to(address), (size,), np.uint16)


@part
def words_at(address, size):
    return numba.carray(pointer_to(address), (size,), np.uint32)


@part
def integers_at(address, size):
    return numba.carray(pointer_to(address), (size,), np.int32)


@part
def bytes_at(address, size):
    return numba.carray(pointer_to(address), (size,), np.uint8)


def record_of(name: str, kind: np.dtype) -> Any:
    """A function that takes an address to the record there; `name` is its own."""

    def view(address):
        return numba.carray(pointer_to(address), (1,), kind)[0]

    view.__name__ = view.__qualname__ = name
    return part(view)
