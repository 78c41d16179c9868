"""The shipped configurations of the masked linear, compiled for sm_80 and sm_90, executed by the PTX emulator."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from linear_problem import OUTPUTS, Problem

from pst_kernels import ops
from pst_kernels.packing import pack_mask
from pst_kernels.triton import matmul, tiles


@pytest.fixture(params=[80, 90])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", f"sm_{request.param}")
    return request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher allocates is NaN until a kernel writes it."""
    empty = torch.empty

    def nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type == "cpu" else tensor

    monkeypatch.setattr(torch, "empty", nan)


PROBLEMS = [
    Problem(128, 128, 40, 8, "bfloat16"),
    Problem(128, 128, 7, 16, "float16", factors="float16"),
    Problem(64, 96, 3, 8, "float32"),
    Problem(129, 65, 3, 5, "bfloat16"),
    Problem(128, 64, 20, 8, "bfloat16", weight="float32"),
    Problem(64, 128, 17, 8, "bfloat16", transposed=True, through=False),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_equals_float64(emulator, arch: int, problem: Problem) -> None:
    with emulator.emulate(arch) as session:
        errors = problem.errors()
    assert {name: errors[name] for name in OUTPUTS if not errors[name] <= problem.allowed(name)} == {}
    assert session.stats["masked_matmul_kernel"].launches == 2
    assert session.stats["factor_gradients_kernel"].launches == 1


def test_block_order_changes_no_bit(emulator, arch: int) -> None:
    """The widest tile, more than one block of tokens and of rows, and the tokens shared among programs."""
    problem = Problem(160, 128, 130, 8, "bfloat16")
    results = []
    for order in ("forward", "reversed", "shuffled"):
        with emulator.emulate(arch, order):
            results.append(problem.solve(exact=False))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_widest_tile(emulator, arch: int) -> None:
    problem = Problem(128, 128, 130, 8, "bfloat16")
    with emulator.emulate(arch):
        errors = problem.errors()
    assert {name: errors[name] for name in OUTPUTS if not errors[name] <= problem.allowed(name)} == {}


def test_many_tokens_share_and_use_the_library(emulator, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side of each switch: masked weight and library product, tokens in shares; then G by the library."""
    monkeypatch.setattr(tiles, "SLOTS", dict.fromkeys(tiles.SLOTS, 1e6))
    monkeypatch.setattr(tiles, "SHARE_TOKENS", 16)
    problem = Problem(64, 64, 70, 8, "bfloat16")
    for given, launches in ((1 << 30, 1), (1, 1)):
        monkeypatch.setattr(tiles, "GIVEN_TOKENS", dict.fromkeys(tiles.GIVEN_TOKENS, given))
        with emulator.emulate(arch) as session:
            errors = problem.errors()
        rounded = 5e-3 if given == 1 else 0.0  # G in bf16
        assert {name: errors[name] for name in OUTPUTS if not errors[name] <= max(rounded, problem.allowed(name))} == {}
        assert "masked_matmul_kernel" not in session.stats
        assert session.stats["masked_weight_kernel"].launches == 2
        assert session.stats["factor_gradients_kernel"].launches == launches


def test_split_factors_hold_sixteen_bits(emulator, arch: int) -> None:
    given = Problem(70, 50, 1, 8, "bfloat16").tensors()
    U, V = given["U"], given["V"]
    with emulator.emulate(arch):
        left, right = matmul.split_factors(U, V, 0.7, split=True)
    exact = 0.7 * U.double() @ V.double()
    assert (left.double() @ right.double().T - exact).norm() / exact.norm() < 2**-15


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck(emulator, monkeypatch: pytest.MonkeyPatch, needs: tuple[bool, bool]) -> None:
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    given = Problem(32, 64, 3, 8).tensors()
    weight, U, V, A, B = (given[name] for name in ("weight", "U", "V", "A", "B"))
    mask = pack_mask(given["kept"])
    tests = ("test_schema", "test_faketensor")
    with emulator.emulate(90):
        torch.library.opcheck(ops.linear_forward, (given["x"], weight, U, V, None, mask, 0.7), test_utils=tests)
        arguments = (given["gy"], given["x"], weight, U, V, A, B, mask, 0.7, 1.3, 0.9, True, *needs)
        torch.library.opcheck(ops.linear_backward, arguments, test_utils=tests)


def test_gradient_traffic(emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond x and gy: 2 B of W and 1/8 of mask a weight, factors once a tile (U and V twice), sums once a tile."""
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    out = columns = 256
    tokens, rank, tile = 64, 8, tiles.GRADIENTS["sm_90"]["half"]
    with emulator.emulate(90) as session:
        Problem(out, columns, tokens, rank, "bfloat16").solve(exact=False)
    stats = session.stats["factor_gradients_kernel"]
    per_row_and_column = 1 / tile.rows + 1 / tile.columns
    products = 2 * tokens * per_row_and_column
    assert stats.load_bytes / (out * columns) <= 2.125 + products + 4 * 3 * rank * per_row_and_column
    assert stats.store_bytes / (out * columns) <= 4 * (2 * rank + 1) * per_row_and_column
