"""The PTX emulator as a fixture: the compiled PTX of a kernel is executed on CPU tensors by ptx_emulator.py.

That lies in shared/tools beside the repository. Tests that ask for it skip where it is not at hand.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "shared" / "tools"


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    pytest.importorskip("triton", reason="triton is not installed")
    if not (TOOLS / "ptx_emulator.py").is_file():
        pytest.skip("the PTX emulator is not at hand: no shared/tools/ptx_emulator.py beside the repository")
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    module = importlib.import_module("ptx_emulator")
    learn_integer_pairs(module)
    return module


def learn_integer_pairs(module: ModuleType) -> None:
    """Teach the emulator integer arithmetic on two 16-bit halves (add.s16x2), which sm_90 has and LLVM likes there."""
    block: Any = module.Block
    fetch, put = block.fetch, block.put

    def fetch_pair(self: Any, argument: str, kind: str) -> np.ndarray:
        if kind != "s16x2":
            return fetch(self, argument, kind)
        word = np.broadcast_to(self.read(argument, np.uint32), (self.n,))
        return np.stack([(word & 0xFFFF).astype(np.uint16), (word >> 16).astype(np.uint16)]).view(np.int16)

    def put_pair(self: Any, name: str, value: np.ndarray, kind: str, mask: np.ndarray) -> None:
        if kind == "s16x2":
            low, high = np.asarray(value, np.int16).view(np.uint16).astype(np.uint32)
            kind, value = "u32", low | (high << 16)
        put(self, name, value, kind, mask)

    block.fetch, block.put = fetch_pair, put_pair
