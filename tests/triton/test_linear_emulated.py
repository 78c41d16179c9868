"""The shipped configurations of the masked linear, compiled for sm_80 and sm_90, executed by the PTX emulator."""

from __future__ import annotations

import pytest
import torch

from pst_kernels.operands import Needs

pytest.importorskip("triton")

from linear_problem import COMPILED, OUTPUTS, SCALES, Problem, operands_of, relative_error, rested_gradients

from pst_kernels import ops
from pst_kernels.triton import gradients, matmul
from pst_kernels.triton.tiles import choice, tables

pytestmark = pytest.mark.usefixtures("poisoned")
GRADIENT_KERNELS = {"factor_gradients_kernel", "many_ranks_kernel"}  # for up to 16 ranks in all, and for more


@pytest.mark.parametrize("problem", COMPILED, ids=str)
def test_equals_float64(emulator, arch: int, problem: Problem) -> None:
    with emulator.emulate(arch) as session:
        errors = problem.errors()
    assert {name: errors[name] for name in OUTPUTS if not errors[name] <= problem.allowed(name)} == {}
    assert session.stats["masked_matmul_kernel"].launches == 2
    assert sum(session.stats[name].launches for name in GRADIENT_KERNELS & session.stats.keys()) == 1


@pytest.mark.parametrize(
    "problem", [COMPILED[0], COMPILED[3], COMPILED[5], Problem(33, 65, 3, 20, "bfloat16")], ids=str
)
@pytest.mark.parametrize("through", [True, False])
def test_gradients_while_the_scores_rest(emulator, arch: int, problem: Problem, through: bool) -> None:
    given = problem.tensors()
    with emulator.emulate(arch):
        operands = operands_of(given, given["kept"])
        found = gradients.rested_backward(given["gy"], given["x"], operands, through, Needs(True, True))
    for name, value, exact in zip(("dx", "dU", "dV"), found, rested_gradients(given, through), strict=True):
        assert relative_error(value, exact) <= problem.allowed(name), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("through", [True, False])
def test_gradients_while_the_scores_rest_from_a_stored_g(
    emulator, arch: int, monkeypatch: pytest.MonkeyPatch, dtype: str, through: bool
) -> None:
    """G * M of a G in bf16 is bf16 itself, and multiplied as it is."""
    monkeypatch.setattr(tables, "G_STORED_TOKENS", dict.fromkeys(tables.G_STORED_TOKENS, 1))
    problem = Problem(128, 192, 12, 8, dtype)
    given = problem.tensors()
    stored = (given["gy"].T @ given["x"]).double()
    with emulator.emulate(arch) as session:
        operands = operands_of(given, given["kept"])
        found = gradients.rested_backward(given["gy"], given["x"], operands, through, Needs(False, True))[1:]
    updated = given["weight"].double() + SCALES["beta"] * given["U"].double() @ given["V"].double()
    Q = stored * given["kept"] * (1.0 + updated.abs() if through else 1.0)
    exact = SCALES["beta"] * Q @ given["V"].double().T, SCALES["beta"] * given["U"].double().T @ Q
    assert max(map(relative_error, found, exact)) < 2e-5
    assert session.stats["factor_gradients_kernel"].launches == 1


