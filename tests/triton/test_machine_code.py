"""Budgets of the shipped matmul and gradient binaries, read from the machine code; no GPU needed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("pst_kernels.triton.tools.machine_code")
mask = pytest.importorskip("pst_kernels.triton.mask")
tables = pytest.importorskip("pst_kernels.triton.tiles.tables")
targets = pytest.importorskip("pst_kernels.triton.tiles.targets")
cases = pytest.importorskip("pst_kernels.triton.tools.cases")

import recorded  # noqa: E402

FILES = ("matmul", "gradients")
PRODUCTS = ("masked_matmul_kernel", "factor_gradients_kernel", "many_ranks_kernel")
SWEEPS, TABLES = ("score", "select", "mask"), ("group_mask",)
BLOCK_FILES = ("block_lists", "block_matmul", "block_gradients")
TARGETS = ["sm_80", "sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_100", "sm_120"))]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[kernels.Row]]:
    return {}


@pytest.fixture
def report(rows: dict[str, list[kernels.Row]], request: pytest.FixtureRequest) -> list[kernels.Row]:
    target = request.param
    if target not in rows:
        rows[target] = recorded.report(target, files=FILES)
    return rows[target]


@pytest.mark.parametrize("report", TARGETS, indirect=True)
def test_every_binary_keeps_its_budget(report: list[kernels.Row]) -> None:
    assert {row.case: row.problems for row in report if row.problems} == {}
    assert {row.kernel for row in report} == {
        "masked_matmul_kernel", "split_factors_kernel", "factor_gradients_kernel", "many_ranks_kernel",
        "add_partials_kernel",
    } | ({"masked_weight_kernel"} & {row.kernel for row in report})  # fmt: skip
    products = [row for row in report if row.kernel in PRODUCTS]
    assert all(row.products or "float32, rank" in row.case for row in products)


@pytest.mark.parametrize("report", ["sm_90"], indirect=True)
def test_wgmma_takes_masked_weights_from_registers(report: list[kernels.Row]) -> None:
    widest = [row for row in report if row.kernel == "masked_matmul_kernel" and "64x256x16" in row.tensor_core]
    assert len(widest) == 8  # two dtypes, two directions, two ranks of bf16, two storage orders of bf16
    assert all("left operand in registers" in row.tensor_core for row in widest)
    assert max(row.slots for row in widest) <= 0.55


@triton.jit
def plain_kernel(
    p_gy, p_x, p_g, tokens, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """G = gy^T x and nothing else."""
    i_rows, i_columns = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLUMNS
    r, c, t = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS), tl.arange(0, BLOCK_DEPTH)
    b_g = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    p_gy += t[None, :] * rows + i_rows + r[:, None]
    p_x += t[:, None] * columns + i_columns + c[None, :]
    for _ in range(tokens // BLOCK_DEPTH):
        b_g = tl.dot(tl.load(p_gy), tl.load(p_x), b_g)
        p_gy += BLOCK_DEPTH * rows
        p_x += BLOCK_DEPTH * columns
    tl.store(p_g + (i_rows + r[:, None]) * columns + i_columns + c[None, :], b_g.to(p_g.dtype.element_ty))


@pytest.mark.parametrize("report", ["sm_80", "sm_90"], indirect=True)
def test_gradient_loop_is_that_of_a_plain_product(report: list[kernels.Row]) -> None:
    architecture = report[0].target
    tile = tables.GRADIENTS[architecture]["half"]
    x = torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta")
    with kernels.recorded(kernels.gpu_target(architecture)) as launches:
        plain_kernel[(1,)](
            x, x, x, 1024, 1024, 1024, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    kernel, *bound = launches[0]
    binary = kernels.Compilation(kernel, cases.Case("plain", lambda: None), *bound)
    plain = kernels._read_cubin(binary.compile(kernels.gpu_target(architecture)).asm["cubin"])["loop"]
    ours = [row.loop for row in report if row.case == "factor gradients, bfloat16, rank 8" and row.loop]
    print(architecture, "plain", plain, "ours", ours)
    assert len(ours) == 1
    assert ours[0] <= math.ceil(1.1 * plain)


@pytest.mark.parametrize("report", ["sm_90"], indirect=True)
def test_a_user_waits_for_few_compilations(report: list[kernels.Row]) -> None:
    """All of the products' binaries of a target, which take about a second each."""
    assert len(report) <= 100


