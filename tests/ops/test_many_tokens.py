"""Products of many tokens with lists of kept weights: how tiles and rows are shared out among threads."""

import pytest
import torch

from pst_kernels.cpu.compiled import sparse_launch
from pst_kernels.cpu.compiled.vectors import WIDTH
from pst_kernels.cpu.sparse_products import multiply
from pst_kernels.cpu.sparse_rows import SparseRows

ROWS, COLUMNS = 700, 330  # the last window of rows and chunk of columns are ragged
MANY = (70, 128, 168, 320, 512, 520, 1030)


@pytest.fixture
def lists():
    kept = torch.rand(ROWS, COLUMNS) >= 0.92
    kept[::5] = False
    kept[3::70] = True
    return SparseRows.from_dense(torch.randn(ROWS, COLUMNS), kept)


@pytest.fixture(autouse=True, params=[0, 1 << 30], ids=["together", "apart"])
def runs_together(request, monkeypatch):
    monkeypatch.setattr(sparse_launch, "RUNS_TOGETHER", request.param)


@pytest.mark.parametrize("tokens", MANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_a_dense_product(lists, tokens, dtype, monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", "numba")
    lists = lists.with_values(lists.values.to(dtype))
    x, bias = torch.randn(tokens, COLUMNS + 7).to(dtype)[:, 3:-4], torch.randn(ROWS)
    found = multiply(x, lists, bias)
    exact = x.double() @ lists.to_dense().double().T + bias.double()
    size = x.double().abs() @ lists.to_dense().double().abs().T + bias.double().abs()
    rounding = 2.0**-8 if dtype is torch.bfloat16 else 0.0
    assert bool(((found.double() - exact).abs() <= 20 * 2.0**-24 * size + rounding * exact.abs()).all())


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("tokens", MANY)
def test_a_tile_has_the_same_bits_whatever_it_is_multiplied_with(lists, tokens, threads, monkeypatch):
    x, bias = torch.randn(tokens, COLUMNS), torch.randn(ROWS)
    alone = torch.cat([multiply(tile, lists, bias) for tile in x.split(WIDTH)])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(multiply(x, lists, bias), alone)
