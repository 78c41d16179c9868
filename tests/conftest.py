"""Every test starts from the same seed and without the user's environment variables; toy models are in toys.py."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("tiny_grid")
torch.set_num_threads(1)  # toy models gain nothing from more, and lose much on a busy machine


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name in ("PST_KERNELS_BACKEND", "PST_KERNELS_CPU", "PST_KERNELS_ARCH", "PST_KERNELS_TUNING"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["numba", "torch"])
def cpu_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The passes over W on a CPU in both forms."""
    monkeypatch.setenv("PST_KERNELS_CPU", request.param)
    return request.param


# Fixtures of a module that take long: their tests go to one worker, which makes them once. With --dist loadgroup.
SHARED = {"found", "finished", "launched", "trained", "report"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if SHARED & set(getattr(item, "fixturenames", ())):
            target = getattr(item, "callspec", None) and item.callspec.params.get("report", "")
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {target}"))