@pytest.mark.compiled
@pytest.mark.parametrize("target", TARGETS)
def test_block_kernels_keep_their_budgets(target: str) -> None:
    rows = recorded.report(target, files=BLOCK_FILES)
    assert {row.case: row.problems for row in rows if row.problems} == {}
    assert {row.kernel for row in rows} == {
        "list_blocks_kernel", "order_lists_kernel", "split_factors_kernel", "block_matmul_kernel",
        "block_gradients_kernel", "add_block_partials_kernel",
    }  # fmt: skip
    products = [row for row in rows if row.kernel in ("block_matmul_kernel", "block_gradients_kernel")]
    assert all(row.products or "float32, rank" in row.case for row in products)
    if target in tables.BLOCK_SLOTS:
        assert sum(row.budget is not None for row in products) == 7  # 64 and 128; one also not through |W|
    if target == "sm_90":
        thick = [row for row in products if row.kernel == "block_matmul_kernel" and row.budget is not None]
        assert all("left operand in registers" in row.tensor_core for row in thick)


@pytest.mark.compiled
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_for_packed_weights_keep_their_budgets(target: str) -> None:
    rows = recorded.report(target, files=recorded.PACKED)
    assert {row.case: row.problems for row in rows if row.problems} == {}
    assert {row.kernel for row in rows} == {
        "words_kernel", "sparse_matmul_kernel", "add_sums_kernel", "expand_kernel", "listed_matmul_kernel"
    }  # fmt: skip
    products = [row for row in rows if row.kernel == "sparse_matmul_kernel"]
    assert all(row.products or "float32, " in row.case for row in products)
    assert sum(row.budget is not None for row in products) == 6  # three tiles, two directions


