"""The tuning file, its errors, and which tile is chosen for what."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from pst_kernels.triton.tiles import choice, tables, targets, tuning_file
from pst_kernels.triton.tools import tune

BF16, FP32 = torch.bfloat16, torch.float32
GOOD = {
    "architecture": "sm_90", "matmul": {"half": [[16, [64, 16, 64, 4, 2]], [1 << 30, [64, 32, 64, 4, 2]]]},
    "gradients": {"half": [64, 64, 64, 4, 2]}, "in_loop_tokens": {"half": 100},
    "block_matmul": {"half": {"32": [32, 64, 16, 4, 2]}}, "block_gradients": {"float": {"16": [16, 64, 32, 4, 2]}},
}  # fmt: skip


def chosen(tokens: int, architecture: str = "sm_90", depth: int = 1024, rank: int = 8) -> tables.Tile | None:
    return choice.matmul(architecture, BF16, BF16, tokens, depth, rank)


def use(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> None:
    path.write_text(text)
    monkeypatch.setenv("PST_KERNELS_TUNING", str(path))


def test_the_file_overrides_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path / "t.json", json.dumps(GOOD))
    assert chosen(16) == tables.Tile(64, 16, 64, 4, 2)
    assert chosen(17) == tables.Tile(64, 32, 64, 4, 2)
    assert chosen(101) is None
    assert choice.gradients("sm_90", BF16, BF16, 128, 128, 9, few_ranks=True) == tables.Tile(64, 64, 64, 4, 2)
    assert choice.block_matmul("sm_90", BF16, BF16, 64, 32, 32, False) == tables.Tile(32, 64, 16, 4, 2)
    assert choice.block_matmul("sm_90", BF16, BF16, 64, 64, 32, False) == tables.BLOCK_MATMUL["sm_90"]["half"][64]
    assert choice.block_gradients("sm_90", FP32, 16, 8, False) == tables.Tile(16, 64, 32, 4, 2)
    assert choice.block_gradients("sm_90", BF16, 16, 8, False) == tables.BLOCK_GRADIENTS["sm_90"]["half"][16]
    assert chosen(17, "sm_80") == tables.MATMUL["sm_80"]["half"][1][1]
    assert choice.matmul("sm_90", FP32, FP32, 17, 1024, 8) == tables.MATMUL["sm_90"]["float"][1][1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError"),
        (json.dumps(GOOD | {"architecture": "sm_70"}), "sm_70"),
        (json.dumps(GOOD | {"gradients": {"int8": [64, 64, 64, 4, 2]}}), "int8"),
        (json.dumps(GOOD | {"gradients": {"half": [64, 48, 64, 4, 2]}}), "powers of two"),
        (json.dumps(GOOD | {"gradients": {"half": [64, 64]}}), "TypeError"),
        (json.dumps(GOOD | {"gradients": {"half": [64, 16, 64, 4, 2]}}), "columns from 32"),
        (json.dumps(GOOD | {"block_matmul": {"half": {"64": [32, 64, 16, 4, 2]}}}), "rows are their size"),
        (json.dumps(GOOD | {"block_gradients": {"half": {"8": [8, 64, 16, 4, 2]}}}), "rows and depth from 16"),
        (json.dumps(GOOD | {"block_gradients": {"half": {"256": [256, 64, 16, 4, 2]}}}), "blocks are of (16, 32"),
        (json.dumps(GOOD | {"matmul": {"half": [[16, [64, 16, 64, 4, 2]]]}}), "1073741824"),
    ],
)  # fmt: skip
def test_bad_files_raise_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, says: str) -> None:
    use(monkeypatch, tmp_path / "t.json", text)
    with pytest.raises(ValueError, match="PST_KERNELS_TUNING") as caught:
        chosen(16)
    assert says in str(caught.value)
    assert "pst-kernels tune" in str(caught.value)


def test_neighbours_of_block_tiles_are_tiles_that_a_file_may_hold() -> None:
    for table in (tables.BLOCK_MATMUL, tables.BLOCK_GRADIENTS):
        for of_target in table.values():
            for sizes in of_target.values():
                for size, tile in sizes.items():
                    around = [other for other in tune.neighbours(tile) if other.rows == size]
                    assert all(tuning_file._block_tile(str(size), list(other[:5])) == other for other in around)


def test_switch_follows_the_arithmetic_where_nothing_was_timed() -> None:
    target = targets.TARGETS["sm_80"]
    most = int(4 * target.rate / (target.bandwidth * tables.SLOTS["sm_80"]))
    assert 300 < most < 3300
    assert choice.matmul("sm_80", BF16, BF16, most, 1024, 8) == tables.MATMUL["sm_80"]["half"][-1][1]
    assert choice.matmul("sm_80", BF16, BF16, most + 1, 1024, 8) is None
    assert chosen(tables.IN_LOOP_TOKENS["sm_90"]) is not None
    assert chosen(tables.IN_LOOP_TOKENS["sm_90"] + 1) is None
    assert chosen(16, depth=1001) == tables.ODD["half"]
    assert chosen(16, rank=22) is None


@pytest.mark.parametrize(
    ("shape", "tokens", "steps"),
    [
        ((512, 1024), 1024, 1),  # 32 tiles, 132 multiprocessors
        ((2048, 2048), 1024, 2),  # 256 tiles: two rounds either way
        ((4096, 4096), 1024, 8),  # 1,024: eight rounds
        ((4096, 11008), 1024, 22),  # 21 rounds of one tile, or one of 22: the traffic is worth a round
        ((4096, 11008), 8192, 1),  # but not a round of so many tokens
    ],
)
def test_a_sweep_leaves_no_multiprocessor_idle(shape: tuple[int, int], tokens: int, steps: int) -> None:
    tile = tables.GRADIENTS["sm_90"]["half"]
    down, across = shape[0] // tile.rows, shape[1] // tile.columns
    assert choice.sweep_length("sm_90", tile, across, down, tokens, 17) == steps


def test_sweeps_of_small_tiles_leave_as_many_warps() -> None:
    tile = tables.GRADIENTS["sm_90"]["half"]._replace(warps=4)
    assert choice.sweep_length("sm_90", tile, 32, 32, 1024, 17) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    assert tune.main(parser.parse_args(["--output", str(tmp_path / "t.json")])) == 1
    assert "GPU" in capsys.readouterr().err


def test_neighbours_are_tiles_that_a_file_may_hold() -> None:
    for table in tables.MATMUL.values():
        for rows in table.values():
            for _, tile in rows:
                around = tune.neighbours(tile)
                assert around[0] == tile
                assert all(tuning_file._tile(list(other[:5])) == other._replace(slots=None) for other in around)


def test_tables_of_a_context_come_first_and_change_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path / "t.json", json.dumps(GOOD))
    shipped, tile = dict(tables.GRADIENTS["sm_90"]), tables.Tile(32, 32, 32, 4, 2)

    def gradient_tile() -> tables.Tile:
        return choice.gradients("sm_90", BF16, BF16, 128, 128, 9, few_ranks=True)

    with tuning_file.using(tuning_file.Tuned(gradients={"half": tile})):
        assert gradient_tile() == tile
        assert chosen(100) is None  # which is the file's limit
        assert tables.GRADIENTS["sm_90"] == shipped
    assert gradient_tile() == tables.Tile(64, 64, 64, 4, 2)
    assert chosen(100) is not None
