"""Lists of kept weights and the products with them, compiled and in plain PyTorch, against float64."""

import pytest
import torch

from pst_kernels.cpu.sparse_products import multiply, sampled
from pst_kernels.cpu.sparse_rows import SparseRows
from pst_kernels.masks.chunks import CHUNK, chunks_of
from pst_kernels.masks.packing import pack_mask

SHAPES = [(1, 1), (7, 33), (5, 128), (300, 129), (129, 300), (64, 257)]
TOKENS = [0, 1, 7, 8, 9, 33, 50, 130]
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # of rounding to nearest

pytestmark = pytest.mark.usefixtures("cpu_passes")


def problem(rows, columns, sparsity=0.8, dtype=torch.float32):
    weight = torch.randn(rows, columns).to(dtype)
    return weight, torch.rand(rows, columns) >= sparsity


def lists_of(weight, kept):
    return SparseRows.from_dense(weight, kept)


def close(found, left, right, bias=None):
    """found = left @ right to what sums in fp32, rounded once to found's dtype, may be off."""
    left, right = left.double(), right.double()
    exact, size = left @ right, left.abs() @ right.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    depth = 2 + left.shape[1] ** 0.5
    bound = depth * EPSILON[torch.float32] * size + EPSILON[found.dtype] * (exact.abs() + 1e-30)
    return bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_lists_hold_what_is_kept_in_their_order(shape, dtype):
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        weight, kept = problem(*shape, sparsity, dtype)
        lists = lists_of(weight, kept)
        assert torch.equal(lists.to_dense(), torch.where(kept, weight, 0))
        row, column = lists.places()
        order = (column // CHUNK * shape[0] + row) * CHUNK + column % CHUNK
        assert bool((order.diff() > 0).all())
        assert len(lists.pointers) == chunks_of(shape[1]) * shape[0] + 1
        assert lists.values.dtype is dtype
        transposed = lists.transpose()
        expected = lists_of(weight.T, kept.T)
        assert transposed[3:] == expected[3:]
        for found, wanted in zip(transposed[:3], expected[:3], strict=True):
            assert torch.equal(found, wanted)
            assert found.dtype is wanted.dtype


def test_lists_of_strided_weights_and_of_what_the_mask_hides():
    weight, kept = problem(70, 200)
    of_conv1d = weight.T.contiguous().T
    parts = torch.randn(140, 400)[::2, ::2]
    for strided in (of_conv1d, parts):
        for found, wanted in zip(
            SparseRows.from_mask(strided, pack_mask(kept)), lists_of(strided.contiguous(), kept), strict=True
        ):
            assert found == wanted if isinstance(found, int) else torch.equal(found, wanted)
    hidden = torch.where(kept, weight, torch.nan)
    assert torch.equal(lists_of(hidden, kept).values, lists_of(weight, kept).values)
    negative = torch.where(kept, -0.0, weight)
    assert bool(lists_of(negative, kept).values.signbit().all())
    assert len(SparseRows.from_dense(torch.tensor([[0.0, torch.nan, 2.0]])).values) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape):
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            weight, kept = problem(*shape, 0.8, dtype)
            lists, dense, bias = lists_of(weight, kept), torch.where(kept, weight, 0), torch.randn(shape[0])
            x, gy = torch.randn(tokens, shape[1]).to(dtype), torch.randn(tokens, shape[0]).to(dtype)
            y, dx, G = multiply(x, lists, bias), multiply(gy, lists.transpose()), sampled(gy, x, lists)
            assert y.shape == gy.shape
            assert dx.shape == x.shape
            assert y.dtype is dx.dtype is dtype
            assert G.dtype is torch.float32
            assert close(y, x, dense.T, bias), (dtype, tokens)
            assert close(dx, gy, dense), (dtype, tokens)
            whole = torch.zeros(shape)
            whole[lists.places()] = G
            exact = torch.where(kept, gy.double().T @ x.double(), 0)
            size = gy.double().abs().T @ x.double().abs()
            assert bool(((whole - exact).abs() <= (2 + tokens**0.5) * EPSILON[torch.float32] * size).all()), tokens


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_everything_or_nothing_is_kept(sparsity):
    weight, kept = problem(40, 150, sparsity)
    lists, bias = lists_of(weight, kept), torch.randn(40)
    x, gy = torch.randn(20, 150), torch.randn(20, 40)
    assert close(multiply(x, lists, bias), x, (weight * kept).T, bias)
    assert close(multiply(x[:1], lists, bias), x[:1], (weight * kept).T, bias)
    assert len(sampled(gy, x, lists)) == kept.sum()
    assert torch.equal(multiply(x, lists), torch.zeros(20, 40)) == (sparsity == 1.0)


