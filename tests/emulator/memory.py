"""Global and shared memory of a launch, byte for byte, and which accesses are faults."""

from __future__ import annotations

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


class Global(Memory):
    """One flat arena; every tensor's storage is copied in between red zones, and copied back afterwards."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        size = RED_ZONE
        self.places: dict[int, tuple[int, torch.UntypedStorage]] = {}
        for tensor in tensors:
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

    def address(self, tensor: torch.Tensor) -> int:
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
