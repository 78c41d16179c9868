"""Addresses as arrays and records, for the compiled passes: that so much lies there is the caller's word.

Each has a name of its own: Numba tells compiled functions apart by name and a number, and each process gives numbers
anew. Of two with one name, code that was kept on disk could call the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from .jit import part
from .threads import pointer_to


def _named(name: str, view: Callable) -> Any:
    view.__name__ = view.__qualname__ = name
    return part(view)


def _array_of(name: str, kind: Any) -> Any:
    def view(address, size):
        return numba.carray(pointer_to(address), (size,), kind)

    return _named(name, view)


def record_of(name: str, kind: np.dtype) -> Any:
    """A function that takes an address to the record there; `name` is its own."""

    def view(address):
        return numba.carray(pointer_to(address), (1,), kind)[0]

    return _named(name, view)


def numbers_of(kind: np.dtype) -> Callable[..., np.ndarray]:
    """A function that makes such a record, of int64 alone, from numbers by name; those that are not named are 0.

    All are written at once: one by one they take as long as a small product. The tensors whose addresses it holds must
    live as long as it is used.
    """
    zeros = dict.fromkeys(kind.names or (), 0)

    def numbers(**values: int) -> np.ndarray:
        return np.array(tuple((zeros | values).values()), np.int64)

    return numbers


floats_at, halves_at = _array_of("floats_at", np.float32), _array_of("halves_at", np.uint16)
words_at, integers_at = _array_of("words_at", np.uint32), _array_of("integers_at", np.int32)
bytes_at, longs_at = _array_of("bytes_at", np.uint8), _array_of("longs_at", np.int64)
