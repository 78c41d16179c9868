"""GPU tests: each takes the fixture `gpu`, and runs in up to three places.

`[cuda]`      all of its cases, marked `gpu`: `make gpu`, or `pytest -m gpu`
`[torch]`     its cases but those marked `large`, on CPU tensors and in PyTorch: `make test` finds its mistakes there
`[emulated]`  its cases marked `emulated`, on CPU tensors, the compiled kernels in the PTX emulator
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from places import CUDA, EMULATED, TORCH, Place

MARKS = {TORCH: lambda item: not marked(item, "large"), EMULATED: lambda item: marked(item, "emulated")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "gpu" in metafunc.fixturenames:
        metafunc.parametrize("gpu", [pytest.param(CUDA, marks=pytest.mark.gpu), TORCH, EMULATED], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not MARKS.get(place_of(item), lambda _: True)(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def place_of(item: pytest.Item) -> str:
    return item.callspec.params.get("gpu", "") if hasattr(item, "callspec") else ""


def marked(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None


@pytest.fixture
def gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh: None, poisoned: None
) -> Iterator[Place]:
    place = Place(request.param)
    if place.triton:
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")  # else a missing kernel would be replaced in silence
    if place.kind == CUDA and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if place.kind != EMULATED:
        yield place
        return
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    importlib.import_module("pst_kernels.triton.launch")  # which remembers Triton's own launch, not the emulator's
    with request.getfixturevalue("emulator").emulate(90):
        yield place


@pytest.fixture
def routes(gpu: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """How the thresholds of this test were found, one word each; nothing where no kernel ran. Asking waits."""
    if not gpu.triton:
        return list
    from pst_kernels.triton import select

    states, search = [], select.search

    def remember(*args, **kwargs):
        states.append(search(*args, **kwargs))
        return states[-1]

    monkeypatch.setattr(select, "search", remember)
    return lambda: [select.route(state) for state in states]
