"""Global and shared memory of a launch, byte for byte, and which accesses are faults."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from .formats import UNSIGNED, Array

GLOBAL_BASE = 0x7F0000000000  # first global address; below it everything is a null-like pointer
SHARED_BASE = 0x1000
RED_ZONE = 4096  # bytes between tensors that belong to none


class MemoryFault(RuntimeError):  # noqa: N818  (CUDA's own word)
    """An access outside every tensor, or misaligned."""


class Memory:
    """Bytes, and the views of them as words."""

    def __init__(self, data: Array) -> None:
        self.data = data  # a multiple of 16 bytes
        self.words = {width: data.view(kind) for width, kind in UNSIGNED.items()}

    def load(self, address: Array, width: int, mask: Array | None) -> Array:
        """Where `mask` is not set, whatever lies at the beginning."""
        index = address >> (width.bit_length() - 4)
        return self.words[width].take(index if mask is None else np.where(mask, index, 0))

    def store(self, address: Array, value: Array, width: int, mask: Array | None) -> None:
        """Of lanes that store to one place, the last one's value stays."""
        index = address >> (width.bit_length() - 4)
        if mask is not None:
            index, value = index[mask], value[mask]
        self.words[width][index] = value

    def outside(self, address: Array, size: int) -> bool:
        """Whether one of the accesses leaves the memory."""
        return bool((address.view(np.uint64) > self.data.size - size).any())  # a negative one is a huge one

    def outside_of_tensors(self, address: Array, size: int) -> bool:
        return False


class Shared(Memory):
    def __init__(self, size: int) -> None:
        super().__init__(np.full(-(-max(size, 16) // 16) * 16, 0xFF, np.uint8))  # poisoned: NaN in every format


_behind: dict[int, list[torch.Tensor]] = {}


@contextlib.contextmanager
def behind(table: torch.Tensor, tensors: list[torch.Tensor]) -> Iterator[None]:
    """Inside, launches that are given `table`, int64, may go where it says `tensors` lie: see Global."""
    _behind[table.data_ptr()] = tensors
    try:
        yield
    finally:
        del _behind[table.data_ptr()]


class Global(Memory):
    """One flat arena; every tensor's storage is copied in between red zones, and copied back afterwards.

    So are the tensors behind a table. Its copy has the addresses that they have here; it is not copied back.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        size = RED_ZONE
        self.places: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self.tables: dict[int, int] = {}
        tables = [tensor for tensor in tensors if tensor.data_ptr() in _behind]
        for tensor in [*tensors, *(other for table in tables for other in _behind[table.data_ptr()])]:
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in self.places:
                start = -(-size // 256) * 256 + key % 256  # keeps the alignment
                self.places[key] = start, storage
                size = start + storage.nbytes() + RED_ZONE
        super().__init__(np.zeros(-(-size // 16) * 16, np.uint8))
        self.valid = np.zeros(self.data.size, bool)
        self._fits: dict[int, Array] = {}
        for start, storage in self.places.values():
            self.data[start : start + storage.nbytes()] = _bytes(storage)
            self.valid[start : start + storage.nbytes()] = True
        for table in tables:
            start, storage = self.places.pop(table.untyped_storage().data_ptr())
            numbers = self.data[start : start + storage.nbytes()].view(np.int64)
            given = numbers.copy()
            for tensor in _behind[table.data_ptr()]:
                numbers[given == tensor.data_ptr()] = self.address(tensor)
            self.tables[table.data_ptr()] = GLOBAL_BASE + start

    def address(self, tensor: torch.Tensor) -> int:
        if tensor.data_ptr() in self.tables:
            return self.tables[tensor.data_ptr()]
        start, _ = self.places[tensor.untyped_storage().data_ptr()]
        return GLOBAL_BASE + start + tensor.storage_offset() * tensor.element_size()

    def outside_of_tensors(self, address: Array, size: int) -> bool:
        """Aligned accesses: no more than the first and the last byte have to lie in tensors, as red zones are wide."""
        if size not in self._fits:
            self._fits[size] = self.valid[: self.data.size // size * size].reshape(-1, size)[:, [0, -1]].all(1)
        return not self._fits[size].take(address // size).all()

    def copy_back(self) -> None:
        for start, storage in self.places.values():
            _bytes(storage)[:] = self.data[start : start + storage.nbytes()]


def _bytes(storage: torch.UntypedStorage) -> Array:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
