"""The baselines' gradients against their closed forms in float64, their masks exactly, and how far each is pruned."""

import math

import pytest
import torch
from torch import nn

from bench import baselines
from bench.baselines import hard_concrete, onednn
from bench.baselines.sparse import keep_largest
from pst_kernels import PSTConfig, PSTLinear, reference

OUT, COLUMNS, TOKENS = 33, 57, 11


@pytest.fixture
def problem():
    """(linear, x, gy, G) in float64 with G = gy^T x."""
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, OUT).double()
    x, gy = torch.randn(3, TOKENS, COLUMNS).double(), torch.randn(OUT, 3, TOKENS).double().permute(1, 2, 0)
    return linear, x, gy, gy.flatten(0, 1).T @ x.flatten(0, 1)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def smallest(scores, share):
    """Flat indices of the `share` smallest scores by a stable sort."""
    return set(torch.argsort(scores.flatten(), stable=True)[: int(scores.numel() * share)].tolist())


def pruned(mask):
    return set((~mask.flatten()).nonzero().squeeze(1).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_top_masks_follow_a_stable_sort_where_scores_are_equal(dtype, share):
    scores = torch.randint(-3, 4, (OUT, COLUMNS), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert pruned(keep_largest(scores, int(scores.numel() * share))) == smallest(scores, share)
    everywhere_equal = torch.zeros(4, 5, dtype=dtype)
    assert pruned(keep_largest(everywhere_equal, 7)) == set(range(7))


def test_magnitude(problem):
    linear, x, gy, G = problem
    layer = baselines.Magnitude.from_linear(linear, sparsity=0.6)
    y = layer(x)
    y.backward(gy)
    mask = layer.mask()
    assert pruned(mask) == smallest(layer.weight.detach().abs(), 0.6)
    close(y, x @ (mask * layer.weight).T + layer.bias)
    close(layer.weight.grad, G * mask)
    close(layer.bias.grad, gy.sum((0, 1)))


def test_movement(problem):
    linear, x, gy, G = problem
    layer = baselines.Movement.from_linear(linear, sparsity=0.6)
    assert not layer.mask_scores.any()
    layer.mask_scores.data.normal_()
    layer(x).backward(gy)
    mask = layer.mask()
    assert pruned(mask) == smallest(layer.mask_scores.detach(), 0.6)
    close(layer.mask_scores.grad, G * layer.weight)
    close(layer.weight.grad, G * mask)


def test_soft_movement(problem):
    linear, x, gy, G = problem
    layer = baselines.SoftMovement.from_linear(linear)
    layer.mask_scores.data.normal_(std=4.0)
    (layer(x) * gy).sum().add(7.0 * layer.penalty()).backward()
    s = torch.sigmoid(layer.mask_scores.detach())
    assert torch.equal(layer.mask(), s > 0.1)
    assert 0 < int((s <= 0.1).sum()) < s.numel()
    close(layer.mask_scores.grad, G * layer.weight + 7.0 * s * (1 - s) / s.numel())
    close(layer.weight.grad, G * (s > 0.1))
    layer.go_to(0.0)
    assert layer.mask().all()


def test_hard_concrete(problem, monkeypatch):
    linear, x, gy, G = problem
    layer = baselines.HardConcrete.from_linear(linear).train()
    assert torch.sigmoid(layer.gate_scores).mean().item() == pytest.approx(0.9, abs=1e-4)
    layer.gate_scores.data.normal_(std=2.0)
    torch.manual_seed(3)
    u = torch.empty_like(layer.gate_scores).uniform_(1e-6, 1.0 - 1e-6)
    torch.manual_seed(3)
    (layer(x) * gy).sum().add(5.0 * layer.penalty()).backward()
    S, W = layer.gate_scores.detach(), layer.weight.detach()
    s = 1 / (1 + torch.exp(-(u.log() - (1 - u).log() + S) / (2 / 3)))
    stretched = 1.2 * s - 0.1
    z = stretched.clamp(0, 1)
    inside = (stretched > 0) & (stretched < 1)
    assert 0 < int(inside.sum()) < inside.numel()
    p = torch.sigmoid(S - (2 / 3) * math.log(0.1 / 1.1))
    close(layer.gate_scores.grad, G * W * inside * 1.2 * s * (1 - s) * 1.5 + 5.0 * p * (1 - p) / p.numel())
    close(layer.weight.grad, G * z)
    # the penalty is the chance that a gate is open
    draws = torch.rand(20000, dtype=torch.float64)
    one = S.flatten()[0]
    open_share = (1.2 * torch.sigmoid((torch.logit(draws) + one) / hard_concrete.TEMPERATURE) - 0.1 > 0).double().mean()
    assert open_share.item() == pytest.approx(p.flatten()[0].item(), abs=0.02)
    layer.eval()
    close(layer(x), x @ ((1.2 * torch.sigmoid(S) - 0.1).clamp(0, 1) * W).T + linear.bias)
    assert torch.equal(layer.mask(), 1.2 * torch.sigmoid(S) - 0.1 > 0)


def test_masked_lora(problem):
    linear, x, gy, G = problem
    norms = torch.rand(COLUMNS, dtype=torch.float64)
    layer = baselines.MaskedLoRA.from_linear(linear, norms, sparsity=0.6, rank=4, alpha=8.0)
    close(layer(x), x @ (layer.mask() * linear.weight).T + linear.bias)
    layer.lora_B.data.normal_()
    layer(x).backward(gy)
    mask, Q = layer.mask(), 2.0 * G * layer.mask()
    scores = linear.weight.detach().abs() * norms
    for row, kept in zip(scores, mask, strict=True):
        assert pruned(kept) == smallest(row, 0.6)
    close(layer.lora_B.grad, Q @ layer.lora_A.T)
    close(layer.lora_A.grad, layer.lora_B.T @ Q)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def filled(layer):
    for name, parameter in layer.named_parameters():
        if name.startswith("pst_"):
            parameter.data.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("parts", [("W",), ("AB",), ("RC",), ("W", "AB"), ("W", "RC"), ("AB", "RC"), ("W", "AB", "RC")])
def test_pst_variant(problem, parts, scaled):
    linear, x, gy, G = problem
    scale = torch.rand(COLUMNS, dtype=torch.float64) if scaled else torch.ones(COLUMNS, dtype=torch.float64)
    layer = baselines.PSTVariant.from_linear(
        linear, 0.6, parts=parts, rank=3, beta=0.5, alpha1=2.0, alpha2=3.0, scale=scale if scaled else None
    )
    filled(layer)(x).backward(gy)
    U, V, A, B, R, C = (getattr(layer, f"pst_{name}").detach() for name in "UVABRC")
    updated = linear.weight.detach() + 0.5 * U @ V
    S = torch.zeros_like(updated)
    S += scale * updated.abs() if "W" in parts else 0.0
    S += 2.0 * A @ B if "AB" in parts else 0.0
    S += 3.0 * (R[:, None] + C) if "RC" in parts else 0.0
    assert pruned(layer.mask()) == smallest(S, 0.6)
    D, Q = G * updated, G * (layer.mask() + (scale * updated.abs() if "W" in parts else 0.0))
    close(layer.pst_U.grad, 0.5 * Q @ V.T)
    close(layer.pst_V.grad, 0.5 * U.T @ Q)
    expected = {"A": 2.0 * D @ B.T, "B": 2.0 * A.T @ D, "R": 3.0 * D.sum(1), "C": 3.0 * D.sum(0)}
    for name, gradient in expected.items():
        got = getattr(layer, f"pst_{name}").grad
        if ("AB" if name in "AB" else "RC") in parts:
            close(got, gradient)
        else:
            assert got is None
    assert linear.weight.grad is None


def test_pst_variant_with_all_parts_is_pst(problem):
    linear, x, gy, _ = problem
    variant = filled(baselines.PSTVariant.from_linear(linear, 0.6, rank=3))
    ours = PSTLinear.from_linear(linear, PSTConfig(sparsity=0.6, weight_rank=3, score_rank=3, adapter_dtype="float64"))
    for name in "UVABRC":
        getattr(ours, f"pst_{name}").data.copy_(getattr(variant, f"pst_{name}"))
    close(ours(x), variant(x))
    assert torch.equal(ours.mask, variant.mask())
    exact = reference.scores(linear.weight, *ours.factors)
    close(variant.scores(), exact)
    ours(x).backward(gy)
    variant(x).backward(gy)
    for name in "UVABRC":
        close(getattr(ours, f"pst_{name}").grad, getattr(variant, f"pst_{name}").grad)


def test_a_part_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="W, AB, RC"):
        baselines.PSTVariant.from_linear(nn.Linear(4, 4), parts=("A",))


@pytest.mark.parametrize("name", ["Magnitude", "Movement", "PSTVariant"])
def test_progress_prunes_exactly_up_to_the_target(name):
    layer = getattr(baselines, name).from_linear(nn.Linear(COLUMNS, OUT), sparsity=0.9)
    for progress, count in ((0.0, 0), (0.5, int(0.45 * OUT * COLUMNS)), (1.0, int(0.9 * OUT * COLUMNS))):
        layer.go_to(progress)
        assert int((~layer.mask()).sum()) == count


@pytest.mark.skipif(not onednn.available(), reason="PyTorch without oneDNN")
def test_onednn_multiplies_as_pytorch_does():
    x, weight, gy = torch.randn(11, 57), torch.randn(33, 57), torch.randn(11, 33)
    for found, exact in (
        (onednn.product(x, weight), x.double() @ weight.double().T),
        (onednn.product(gy, weight.T), gy.double() @ weight.double()),
        (onednn.product(gy.T, x.T), gy.double().T @ x.double()),
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
