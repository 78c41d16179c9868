"""The calls of a layer's products with few tokens, kept ready: making one anew takes as long as the product of a small
layer, which is all that decoding and short texts are made of.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import threads as team
from .views import numbers_of

MOST_TOKENS = 128  # above, a product takes many times as long as its making
MOST_CALLS = 4  # of one layer: texts of many lengths must not fill the memory
NAME = "_pst_ready"  # of the attribute of the offsets that holds them
Key = tuple[object, ...]
Lists = tuple[Tensor, Tensor, Tensor, int, int]  # the fields of SparseRows
Scratch = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]
_CPU = torch.device("cpu")


class Ready:
    """A call whose record is filled in but for where x, y and the scratch lie.

    `frame`: the record's dtype, of int64 alone. `room`: the scratch of the threads, in bytes; `sums`: where in a
    thread's part they begin, behind x. `holds`: what the record has the address of and nobody else keeps.
    """

    def __init__(
        self, compiled: Any, frame: np.dtype, record: dict[str, int], rows: int, room: tuple[int, int], sums: int,
        holds: Any,
    ):  # fmt: skip
        names = list(frame.names or ())
        self.compiled, self.tasks, self.rows, self.room, self.sums, self.holds = (
            compiled, record["tasks"], rows, room, sums, holds,
        )  # fmt: skip
        self._kind = ctypes.c_int64 * len(names)
        self._record = numbers_of(frame)(**record).tobytes()
        self._places = tuple(names.index(name) for name in ("x", "y", "packed", "sums"))
        self.key: Key = ()

    def __call__(self, x: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
        room = scratch("few tokens", self.room, torch.uint8, _CPU).data_ptr()
        record = self._kind.from_buffer_copy(self._record)  # of this call: another thread may be at the same layer
        place_x, place_y, place_packed, place_sums = self._places
        record[place_x], record[place_y] = x.data_ptr(), out.data_ptr()
        record[place_packed], record[place_sums] = room, room + self.sums
        team.run_at(self.compiled, ctypes.addressof(record), self.tasks)
        return out

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the offsets, and what is pickled with them, has nothing ready: this holds addresses."""
        return type(None), ()


def _key(x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None) -> Key:
    """Changes with where the tensors lie, and when lists are loaded anew into the same memory."""
    return (
        x.dtype, values.data_ptr(), values.dtype, pointers.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if offsets.is_inference() else offsets._version, torch.get_num_threads(),
    )  # fmt: skip


def find(x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None) -> Ready | None:
    """The call that an earlier one left, where it fits these operands; the bias of the dtype that it always has."""
    calls = getattr(offsets, NAME, None)
    call = None if calls is None else calls.get(x.shape[0])
    if call is None or not x.is_contiguous() or not x.is_cpu:
        return None
    return call if call.key == _key(x, values, offsets, pointers, bias) else None


def keep(call: Ready, x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None) -> Ready:
    """With the offsets, which say where a layer's weights lie."""
    call.key = _key(x, values, offsets, pointers, bias)
    calls = dict(getattr(offsets, NAME, None) or {})  # copied: another thread may be looking
    calls.pop(x.shape[0], None)
    while len(calls) >= MOST_CALLS:
        calls.pop(next(iter(calls)))
    setattr(offsets, NAME, calls | {x.shape[0]: call})
    return call
