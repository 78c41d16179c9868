"""A whole PSTLinear training step on the compiled kernels: mask, forward, backward, optimizer, the next mask."""

from __future__ import annotations

import copy

import pytest
import torch
from dyadic import grid

import pst_kernels as pst

pytest.importorskip("triton", reason="triton is not installed")


def layer(dtype: torch.dtype = torch.bfloat16, **settings) -> pst.PSTLinear:
    torch.manual_seed(0)
    # a small layer on a CPU would keep M * W', and leave its products to the library
    config = pst.PSTConfig(sparsity=0.7, weight_rank=3, score_rank=2, masked_weight="remake", **settings)
    made = pst.PSTLinear(70, 40, dtype=dtype, config=config)
    with torch.no_grad():
        made.weight.copy_(grid(40, 70, unit=256, reach=200))
        for factor in made.factors:
            factor.copy_(grid(*factor.shape))
    return made


def step(made: pst.PSTLinear, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, dx and the factors' gradients; the factors then move by a dyadic step, so that scores stay exact."""
    x = x.detach().requires_grad_()
    y = made(x)
    y.sum().backward()  # a gradient of stride 0
    found = [y.detach(), x.grad, *(factor.grad for factor in made.factors)]
    with torch.no_grad():
        for factor in made.factors:
            factor -= factor.grad.sign() / 64
            factor.grad = None
    return found


@pytest.mark.parametrize("arch", [80, 90])
def test_two_steps_equal_those_of_the_cpu(emulator, monkeypatch, arch: int) -> None:
    ours, plain = layer(), layer()
    x = torch.randn(2, 3, 70).to(torch.bfloat16)
    expected = step(plain, x)
    first_mask = plain.pst_mask.clone()  # the factors have moved since it was made
    moved, next_mask = copy.deepcopy(plain.state_dict()), plain.mask
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", f"sm_{arch}")
    with emulator.emulate(arch) as session:
        found = step(ours, x)
        assert torch.equal(ours.pst_mask, first_mask)
        # signs of gradients near zero may differ: the second mask is that of the same factors
        ours.load_state_dict({name: t for name, t in moved.items() if name != "pst_mask"}, strict=False)
        assert torch.equal(ours.mask, next_mask)
    assert int((~ours.mask).sum()) == int(40 * 70 * 0.7)
    assert any(name.startswith("masked_matmul") for name in session.stats)
    assert any(name.startswith("factor_gradients") for name in session.stats)
    for value, reference in zip(found, expected, strict=True):
        error = (value.double() - reference.double()).norm() / reference.double().norm()
        assert error < 6e-3, error  # bf16 in and out, and G rounded to bf16 on the CPU


@pytest.mark.parametrize("arch", [80, 90])
def test_mask_and_masked_weight_come_from_one_pass_for_many_tokens(emulator, monkeypatch, arch: int) -> None:
    """Where the library multiplies, the forward after a due mask reads W once; the backward makes M * W' anew."""
    matmul = pytest.importorskip("pst_kernels.triton.matmul")
    tables = pytest.importorskip("pst_kernels.triton.tiles.tables")
    ours, plain = layer(torch.float32), layer(torch.float32)
    x = torch.randn(tables.FLOAT_TOKENS + 6, 70)
    expected, first_mask = step(plain, x), plain.pst_mask.clone()
    made_again, masked_for_library = [], matmul.masked_for_library
    monkeypatch.setattr(matmul, "masked_for_library", lambda *args: made_again.append(1) or masked_for_library(*args))
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", f"sm_{arch}")
    with emulator.emulate(arch):
        y = ours(x)
        assert not made_again
        assert torch.equal(ours.pst_mask, first_mask)
        assert torch.equal(ours(x), y)  # not due: by way of the op
        assert made_again == [1]
    torch.testing.assert_close(y, expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", [80, 90])
def test_steps_of_a_block_pattern_equal_those_of_the_cpu(emulator, monkeypatch, arch: int) -> None:
    """A step with a fixed mask, one that also learns the scores, and the mask after it."""
    ours, plain = (layer(pattern="block:32", mask_interval=2) for _ in range(2))
    for made in (ours, plain):
        made.sparsity = 0.5  # three of six blocks
    x = torch.randn(2, 3, 70).to(torch.bfloat16)
    expected, states = [], []
    for _ in range(2):
        expected.append(step(plain, x))
        states.append({name: value.clone() for name, value in plain.named_parameters()})
    next_mask = plain.mask
    assert bool(expected[1][4].any())
    assert not bool(expected[0][4].any())  # dA
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", f"sm_{arch}")
    with emulator.emulate(arch) as session:
        for values, state in zip(expected, states, strict=True):
            for value, reference in zip(step(ours, x), values, strict=True):
                error = (value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
                assert error < 6e-3, error
            with torch.no_grad():  # signs of gradients near zero may differ
                for name, value in ours.named_parameters():
                    value.copy_(state[name])
        assert torch.equal(ours.mask, next_mask)
    assert session.stats["block_matmul_kernel"].launches == 4
    assert session.stats["block_gradients_kernel"].launches == 2
    assert session.stats["factor_gradients_kernel"].launches == 1
    assert "masked_matmul_kernel" not in session.stats
