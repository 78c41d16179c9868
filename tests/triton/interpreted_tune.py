"""`pst-kernels tune` without a GPU: everything but the times, on a small problem in Triton's interpreter."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from pst_kernels.triton import matmul, tiles, tune

SIZES = argparse.Namespace(out_features=96, in_features=64, rank=4)
TILE = tiles.Tile(32, 16, 32, 4, 2)


@pytest.fixture(params=list(tune.DTYPES))
def key(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def problem(key: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    return tune._problem(key, SIZES, torch.device("cpu"))


def timed_by(monkeypatch: pytest.MonkeyPatch, milliseconds: Callable[[Callable], float]) -> None:
    monkeypatch.setattr(triton.testing, "do_bench", milliseconds)


def test_the_fastest_right_tile_wins(problem: dict, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later a tile comes, the faster it is said to be; the last of all is made wrong, and must not win."""
    calls = iter(range(100))
    timed_by(monkeypatch, lambda launch: 100.0 - next(calls))
    last, original = tune.neighbours(TILE)[-1], matmul.masked_matmul

    def wrong_for_the_last(*args: Any) -> torch.Tensor:
        y = original(*args)
        return y * 1.5 if args[6] == last and args[7] else y  # in the input gradient alone

    monkeypatch.setattr(matmul, "masked_matmul", wrong_for_the_last)
    runs = tune._matmul_runs(problem, TILE, 16)
    assert tune._best(runs, tune.TOLERANCE[key]) == tune.neighbours(TILE)[-2]


def test_gradient_tiles(problem: dict, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by(monkeypatch, lambda launch: 1.0)
    shipped, tile = tiles.GRADIENTS["sm_90"][key], TILE._replace(columns=32)
    runs = tune._gradient_runs(problem, tile, 16, key)
    assert tune._best(runs, tune.TOLERANCE[key]) == tile  # the first of equals
    assert tiles.GRADIENTS["sm_90"][key] == shipped


@pytest.mark.parametrize(("fast_up_to", "found"), [(0, 0), (16, 16), (40, 32), (1 << 20, 64)])
def test_switch(problem: dict, monkeypatch: pytest.MonkeyPatch, fast_up_to: int, found: int) -> None:
    monkeypatch.setattr(tune, "SWITCH_TOKENS", (16, 32, 64))
    results: dict[bool, list[torch.Tensor]] = {}

    def milliseconds(launch: Any) -> float:
        in_loop = launch.func is tune._in_loop
        results[in_loop] = launch()
        return 2.0 if in_loop == (len(launch.args[1]) > fast_up_to) else 1.0

    timed_by(monkeypatch, milliseconds)
    assert tune._switch(problem, [(16, TILE), (1 << 30, TILE._replace(columns=32))]) == found
    for one, other in zip(results[True], results[False], strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 1e-2
