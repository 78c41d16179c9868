"""Teach the emulator tensors that a launch is not given, but whose addresses lie in a tensor that it is given."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor


class Behind(dict[int, list[Tensor]]):
    """By the address of a table, what it points to."""

    def know(self, mask_table: Any) -> None:
        for group in mask_table.groups:
            self[group.rows.data_ptr()] = [tensor for layer in group.members for tensor in layer.tensors]


def known(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Behind:
    """What is put in here lies between red zones too: the emulator's copy of a table has the emulator's addresses."""
    behind, memory = Behind(), module.Global
    add, freeze, thaw = memory.add, memory.freeze, memory.thaw

    def words_of(self: Any) -> dict[int, np.ndarray]:
        """The tables of a launch, in the emulator's memory."""
        blocks = {key: self.blocks[key] for key in behind if key in self.blocks}
        return {key: self.data[start : start + st.nbytes()].view(np.int64) for key, (start, st) in blocks.items()}

    def add_all(self: Any, tensor: Tensor) -> int:
        for other in behind.get(tensor.data_ptr(), ()):
            add(self, other)
        return add(self, tensor)

    def freeze_tables(self: Any) -> None:
        freeze(self)
        self.tables = {key: words.copy() for key, words in words_of(self).items()}
        for key, words in words_of(self).items():
            for other in behind[key]:
                words[self.tables[key] == other.data_ptr()] = add(self, other)

    def thaw_tables(self: Any) -> None:
        for key, words in words_of(self).items():
            words[:] = self.tables[key]
        thaw(self)

    for name, changed in (("add", add_all), ("freeze", freeze_tables), ("thaw", thaw_tables)):
        monkeypatch.setattr(memory, name, changed)
    return behind
