"""How kernels run here without a GPU.

Interpreter: TRITON_INTERPRET has to be set before triton is imported, so those checks live in files named
`interpreted_*.py`, which pytest does not collect by itself; test_interpreter.py runs each in a process of its own.

Emulator: the compiled PTX is executed by ptx_emulator.py, which lies in shared/tools beside the repository; tests that
ask for the `emulator` fixture skip where it is not at hand.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY.parent / "shared" / "tools"


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    pytest.importorskip("triton", reason="triton is not installed")
    if not (TOOLS / "ptx_emulator.py").is_file():
        pytest.skip("the PTX emulator is not at hand: no shared/tools/ptx_emulator.py beside the repository")
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    return importlib.import_module("ptx_emulator")


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands as short as on a GPU with many multiprocessors, so that small problems have many programs."""
    walk = pytest.importorskip("pst_kernels.triton.walk", reason="triton is not installed")
    monkeypatch.setattr(walk, "programs_wanted", lambda device: 264)