@pytest.mark.compiled
@pytest.mark.parametrize(("target", "tokens", "most"), [("sm_90", 1, 12.0), ("sm_90", 8, 25.0), ("sm_80", 1, 15.0)])
def test_a_kept_weight_of_a_list_costs_few_instructions(
    target: str, tokens: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thread, in the inner loop beside the multiplications: what `choice.listed_matmul` goes by."""
    binaries = kernels.shipped(target, ("listed_matmul",))
    (binary,) = [b for b in binaries if b.case.name == f"forward, packed, bfloat16, {tokens} tokens"]
    cubin = binary.compile(kernels.gpu_target(target)).asm["cubin"]
    tile = tables.LISTED_MATMUL
    lanes = tile.chunks * tile.rows * tile.lanes * tile.turns // (32 * tile.warps)  # of a thread, each pass
    monkeypatch.setattr(kernels, "TENSOR_CORE", re.compile("FFMA$"))
    assert lanes * 5 < kernels._read_cubin(cubin)["loop"] <= most * lanes


@pytest.mark.compiled
@pytest.mark.parametrize("target", TARGETS)
def test_selection_and_masks_spill_nothing(target: str) -> None:
    rows = recorded.report(target, files=SWEEPS)
    assert {row.case: row.problems for row in rows if row.problems} == {}
    assert {row.kernel for row in rows} == {
        "scores_kernel", "bracket_kernel", "gather_kernel", "refine_kernel", "radix_histogram_kernel", "mask_kernel",
        "masked_weight_kernel",
    }  # fmt: skip


@pytest.mark.compiled
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_for_a_table_spill_nothing(target: str) -> None:
    rows = recorded.report(target, files=TABLES)
    assert {row.case: row.problems for row in rows if row.problems} == {}
    assert {row.kernel for row in rows} == {
        "group_bracket_kernel", "group_gather_kernel", "group_refine_kernel", "group_radix_kernel",
        "group_collect_kernel", "group_mask_kernel",
    }  # fmt: skip


@pytest.mark.compiled
@pytest.mark.parametrize("rank", [10, 24, 32])
def test_ranks_that_once_spilled_on_sm_100(rank: int) -> None:
    """Sampling did at 10, the sweeps did at 24 and 32, where the compiler unrolled all ranks."""
    weight, factors, _, scales = cases.Layout(columns=1001, rank=rank).operands()
    pruned, guess = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(4, device="meta")
    target = kernels.gpu_target("sm_100")
    with targets.compiling_for("sm_100"), kernels.recorded(target) as launches:
        mask.prune_mask(weight, factors, scales, pruned, guess)
    binaries = {
        binary.key: binary
        for kernel, *bound in launches
        for binary in [kernels.Compilation(kernel, cases.Case("", lambda: None), *bound)]
    }
    used = {
        binary.kernel.__name__: kernels._read_cubin(binary.compile(target).asm["cubin"], code=False)
        for binary in binaries.values()
    }
    assert used.keys() == {"bracket_kernel", "gather_kernel", "refine_kernel", "radix_histogram_kernel", "mask_kernel"}
    assert {name for name, one in used.items() if one["stack"] or one["local"]} == set()
    assert all(kernels.FEWEST_REGISTERS < one["registers"] <= 255 for one in used.values())


def test_a_row_names_what_exceeds_its_budget() -> None:
    row = kernels.Row(
        "sm_90", "k", "case", 8, 3, 255, 16, 8, 300_000, 0, True, "HGMMA x4", 300, 0.6, 0.52, 1.0, "file"
    )  # fmt: skip
    assert [problem.split()[0] for problem in row.problems] == ["spills", "300000", "main"]
    right = row._replace(stack=0, local=0, blocks=1, slots=0.5)
    assert right.problems == []
    assert right._replace(slots=None).problems != []
    assert right._replace(products=False, tensor_core="").problems == []
    for empty in (right._replace(registers=4), right._replace(tensor_core="")):
        assert [problem[:8] for problem in empty.problems] == ["is empty"]
    assert right._replace(registers=8, target="gfx942").problems == []


def test_an_empty_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two accumulators of such a tile do not fit the tensor memory of sm_100, and its compiler says nothing."""
    monkeypatch.setitem(tables.GRADIENTS["sm_100"], "half", tables.Tile(256, 256, 64, 8, 1))
    kernels.shipped.cache_clear()
    row = kernels._row("sm_100", ("gradients",), 0, None)
    kernels.shipped.cache_clear()
    assert row.kernel == "factor_gradients_kernel"
    assert row.problems == [f"is empty: {row.registers} registers, tensor-core instructions: none"]


def test_nops_are_named_where_they_alone_exceed_a_budget() -> None:
    row = kernels.Row("sm_120", "k", "case", 8, 3, 255, 0, 0, 1, 1, True, "HMMA x4", 100, 0.6, 0.5, 1.0, "file", 20)
    assert row.slots_without_nops == 0.48
    assert row.problems[0].endswith("budget 0.5; 0.48 without the assembler's NOPs")
    assert row._replace(nops=10).problems[0].endswith("budget 0.5")


def test_a_kernel_that_does_not_compile_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("\n  PassManager::run failed\nand more")

    monkeypatch.setattr(kernels.Compilation, "compile", fail)
    row = kernels._row("sm_80", ("score",), 0, None)
    assert (row.kernel, row.registers) == ("scores_kernel", 0)
    assert row.problems == ["does not compile: RuntimeError: PassManager::run failed"]


def test_report_of_one_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import argparse

    first = kernels.shipped("sm_80", ("gradients",))[:1]
    monkeypatch.setattr(kernels, "shipped", lambda *_: first)
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    options = ["--target", "sm_80", "--json", "--workers", "1", "--dump", str(tmp_path / "dump")]
    assert kernels.main(parser.parse_args(options)) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert min(row["registers"], row["blocks"], row["slots"]) > 0
    assert sorted(path.suffix for path in (tmp_path / "dump").iterdir()) == [".cubin", ".ptx"]


@pytest.mark.parametrize("architecture", list(targets.TARGETS))
def test_every_target_has_cases(architecture: str) -> None:
    assert len(kernels.shipped(architecture, FILES)) > 40
