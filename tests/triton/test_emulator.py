"""Checks of the emulator itself: Triton kernels of many kinds, compiled for sm_80 and sm_90, against PyTorch."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

import emulator as emu  # noqa: E402

ARCHS = [80, 90]
pytestmark = pytest.mark.compiled


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < N
    x = tl.load(x_ptr + i, mask=m, other=0.0).to(tl.float32)
    y = tl.where(x > 0, tl.exp(x) * 0.5, tl.abs(x) / (1.0 + x * x)) + tl.sqrt(tl.abs(x)) + tl.sigmoid(x)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def rows_kernel(x_ptr, sum_ptr, max_ptr, arg_ptr, scan_ptr, sort_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + c, mask=c < N, other=-1e30)
    z = tl.where(c < N, x, 0.0)
    tl.store(sum_ptr + row, tl.sum(z, 0))
    tl.store(max_ptr + row, tl.max(x, 0))
    tl.store(arg_ptr + row, tl.argmax(x, 0))
    tl.store(scan_ptr + row * N + c, tl.cumsum(z, 0), mask=c < N)
    tl.store(sort_ptr + row * BLOCK + c, tl.sort(x))


@triton.jit
def atomics_kernel(x_ptr, out_ptr, ticket_ptr, last_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < N
    x = tl.load(x_ptr + i, mask=m, other=0)
    tl.atomic_add(out_ptr + x % 7, 1, mask=m)
    tl.atomic_max(out_ptr + 7 + x % 3, x, mask=m)
    tl.atomic_min(out_ptr + 10 + x % 3, x, mask=m)
    tl.debug_barrier()
    t = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    if t == tl.num_programs(0) - 1:  # the last block to finish sums what all have written
        o = tl.arange(0, 8)
        tl.store(last_ptr, tl.sum(tl.load(out_ptr + o, mask=o < 7, other=0), 0))


@triton.jit
def loop_kernel(x_ptr, out_ptr, N):
    n = tl.load(x_ptr + tl.program_id(0))
    steps = 0
    while n != 1:
        n = tl.where(n % 2 == 0, n // 2, 3 * n + 1)
        steps += 1
        if steps > N:
            n = 1
    tl.store(out_ptr + tl.program_id(0), steps)


@triton.jit
def select_kernel(x_ptr, count_ptr, kept_ptr, lo, hi, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < N
    x = tl.load(x_ptr + i, mask=m, other=float("inf"))
    tl.atomic_add(count_ptr, tl.sum((x < lo).to(tl.int32), 0))
    inside = (x >= lo) & (x < hi)
    n = tl.sum(inside.to(tl.int32), 0)
    base = tl.atomic_add(count_ptr + 1, n)
    place = tl.cumsum(inside.to(tl.int32), 0) - 1
    tl.store(kept_ptr + base + place, x, mask=inside)


@triton.jit
def batched_dot_kernel(a_ptr, b_ptr, c_ptr, K: tl.constexpr, M: tl.constexpr, TRANS: tl.constexpr):
    i, k = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None] * K + k[None, :])
    b = tl.load(b_ptr + i[:, None] * K + k[None, :]).trans() if TRANS else tl.load(b_ptr + k[:, None] * M + i[None, :])
    tl.store(c_ptr + i[:, None] * M + i[None, :], tl.dot(a, b))


@triton.jit
def oob_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N, other=0.0), mask=i < N + 1)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_elementwise(arch, dtype, tol):
    x = torch.randn(1000).to(dtype)
    y = torch.full_like(x, float("nan"))
    with emu.emulate(arch):
        elementwise_kernel[(8,)](x, y, 1000, BLOCK=128)
    f = x.double()
    ref = torch.where(f > 0, f.exp() * 0.5, f.abs() / (1 + f * f)) + f.abs().sqrt() + f.sigmoid()
    torch.testing.assert_close(y.double(), ref, rtol=tol, atol=tol)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n", [5, 64, 200])
def test_rows(arch, n):
    x = torch.randn(3, n)
    block = triton.next_power_of_2(n)
    total, most, where = torch.empty(3), torch.empty(3), torch.empty(3, dtype=torch.int32)
    running, ordered = torch.empty(3, n), torch.empty(3, block)
    with emu.emulate(arch) as session:
        rows_kernel[(3,)](x, total, most, where, running, ordered, n, BLOCK=block)
    torch.testing.assert_close(total, x.sum(1))
    assert torch.equal(most, x.max(1).values)
    assert torch.equal(where.long(), x.argmax(1))
    torch.testing.assert_close(running, x.cumsum(1))
    assert torch.equal(ordered[:, block - n :], x.sort(1).values)
    assert session.stats["rows_kernel"].load_bytes >= x.numel() * 4


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
def test_atomics(arch, order):
    x = torch.randint(0, 1000, (700,), dtype=torch.int32)
    out = torch.zeros(13, dtype=torch.int32)
    out[10:] = 10000
    ticket, last = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with emu.emulate(arch, order):
        atomics_kernel[(6,)](x, out, ticket, last, 700, BLOCK=128)
    assert torch.equal(out[:7].long(), torch.bincount(x.long() % 7, minlength=7))
    for r in range(3):
        assert out[7 + r] == x[x % 3 == r].max()
        assert out[10 + r] == x[x % 3 == r].min()
    assert (ticket.item(), last.item()) == (6, 700)


@pytest.mark.parametrize("arch", ARCHS)
def test_data_dependent_loop(arch):
    x = torch.tensor([1, 2, 3, 7, 27], dtype=torch.int32)
    out = torch.zeros(5, dtype=torch.int32)
    with emu.emulate(arch):
        loop_kernel[(5,)](x, out, 1000)
    assert out.tolist() == [0, 1, 7, 16, 111]


@pytest.mark.parametrize("arch", ARCHS)
def test_compaction(arch):
    x = torch.randn(1500)
    count, kept = torch.zeros(2, dtype=torch.int32), torch.full((1500,), float("nan"))
    with emu.emulate(arch, "shuffled"):
        select_kernel[(6,)](x, count, kept, -0.1, 0.2, 1500, BLOCK=256)
    want = x[(x >= -0.1) & (x < 0.2)].sort().values
    assert count.tolist() == [int((x < -0.1).sum()), want.numel()]
    assert torch.equal(kept[: want.numel()].sort().values, want)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-3), (torch.float16, 1e-6), (torch.bfloat16, 1e-6)])
@pytest.mark.parametrize(("m", "k"), [(16, 16), (64, 32), (64, 128)])
@pytest.mark.parametrize("trans", [False, True])
def test_dot(arch, dtype, tol, m, k, trans):
    a, b = torch.randn(m, k).to(dtype), torch.randn((m, k) if trans else (k, m)).to(dtype)
    c = torch.full((m, m), float("nan"))
    with emu.emulate(arch):
        batched_dot_kernel[(1,)](a, b, c, K=k, M=m, TRANS=trans)
    ref = a.double() @ (b.double().T if trans else b.double())
    assert (c.double() - ref).norm() / ref.norm() < tol


def test_out_of_bounds_is_found():
    x, y = torch.randn(128), torch.empty(128)
    with emu.emulate(), pytest.raises(emu.MemoryFault):
        oob_kernel[(1,)](x, y, 128, BLOCK=256)


def test_views_and_strides():
    base = torch.randn(4, 100)
    y = torch.zeros(4, 100)
    with emu.emulate():
        elementwise_kernel[(1,)](base[2], y[1], 100, BLOCK=128)
    f = base[2].double()
    ref = torch.where(f > 0, f.exp() * 0.5, f.abs() / (1 + f * f)) + f.abs().sqrt() + f.sigmoid()
    torch.testing.assert_close(y[1].double(), ref, rtol=1e-5, atol=1e-5)
    assert not y[0].any()
    assert not y[2:].any()
