"""How kernels run here without a GPU.

Interpreter: TRITON_INTERPRET has to be set before triton is imported, so those checks live in files named
`interpreted_*.py`, which pytest does not collect by itself; test_interpreter.py runs each in a process of its own.

Emulator: the compiled PTX is executed on CPU tensors by tests/emulator; tests ask for the `emulator` fixture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreter
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.mend()


@pytest.fixture
def touched(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], np.ndarray]:
    """Which bytes of global memory a kernel, launched once, has "loaded" and which it has "stored": bool."""
    seen: dict[tuple[str, str], np.ndarray] = {}
    check = emulator.Block.check

    def marking(self: Any, address: np.ndarray, size: int, mask: np.ndarray | None, space: str, ins: Any) -> None:
        check(self, address, size, mask, space, ins)
        if space == "global":
            way = "stored" if ins.op[0] == "st" else "loaded"
            marks = seen.setdefault((self.program.name, way), np.zeros(self.memory.data.size, bool))
            marks[(address if mask is None else address[mask])[:, None] + np.arange(size)] = True

    monkeypatch.setattr(emulator.Block, "check", marking)
    return seen


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps as short as on a GPU with many multiprocessors, so that small problems have many programs."""
    sweep = pytest.importorskip("pst_kernels.triton.sweep", reason="triton is not installed")
    monkeypatch.setattr(sweep, "programs_wanted", lambda device: 264)


@pytest.fixture(params=[80, 90])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The kernels, as they are shipped for sm_80 and for sm_90."""
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", f"sm_{request.param}")
    return request.param


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[Any, dict[str, float]]:
    """The relative errors of a module's interpreted problems: its Problem's own file solves them in the interpreter."""
    script = Path(sys.modules[request.module.Problem.__module__].__file__ or "")
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "PST_KERNELS_BACKEND": "triton",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    return {request.module.Problem(**problem): errors for problem, errors in json.loads(run.stdout)}