def test_rows_that_keep_all_beside_rows_that_keep_nothing():
    weight = torch.randn(700, 300)
    kept = (torch.arange(700) % 97 == 0)[:, None].expand(700, 300).clone()
    kept[650:, 5] = True
    lists, x = lists_of(weight, kept), torch.randn(70, 300)
    assert close(multiply(x, lists), x, (weight * kept).T)
    assert close(multiply(x[:1], lists), x[:1], (weight * kept).T)


@pytest.mark.parametrize("tokens", [1, 6, 65])
def test_strided_inputs(tokens):
    weight, kept = problem(48, 200)
    lists, dense = lists_of(weight, kept), weight * kept
    wide, ones = torch.randn(2 * tokens, 400), torch.ones(1, 1)
    for x in (wide[::2, 100:300], wide[:tokens, ::2], wide.T[:200, :tokens].T, ones.expand(tokens, 200)):
        gy = ones.expand(tokens, 48)
        assert close(multiply(x, lists), x, dense.T)
        assert close(multiply(gy, lists.transpose()), gy, dense)
        assert torch.equal(sampled(gy, x, lists), sampled(gy.contiguous(), x.contiguous(), lists))


@pytest.mark.parametrize("tokens", [1, 5, 40, 200])
def test_any_number_of_threads_gives_the_same_bits(tokens, monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", "numba")  # the library's dense products differ in the last bit
    weight, kept = problem(530, 300)
    lists, bias = lists_of(weight, kept), torch.randn(530)
    x, gy, before = torch.randn(tokens, 300), torch.randn(tokens, 530), torch.get_num_threads()

    def all_products():
        made = SparseRows.from_mask(weight, pack_mask(kept)), lists.transpose()
        return *made[0][:3], *made[1][:3], multiply(x, lists, bias), multiply(gy, made[1]), sampled(gy, x, lists)

    try:
        torch.set_num_threads(1)
        expected = all_products()
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(found, wanted) for found, wanted in zip(all_products(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_nan_reaches_what_is_kept(cpu_passes):
    weight, kept = problem(90, 260, 0.7)
    weight[0] = torch.nan
    kept[0] = False
    lists = lists_of(weight, kept)
    for tokens in (1, 4, 70):
        for number, made in ((torch.nan, torch.isnan), (torch.inf, torch.isinf)):
            x = torch.randn(tokens, 260)
            x[0, 200] = number
            y = multiply(x, lists)
            assert bool(made(y[0])[kept[:, 200]].all())
            if cpu_passes == "numba":  # a dense product makes NaN of 0 * inf
                assert torch.equal(made(y[0]), kept[:, 200])
            assert bool(y[1:].isfinite().all())


def test_mixed_dtypes():
    weight, kept = problem(33, 140)
    lists = lists_of(weight, kept)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 140)
        y = multiply(x.bfloat16(), lists)
        assert y.dtype is torch.bfloat16
        assert close(y, x.bfloat16(), (weight * kept).T)
        halves = lists.with_values(lists.values.bfloat16())
        assert close(multiply(x, halves), x, (weight.bfloat16() * kept).float().T)


def test_refusals():
    weight, kept = problem(8, 40)
    lists = lists_of(weight, kept)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(TypeError, match=rf"^x must be float32 or bfloat16 on a CPU, got {dtype}"):
            multiply(torch.ones(2, 40, dtype=dtype), lists)
    with pytest.raises(ValueError, match=r"^x must have shape \(T, 40\), got \(2, 41\)"):
        multiply(torch.ones(2, 41), lists)
    with pytest.raises(ValueError, match=r"^bias must have shape \(8,\), got \(9,\)"):
        multiply(torch.ones(2, 40), lists, torch.ones(9))
    with pytest.raises(ValueError, match=r"^gy must have shape \(T, 8\), got \(2, 40\)"):
        sampled(torch.ones(2, 40), torch.ones(2, 40), lists)
    with pytest.raises(ValueError, match="gy has 3 rows but x has 2"):
        sampled(torch.ones(3, 8), torch.ones(2, 40), lists)
    with pytest.raises(ValueError, match=r"^mask must be int32 of shape \(8, 2\)"):
        SparseRows.from_mask(weight, pack_mask(kept)[:, :1])
    with pytest.raises(TypeError, match=r"^weight must be 2-d"):
        SparseRows.from_mask(weight.to(torch.int8), pack_mask(kept))