def test_traffic_while_the_scores_rest(emulator, touched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of A and B is read, of the sums those of U and V alone are made, and W is read where |W'| counts."""
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    problem = Problem(128, 256, 64, 8, "bfloat16")
    given, weights = problem.tensors(), 128 * 256
    operands = operands_of(given, given["kept"])
    for through in (True, False):
        touched.clear()
        with emulator.emulate(90):
            gradients.rested_backward(given["gy"], given["x"], operands, through, Needs(False, True))
        different = {key: int(marks.sum()) for key, marks in touched.items()}
        once = 0.125 * weights + (2 * 64 + 4 * 8) * (128 + 256)
        assert different["factor_gradients_kernel", "loaded"] == once + (2 * weights if through else 0)
        assert different["add_partials_kernel", "stored"] == 4 * 8 * (128 + 256)
        assert different["add_partials_kernel", "loaded"] == different["factor_gradients_kernel", "stored"]


def test_block_order_changes_no_bit(emulator, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest tile, more than one block of tokens and of rows, and the tokens shared among programs."""
    monkeypatch.setattr(choice, "sweep_length", lambda *_: 3)  # of four tiles
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
    monkeypatch.setattr(tables, "SLOTS", dict.fromkeys(tables.SLOTS, 1e6))
    monkeypatch.setattr(tables, "SPLIT_K_TOKENS", 16)
    problem = Problem(64, 64, 70, 8, "bfloat16")
    for given, launches in ((1 << 30, 1), (1, 1)):
        monkeypatch.setattr(tables, "G_STORED_TOKENS", dict.fromkeys(tables.G_STORED_TOKENS, given))
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
    operands = operands_of(given, given["kept"]).flat
    tests = ("test_schema", "test_faketensor")
    with emulator.emulate(90):
        torch.library.opcheck(ops.linear_forward, (given["x"], *operands, None), test_utils=tests)
        arguments = (given["gy"], given["x"], *operands, True, *needs)
        torch.library.opcheck(ops.linear_backward, arguments, test_utils=tests)


def gradients_of(problem: Problem) -> tuple[torch.Tensor, ...]:
    given = problem.tensors()
    operands = operands_of(given, given["kept"])
    return gradients.linear_backward(given["gy"], given["x"], operands, True, Needs(False, True))[1:]


@pytest.mark.parametrize(
    ("problem", "sweep"),
    [
        pytest.param(Problem(512, 1024, 64, 8, "bfloat16"), None, marks=pytest.mark.slow),
        (Problem(128, 512, 64, 8, "bfloat16"), 4),
        (Problem(256, 128, 64, 8, "bfloat16", factors="bfloat16"), None),
        (Problem(128, 128, 64, 15, "bfloat16"), None),
        (Problem(64, 64, 32, 16, "bfloat16"), None),
        (Problem(64, 64, 32, 64, "bfloat16"), None),
    ],
    ids=str,
)
def test_gradient_traffic(
    emulator, touched, monkeypatch: pytest.MonkeyPatch, problem: Problem, sweep: int | None
) -> None:
    """Beyond x and gy: 2 B of W and 1/8 of mask a weight, V and B once a tile, U and A once a sweep (above 16 ranks in
    all U and V twice, A and B once a tile), column sums written once a tile, row sums once a sweep, both read once,
    gradients written once. Of different bytes, the factors once, and no sum twice."""
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    if sweep:
        monkeypatch.setattr(choice, "sweep_length", lambda *_: sweep)
    out, columns, rank, weights = problem.out, problem.columns, problem.rank, problem.out * problem.columns
    few_ranks = rank <= 8
    tile = choice.gradients("sm_90", torch.bfloat16, torch.bfloat16, out, columns, rank + 1, few_ranks)
    with emulator.emulate(90) as session:
        gradients_of(problem)
    name = "factor_gradients_kernel" if few_ranks else "many_ranks_kernel"
    stats, partials = (session.stats[kernel] for kernel in (name, "add_partials_kernel"))
    a_row_and_column = 1 / tile.rows + 1 / tile.columns
    a_column_and_sweep = 1 / tile.rows + 1 / (tile.columns * (sweep or 1))
    products = 2 * problem.tokens * a_row_and_column
    factor = rank * getattr(torch, problem.factors).itemsize
    factors = 2 * factor * a_column_and_sweep if few_ranks else 3 * factor * a_row_and_column
    sums = 4 * (2 * rank + 1) * a_column_and_sweep
    final = 4 * (2 * rank + 1) * (out + columns)
    assert stats.load_bytes / weights == 2.125 + products + factors
    assert stats.store_bytes / weights == sums
    assert partials.load_bytes / weights == sums
    assert partials.store_bytes == final
    different = {key: int(marks.sum()) for key, marks in touched.items()}
    assert different[name, "loaded"] == 2.125 * weights + 2 * (problem.tokens + factor) * (out + columns)
    assert different[name, "stored"] == stats.store_bytes
    assert different["add_partials_kernel", "loaded"] == partials.load_bytes
    assert different["add_partials_kernel", "stored"] == partials.store_bytes
    asked = 2.125 + factors + 2 * sums + final / weights
    once = 2.125 + (2 * factor * (out + columns) + final) / weights
    print(
        f"bytes a weight beyond x and gy: {asked:.2f} asked for, {once + sums:.2f} different, {once:.2f} without sums"
    )


def test_a_sweep_over_tiles(emulator, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles in two sweeps, the second one shorter; each order of the programs gives the same bits."""
    monkeypatch.setattr(choice, "sweep_length", lambda *_: 2)
    monkeypatch.setitem(tables.GRADIENTS[f"sm_{arch}"], "half", tables.Tile(64, 64, 32, 4, 3))
    problem = Problem(64, 192, 33, 8, "bfloat16")
    exact = problem.solve(exact=True)[2:]
    results = []
    for order in ("forward", "reversed"):
        with emulator.emulate(arch, order) as session:
            results.append(gradients_of(problem))
        assert session.stats["factor_gradients_kernel"].launches == 1
    errors = [relative_error(ours, value) for ours, value in zip(results[0], exact, strict=True)]
    assert max(errors) < 2e-5, errors
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("rank_w", "rank_s"), [(8, 8), (11, 5), (1, 15), (15, 1), (9, 8)])
def test_ranks_that_share_an_operand(emulator, arch: int, rank_w: int, rank_s: int) -> None:
    """Up to 16 in all they are halves of one operand; both sides of that limit, and halves of different size."""
    given = Problem(64, 64, 33, 16, "bfloat16").tensors()
    U, V, A, B = given["U"][:, :rank_w], given["V"][:rank_w], given["A"][:, :rank_s], given["B"][:rank_s]
    U, V, A, B = (factor.contiguous() for factor in (U, V, A, B))
    gy, x, weight = (given[name] for name in ("gy", "x", "weight"))
    with emulator.emulate(arch):
        operands = operands_of(given | {"U": U, "V": V, "A": A, "B": B}, given["kept"])
        found = gradients.linear_backward(gy, x, operands, True, Needs(False, True))[1:]
    beta, alpha1, alpha2 = SCALES.values()
    G = gy.double().T @ x.double()
    updated = weight.double() + beta * U.double() @ V.double()
    D, Q = G * updated, G * (given["kept"] + updated.abs())
    exact = (
        beta * Q @ V.double().T, beta * U.double().T @ Q, alpha1 * D @ B.double().T, alpha1 * A.double().T @ D,
        alpha2 * D.sum(1), alpha2 * D.sum(0),
    )  # fmt: skip
    errors = [relative_error(ours, value) for ours, value in zip(found, exact, strict=True)]
    assert max(errors) < 2e-5, errors
