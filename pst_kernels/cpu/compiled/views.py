"""Addresses as arrays, for the compiled passes: that so much lies there is the caller's word."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .jit import part
from .threads import pointer_to


def _array_of(kind: Any) -> Any:
    @part
    def view(address, size):
        return numba.carray(pointer_to(address), (size,), kind)

    return view


def record_of(kind: np.dtype) -> Any:
    """A function that takes an address to the record there."""

    @part
    def view(address):
        return numba.carray(pointer_to(address), (1,), kind)[0]

    return view


floats_at, halves_at, words_at, integers_at, bytes_at = map(
    _array_of, (np.float32, np.uint16, np.uint32, np.int32, np.uint8)
)
