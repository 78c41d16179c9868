"""`pst-kernels tune` without a GPU: everything but the times, on a small problem in Triton's interpreter."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from pst_kernels.triton import block_matmul, matmul
from pst_kernels.triton.tiles import tables
from pst_kernels.triton.tools import tune

SIZES = argparse.Namespace(out_features=96, in_features=64, rank=4)
TILE = tables.Tile(32, 16, 32, 4, 2)


@pytest.fixture(params=list(tune.DTYPES))
def key(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def problem(key: str, monkeypatch: pytest.MonkeyPatch) -> tune.Problem:
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    return tune._problem(key, SIZES, torch.device("cpu"))


def timed_by(monkeypatch: pytest.MonkeyPatch, milliseconds: Callable[[Callable], float]) -> None:
    monkeypatch.setattr(triton.testing, "do_bench", milliseconds)


def test_the_fastest_right_tile_wins(problem: tune.Problem, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later a tile comes, the faster it is said to be; the last of all is made wrong, and must not win."""
    calls = iter(range(100))
    timed_by(monkeypatch, lambda launch: 100.0 - next(calls))
    last, original = tune.neighbours(TILE)[-1], matmul.masked_matmul

    def wrong_for_the_last(*args: Any) -> torch.Tensor:
        y = original(*args)
        return y * 1.5 if args[3] == last and args[5] else y  # in the input gradient alone

    monkeypatch.setattr(matmul, "masked_matmul", wrong_for_the_last)
    runs = tune._matmul_runs(problem, TILE, 16)
    assert tune._best(runs, tune.TOLERANCE[key]) == tune.neighbours(TILE)[-2]


def test_gradient_tiles(problem: tune.Problem, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by(monkeypatch, lambda launch: 1.0)
    shipped, tile = tables.GRADIENTS["sm_90"][key], TILE._replace(columns=32)
    runs = tune._gradient_runs(problem, tile, 16, key)
    assert tune._best(runs, tune.TOLERANCE[key]) == tile  # the first of equals
    assert tables.GRADIENTS["sm_90"][key] == shipped


@pytest.mark.parametrize("size", [16, 32])
def test_block_tiles(problem: tune.Problem, key: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later a tile comes, the faster it is said to be: the last one of each table wins, if it is right, and no
    table is left changed."""
    names = ["block_matmul", "block_gradients"] if key != "mixed" else ["block_matmul"]
    for name in names:
        calls = iter(range(100))
        timed_by(monkeypatch, lambda launch, calls=calls: 100.0 - next(calls))
        row = tune._TABLES[name]["sm_90"][key]
        shipped = dict(row)
        runs = tune._block_matmul_runs if name == "block_matmul" else tune._block_gradient_runs
        found = tune._best(runs(problem, 20, key, size), tune.TOLERANCE[key])
        expected = [tile for tile in tune.neighbours(shipped[size]) if tile.rows == size]
        assert found == expected[-1]
        assert next(calls) == len(expected)  # each of them was right, and was timed
        assert row == shipped


def test_wrong_block_tiles_are_not_timed(problem: tune.Problem, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by(monkeypatch, lambda launch: pytest.fail("timed"))
    original = block_matmul.block_matmul
    monkeypatch.setattr(block_matmul, "block_matmul", lambda *args, **options: original(*args, **options) * 1.5)
    runs = tune._block_matmul_runs(problem, 20, key, 16)
    assert tune._best(runs, tune.TOLERANCE[key]) == tables.BLOCK_MATMUL["sm_90"][key][16]


@pytest.mark.parametrize(("fast_up_to", "found"), [(0, 0), (16, 16), (40, 32), (1 << 20, 64)])
def test_switch(problem: tune.Problem, monkeypatch: pytest.MonkeyPatch, fast_up_to: int, found: int) -> None:
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
