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


# Fixtures of a module that take long, and the files that have them: one worker runs such a file, and makes them once.
SHARED = {"found", "finished", "launched", "measured", "report"}
TOGETHER = {
    "test_linear_interpreted.py", "test_blocks_interpreted.py", "test_sparse_interpreted.py",
    "test_weighed_interpreted.py", "test_finetune.py",
    "test_distributed.py", "test_parallel_loading.py", "test_minilm.py", "test_machine_code.py", "test_host.py",
}  # fmt: skip
COMPILED = {"emulator", "found", "report"}  # what asks for these is no part of `make test-quick`
SLOW = {"finished", "launched"}  # nor is what asks for these


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with one at the end."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        given = item.callspec.params if hasattr(item, "callspec") else {}
        shared = fixtures & SHARED - given.keys()
        assert not shared or item.path.name in TOGETHER, f"{item.path.name} shares {shared}: add it to TOGETHER"
        if fixtures & COMPILED or given.get("gpu") == "emulated":
            item.add_marker(pytest.mark.compiled)
        if fixtures & SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None and item.path.name not in TOGETHER)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Test by test, but TOGETHER. (Groups by xdist_group have no effect with pytest 9.2 and pytest-xdist 3.8.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if path.rpartition("/")[2] in TOGETHER else nodeid

    config.option.loadscopereorder = False  # the order above
    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What was imported stays to the end: no collection of garbage, and a Trainer asks for some, need go through it."""
    gc.collect()
    gc.freeze()
