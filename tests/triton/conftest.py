"""How kernels run here without a GPU.

Interpreter: TRITON_INTERPRET has to be set before triton is imported, so those checks live in files named
`interpreted_*.py`, which pytest does not collect by itself; test_interpreter.py runs each in a process of its own.

Emulator: the compiled PTX is executed by ptx_emulator.py, which lies in shared/tools beside the repository; tests that
ask for the `emulator` fixture skip where it is not at hand.
"""

from __future__ import annotations

import importlib
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
TOOLS = REPOSITORY.parent / "shared" / "tools"


if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.mend()


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


@pytest.fixture
def touched(emulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], np.ndarray]:
    """Which bytes of global memory a kernel, launched once, has "loaded" and which it has "stored": bool."""
    seen: dict[tuple[str, str], np.ndarray] = {}
    check = emulator.Block.check

    def marking(self: Any, address: np.ndarray, size: int, mask: np.ndarray | None, space: str, ins: Any) -> None:
        check(self, address, size, mask, space, ins)
        if space == "global":
            way = "stored" if ins.op[0] == "st" else "loaded"
            marks = seen.setdefault((self.p.name, way), np.zeros(self.mem.data.size, bool))
            marks[(address if mask is None else address[mask])[:, None] + np.arange(size)] = True

    monkeypatch.setattr(emulator.Block, "check", marking)
    return seen


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands as short as on a GPU with many multiprocessors, so that small problems have many programs."""
    walk = pytest.importorskip("pst_kernels.triton.walk", reason="triton is not installed")
    monkeypatch.setattr(walk, "programs_wanted", lambda device: 264)


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
