"""U and V over lists of kept weights, compiled and in plain PyTorch, against float64."""

import pytest
import torch

from pst_kernels.cpu.low_rank import factor_gradients, kept_values
from pst_kernels.cpu.sparse_rows import SparseRows

SHAPES = [(1, 1), (7, 33), (5, 128), (300, 129), (129, 300), (64, 257)]
RANKS = [1, 3, 8, 9, 33, 64, 70, 130]  # also more than one pass takes
EPSILON = 2.0**-24  # of rounding to nearest in fp32
BETA = 0.75

pytestmark = pytest.mark.usefixtures("cpu_passes")


def problem(shape, rank, sparsity=0.8, dtype=torch.float32):
    """Lists of a weight, U and V."""
    lists = SparseRows.from_dense(torch.randn(shape).to(dtype), torch.rand(shape) >= sparsity)
    return lists, torch.randn(shape[0], rank), torch.randn(rank, shape[1])


def product(left, right):
    """BETA left @ right in float64, and how large what it sums is."""
    left, right = BETA * left.double(), right.double()
    return left @ right, left.abs() @ right.abs()


def close(found, exact, size, depth):
    return bool(((found.double() - exact).abs() <= (4 + depth**0.5) * EPSILON * size).all())


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_factors(shape, rank):
    lists, U, V = problem(shape, rank)
    G = lists.with_values(torch.randn(len(lists.values)))
    dU, dV = factor_gradients(G, U, V, BETA)
    assert dU.dtype is dV.dtype is torch.float32
    assert (dU.shape, dV.shape) == (U.shape, V.shape)
    assert close(dU, *product(G.to_dense(), V.t()), shape[1])
    assert close(dV, *product(U.t(), G.to_dense()), shape[0])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_the_kept_weights(shape, rank):
    for dtype in (torch.float32, torch.bfloat16):
        lists, U, V = problem(shape, rank, dtype=dtype)
        for added in (None, torch.randn(len(lists.values))):
            more = lists.values.double() + (0 if added is None else added.double())
            exact, size = (each[lists.places()] for each in product(U, V))
            values = kept_values(lists, U, V, BETA, added)
            assert values.dtype is torch.float32
            assert close(values, exact + more, size + more.abs() + lists.values.abs(), rank)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_everything_or_nothing_is_kept(sparsity):
    lists, U, V = problem((40, 150), 8, sparsity)
    exact, size = product(U, V)
    values = kept_values(lists, U, V, BETA, None)
    dU, dV = factor_gradients(lists, U, V, BETA)
    dense = lists.to_dense().double()
    assert len(values) == (6000 if sparsity == 0.0 else 0)
    assert close(lists.with_values(values).to_dense(), (exact + dense) * (dense != 0), size + dense.abs(), 8)
    assert close(dU, *product(dense, V.t()), 150)
    assert close(dV, *product(U.t(), dense), 40)


def test_factors_of_other_dtypes_and_strides():
    lists, U, V = problem((70, 200), 12)
    for dtype in (torch.bfloat16, torch.float64):
        left, right = U.t().contiguous().t().to(dtype), V.t().contiguous().t().to(dtype)
        for found, wanted in zip(
            (kept_values(lists, left, right, BETA, None), *factor_gradients(lists, left, right, BETA)),
            (kept_values(lists, left.float(), right.float(), BETA, None),
             *factor_gradients(lists, left.float(), right.float(), BETA)),
            strict=True,
        ):  # fmt: skip
            assert found.dtype is torch.float32
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_nan_goes_where_a_weight_is_kept():
    lists, U, V = problem((6, 140), 3)
    row, column = (int(each[4]) for each in lists.places())
    G = lists.with_values(lists.values.clone())
    G.values[4] = torch.nan
    dU, dV = factor_gradients(G, U, V, BETA)
    assert torch.equal(dU.isnan().any(1).nonzero().flatten(), torch.tensor([row]))
    assert torch.equal(dV.isnan().any(0).nonzero().flatten(), torch.tensor([column]))


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", "numba")  # the library's dense products differ in the last bit
    lists, U, V = problem((530, 300), 8)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append((kept_values(lists, U, V, BETA, lists.values), *factor_gradients(lists, U, V, BETA)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
