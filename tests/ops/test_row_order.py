"""Products of many tokens with a large, very sparse weight go through copies of its lists in another order."""

import pytest
import torch

from pst_kernels.cpu import scratch
from pst_kernels.cpu.compiled import row_order, sparse_launch
from pst_kernels.cpu.compiled.sparse_launch import ordered
from pst_kernels.cpu.sparse_products import multiply
from pst_kernels.cpu.sparse_rows import SparseRows

ROWS, COLUMNS, TOKENS = 4100, 330, 1030  # the last window of rows, chunk of columns and tile of tokens are ragged


@pytest.fixture
def lists():
    kept = torch.rand(ROWS, COLUMNS) >= 0.92
    kept[::5] = False
    kept[3::700] = True
    return SparseRows.from_dense(torch.randn(ROWS, COLUMNS), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_changes_no_bit(lists, dtype, monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", "numba")
    lists = lists.with_values(lists.values.to(dtype))
    x, bias = torch.randn(TOKENS, COLUMNS).to(dtype), torch.randn(ROWS)
    made = []
    monkeypatch.setattr(sparse_launch, "ordered", lambda *given: made.append(1) or ordered(*given))
    found = multiply(x, lists, bias)
    assert made == [1]
    monkeypatch.setattr(sparse_launch, "ORDERED_KEPT", 0)
    assert torch.equal(found, multiply(x, lists, bias))
    assert made == [1]
    exact = x.double() @ lists.to_dense().double().T + bias.double()
    size = x.double().abs() @ lists.to_dense().double().abs().T + bias.double().abs()
    rounding = 2.0**-8 if dtype is torch.bfloat16 else 0.0
    assert bool(((found.double() - exact).abs() <= 20 * 2.0**-24 * size + rounding * exact.abs()).all())


def test_a_window_holds_its_rows_by_how_many_weights_they_keep(lists):
    (values, offsets, pointers, *_), _ = ordered(lists, scratch.get)
    order = scratch.get("row order", (len(lists.pointers) - 1,), torch.int16, torch.device("cpu")).view(-1, ROWS)
    counts, its_counts = (p.diff().view(-1, ROWS) for p in (lists.pointers, pointers))
    for first in range(0, ROWS, row_order.WINDOW):
        window = slice(first, first + row_order.WINDOW)
        wanted = counts[:, window].sort(dim=1, stable=True)
        assert torch.equal(its_counts[:, window], wanted.values)
        assert torch.equal(order[:, window].long(), wanted.indices)
    assert pointers[-1] == len(lists.values)
    run = (4 * ROWS) * 2 // 3  # any run: its entries are those of the row it stands for
    chunk, place = divmod(run, ROWS)
    row = place // row_order.WINDOW * row_order.WINDOW + int(order[chunk, place])
    here, there = slice(*lists.pointers[chunk * ROWS + row :][:2]), slice(*pointers[run:][:2])
    assert torch.equal(values[there], lists.values[here])
    assert torch.equal(offsets[there], lists.offsets[here])


@pytest.mark.parametrize("tokens", [1000, 2100])
def test_few_tokens_and_many_threads_keep_the_order(lists, tokens, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # 24 tiles are wanted; 1000 tokens are 16
    made = []
    monkeypatch.setattr(sparse_launch, "ordered", lambda *given: made.append(1) or ordered(*given))
    x = torch.randn(tokens, COLUMNS)
    found = multiply(x, lists)
    assert made == [1] * (tokens == 2100)
    assert torch.allclose(found, x @ lists.to_dense().T, rtol=1e-4, atol=1e-4)
