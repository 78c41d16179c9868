"""Every test starts from the same seed and without the user's environment variables; toy models are in toys.py."""

from __future__ import annotations

import gc
import importlib
from types import ModuleType

import pytest
import torch

pytest.register_assert_rewrite("tiny_grid")
torch.set_num_threads(1)  # toy models gain nothing from more, and lose much on a busy machine


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name in ("PST_KERNELS_BACKEND", "PST_KERNELS_CPU", "PST_KERNELS_ARCH", "PST_KERNELS_TUNING"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """The package that executes the compiled PTX of kernels on CPU tensors."""
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module("emulator")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch.empty allocates is NaN, or no index, until a kernel writes it."""
    empty = torch.empty
    values = {torch.int32: 1 << 30, **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), float("nan"))}

    def poison(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.device.type == "meta" or tensor.dtype not in values:
            return tensor
        return tensor.fill_(values[tensor.dtype])

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(params=["numba", "torch"])
def cpu_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The passes over W on a CPU in both forms."""
    monkeypatch.setenv("PST_KERNELS_CPU", request.param)
    return request.param


# Fixtures of a module that take long: their tests go to one worker, which makes them once. With --dist loadgroup.
SHARED = {"found", "finished", "launched", "trained", "report"}
COMPILED = {"emulator", "found", "report"}  # what asks for these is no part of `make test-quick`


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if fixtures & COMPILED or given.get("gpu") == "emulated":
            item.add_marker(pytest.mark.compiled)
        if fixtures & SHARED:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {given.get('report', '')}"))


def pytest_collection_finish() -> None:
    """What was imported stays to the end: no collection of garbage, and a Trainer asks for some, need go through it."""
    gc.collect()
    gc.freeze()
