"""The products with blocks as they are shipped, compiled for sm_80 and sm_90, executed by the PTX emulator."""

from __future__ import annotations

import pytest
import torch

from pst_kernels.operands import Needs

pytest.importorskip("triton")

from block_problem import COMPILED, OUTPUTS, Problem
from linear_problem import operands_of, relative_error

from pst_kernels import ops
from pst_kernels.masks.packing import pack_mask
from pst_kernels.triton import block_gradients, block_lists, block_matmul
from pst_kernels.triton.tiles import choice, tables

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("problem", COMPILED, ids=str)
def test_equals_float64(emulator, arch: int, problem: Problem) -> None:
    with emulator.emulate(arch) as session:
        errors = problem.errors()
    assert problem.wrong(errors) == {}
    assert {name: stats.launches for name, stats in session.stats.items()} == {
        "list_blocks_kernel": 1, "order_lists_kernel": 1, "split_factors_kernel": 2, "block_matmul_kernel": 2,
        "block_gradients_kernel": 1, "add_block_partials_kernel": 1,
    }  # fmt: skip


def test_scores_learn_from_all_of_the_gradient(emulator, arch: int) -> None:
    problem = Problem(32, 64, 5, 3, 16, "bfloat16", learn=True)
    with emulator.emulate(arch) as session:
        errors = problem.errors()
    assert problem.wrong(errors) == {}
    assert session.stats["factor_gradients_kernel"].launches == 1


def test_block_order_changes_no_bit(emulator, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one tile of tokens, and the tokens shared among programs: the same bits, and right."""
    monkeypatch.setattr(tables, "SPLIT_K_TOKENS", 64)
    problem = Problem(32, 48, 260, 8, 16, "bfloat16", kept=0.5)
    results = []
    for order in ("forward", "reversed", "shuffled"):
        with emulator.emulate(arch, order):
            results.append(problem.solve())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert problem.wrong(dict(zip(OUTPUTS, map(relative_error, results[0], problem.exact()), strict=True))) == {}


def test_lists_are_made_when_the_mask_was_written(emulator, arch: int) -> None:
    """The forward's serve the backward and the next step, and follow the mask, wherever it was written or moved to."""
    problem = Problem(64, 96, 20, 8, 32, "bfloat16", kept=0.6)
    given = problem.tensors()
    x, operands = given["x"], operands_of(given, given["kept"])
    counts = []
    with emulator.emulate(arch) as session:

        def forward(mask: torch.Tensor) -> torch.Tensor:
            y = block_matmul.block_forward(x, operands._replace(mask=mask), None, 32)
            counts.append(session.stats["list_blocks_kernel"].launches)
            return y

        first, same = forward(operands.mask), forward(operands.mask)
        other = torch.zeros_like(given["kept"])
        other[32:, :64] = True
        operands.mask.copy_(pack_mask(other))
        written, moved = forward(operands.mask), forward(operands.mask.clone())
    assert counts == [1, 1, 2, 3]
    assert torch.equal(first, same)
    assert torch.equal(written, moved)
    assert not written[:, :32].any()
    assert written[:, 32:].any()


@pytest.mark.parametrize("of_columns", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((50, 5000), 16), ((5000, 50), 16), ((130, 300), 128)], ids=str)
def test_lists_hold_the_kept_blocks_in_order(emulator, arch: int, shape: tuple[int, int], size: int, of_columns: bool):
    problem = Problem(*shape, 1, 1, size, kept=0.3)
    flags = problem.flags()
    with emulator.emulate(arch):
        lists = block_lists.list_blocks(pack_mask(problem.mask()), torch.Size(shape), size)[of_columns]
    flags = flags.T if of_columns else flags
    counts = flags.sum(1)
    assert torch.equal(lists.counts, counts.to(torch.int32))
    for i, count in enumerate(counts.tolist()):
        assert lists.indices[i, :count].tolist() == flags[i].nonzero().flatten().tolist()
        assert (lists.indices[i, count:] == 1 << 30).all()  # left as it was
    assert lists.order.tolist() == sorted(range(len(flags)), key=lambda i: -counts[i])


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_no_pruned_block_is_read(emulator, arch: int, kept: float) -> None:
    """NaN in every pruned block of W reaches nothing, whatever step of a strip it would lie in."""
    problem = Problem(64, 112, 3, 8, 16, "bfloat16", kept=kept)
    given = problem.tensors()
    gy, x, kept_weights = given["gy"], given["x"], torch.where(given["kept"], given["weight"], float("nan"))
    operands = operands_of(given | {"weight": kept_weights}, given["kept"])
    with emulator.emulate(arch):
        found = (
            block_matmul.block_forward(x, operands, None, 16),
            *block_gradients.block_backward(gy, x, operands, 16, False, True, Needs(True, True))[:3],
        )
    assert all(bool(value.isfinite().all()) and bool(value.any()) == (kept > 0) for value in found)


def test_work_is_proportional_to_the_kept_blocks(emulator, arch: int) -> None:
    """Products and bytes with 0, 1 and 2 of 3 blocks kept in every row and in every column of blocks."""
    size, tokens, across = 64, 16, 3
    problem = Problem(across * size, across * size, tokens, 8, size, "bfloat16")
    given = problem.tensors()
    gy, x = given["gy"], given["x"]
    stats = []
    for kept in range(3):
        flags = (torch.arange(across)[:, None] + torch.arange(across)) % across < kept
        operands = operands_of(given, flags.repeat_interleave(size, 0).repeat_interleave(size, 1))
        with emulator.emulate(arch) as session:
            block_matmul.block_forward(x, operands, None, size)
            block_gradients.block_backward(gy, x, operands, size, False, True, Needs(True, True))
        stats.append(session.stats)

    def counted(kernel: str) -> tuple[list[int], list[int]]:
        of = [of_kernel[kernel] for of_kernel in stats]
        return [s.ops["mma"] + s.ops["wgmma"] for s in of], [s.load_bytes for s in of]

    products, loaded = counted("block_matmul_kernel")
    assert products[0] == 0
    assert products[2] == 2 * products[1] > 0
    # A block: W, its padded factor (32 columns of bf16), 32 of x's or gy's tokens, and its place in the list.
    block = 2 * size * size + 64 * size + 64 * size + 4
    assert loaded[1] - loaded[0] == loaded[2] - loaded[1] == 2 * across * block
    products, loaded = counted("block_gradients_kernel")
    parts = [
        -(-kept * size // choice.block_gradients(f"sm_{arch}", x.dtype, size, 8, False).columns) for kept in range(3)
    ]
    assert products[0] == 0
    assert products[2] * parts[1] == products[1] * parts[2] > 0
    if parts == [0, 1, 2]:
        assert loaded[2] - loaded[1] == loaded[1] - loaded[0] > 0


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_opcheck(emulator, monkeypatch: pytest.MonkeyPatch, needs: tuple[bool, bool]) -> None:
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    given = Problem(32, 64, 3, 8, 16).tensors()
    x, gy = given["x"], given["gy"]
    operands = operands_of(given, given["kept"]).flat
    tests = ("test_schema", "test_faketensor")
    with emulator.emulate(90):
        torch.library.opcheck(ops.block_forward, (x, *operands, None, 16), test_utils=tests)
        arguments = (gy, x, *operands, 16, 2, True, *needs)
        torch.library.opcheck(ops.block_backward, arguments, test_utils=tests)
