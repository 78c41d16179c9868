"""Small weights, whose passes are one compiled call each: against the reference, masks exactly, and a layer's room."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import SCALES, grouped, make_problem, masked_weight, relative_error

import pst_kernels as pst
from pst_kernels import cpu, functional, reference
from pst_kernels.cpu import ops, small, small_layer
from pst_kernels.operands import MaskedWeight, Needs

NUMBERS = tuple(SCALES.values())
SHAPES = [(1, 1), (7, 33), (32, 32), (5, 1000), (64, 128)]


@pytest.fixture(params=["compiled", "operators"], autouse=True)
def way(request, monkeypatch):
    if request.param == "operators":
        monkeypatch.setattr(small, "compiled", lambda *_: None)
    return request.param


def problem(shape, **options):
    return make_problem(*shape, weight_dtype=torch.float32, factor_dtype=torch.float32, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_exact_among_ties(shape):
    """Multiples of 1/64 of a few values: many scores are equal, and all of them exact."""
    weight, factors = problem(shape, dyadic=True)
    weight = (weight * 2).round() / 2
    given = grouped((weight, *(f.round() for f in factors)), (1.0, 0.5, 2.0))
    scores = cpu.scores(*given)
    exact = reference.scores(given[0].double(), *(f.double() for f in given[1]), **given[2]._asdict())
    assert torch.equal(scores.double(), exact)
    order = torch.argsort(exact.flatten(), stable=True)
    for count in sorted({1, weight.numel() // 2, weight.numel() * 9 // 10, weight.numel()} - {0}):
        masked = torch.full(shape, math.nan)
        mask = cpu.prune_mask(*given, torch.tensor(count), functional.new_guess(), masked)
        kept = torch.ones(weight.numel(), dtype=torch.bool)
        kept[order[:count]] = False
        kept = kept.view(shape)
        assert torch.equal(functional.unpack_mask(mask, shape[1]), kept)
        updated = given[0] + given[1].U @ given[1].V
        assert torch.equal(masked, torch.where(kept, updated, 0.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pass_has_the_same_bits_of_the_masked_weight(shape):
    """Made with the mask, or from it after loading."""
    given = grouped((problem(shape).weight, *problem(shape).factors), NUMBERS)
    made = torch.full(shape, math.nan)
    mask = cpu.prune_mask(*given, torch.tensor(given[0].numel() // 2), None, made)
    assert torch.equal(made, cpu.masked_weight(MaskedWeight(given[0], given[1], mask, given[2]), torch.float32))


@pytest.mark.parametrize("special", ["signed zeros", "infinities", "some NaN", "all NaN", "denormals"])
def test_masks_of_special_scores(special):
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(20, 40, generator=generator)
    scores = {
        "signed zeros": torch.where(normal > 0, 0.0, -0.0),
        "infinities": torch.where(normal.abs() > 1, normal.sign() * math.inf, normal),
        "some NaN": torch.where(normal > 0.5, math.nan, normal),
        "all NaN": torch.full_like(normal, math.nan),
        "denormals": normal * 1e-41,
    }[special]
    # S = |W'| + A B + R + C with A B alone
    weight, factors = (
        torch.zeros(20, 40),
        [torch.zeros(s) for s in ((20, 1), (1, 40), (20, 20), (20, 40), (20,), (40,))],
    )
    factors[2], factors[3] = torch.eye(20), scores
    if special in ("infinities", "some NaN", "all NaN"):  # 0 * inf is NaN: a column at a time
        factors[2], factors[3] = torch.ones(20, 1), scores[:1].clone()
        scores = scores[:1].expand(20, 40)
    given = grouped((weight, *factors))
    order = torch.argsort(scores.flatten(), stable=True)
    for count in (1, 300, 800):
        kept = torch.ones(800, dtype=torch.bool)
        kept[order[:count]] = False
        mask = cpu.prune_mask(*given, torch.tensor(count), functional.new_guess())
        assert torch.equal(functional.unpack_mask(mask, 40), kept.view(20, 40))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("through_magnitude", [True, False])
def test_gradients(shape, through_magnitude):
    weight, factors = problem(shape, rank=3, score_rank=9)
    mask = functional.prune_mask(weight, *factors, weight.numel() // 2, **SCALES)
    gy, x = torch.randn(6, shape[0]), torch.randn(6, shape[1])
    operands = masked_weight((weight, *factors), mask, NUMBERS)
    found = cpu.linear_backward(gy, x, operands, through_magnitude, Needs(True, True))
    leaves = [f.double().requires_grad_() for f in factors]
    x64 = x.double().requires_grad_()
    kept = functional.unpack_mask(mask, shape[1])
    y = reference.pst_linear(
        x64, weight.double(), None, *leaves, kept, **SCALES, through_magnitude=through_magnitude
    )  # fmt: skip
    for value, right in zip(found, torch.autograd.grad(y, (x64, *leaves), gy.double()), strict=True):
        assert value.shape == right.shape
        assert relative_error(value, right) < 2e-6


def test_a_layer_has_a_room_of_its_own_where_it_serves(way):
    for made, own in (
        (pst.PSTLinear(32, 32), True),
        (pst.PSTLinear(32, 32, dtype=torch.bfloat16), False),
        (pst.PSTLinear(32, 32, config=pst.PSTConfig(adapter_dtype="bfloat16")), False),
        (pst.PSTConv1D(32, 32), False),  # not contiguous as (out, in)
        (pst.PSTLinear(128, 128), False),
    ):
        made(torch.randn(3, 32 if made is not None and made._shape[1] == 32 else 128, dtype=made.weight.dtype))
        assert isinstance(made._ready.options.kernels, small_layer.SmallLayer) == (own and way == "compiled")


def test_its_layer_takes_what_others_take():
    """Strided gradients, no gradient of x, none of the factors, and a step after the weights have moved elsewhere."""
    torch.manual_seed(0)
    layer, x = pst.PSTLinear(33, 20), torch.randn(4, 33)
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.randn_like(factor) * 0.1)
    for moved in (False, True):
        if moved:
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()
        with torch.no_grad():
            layer.pst_C.add_(0.1 * torch.randn(33))
        for needs_input in (True, False):
            for gradient in (torch.ones(()).expand(4, 20), torch.randn(20, 4).t()):
                x_ = x.clone().requires_grad_(needs_input)
                layer.zero_grad()
                layer(x_).backward(gradient)
                leaves = [f.detach().double().requires_grad_() for f in layer.factors]
                scores = reference.scores(layer.weight.double(), *leaves)
                mask = reference.prune_mask(scores.detach().float(), int(layer.pst_num_pruned))
                assert torch.equal(mask, layer.mask)
                x64 = x.double().requires_grad_()
                y = reference.pst_linear(x64, layer.weight.double(), layer.bias.double(), *leaves, mask)
                torch.testing.assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-5)
                expected = torch.autograd.grad(y, (x64, *leaves), gradient.double())
                given = (x_.grad if needs_input else None, *(f.grad for f in layer.factors))
                for value, right in zip(given, expected, strict=True):
                    assert value is None or relative_error(value, right) < 1e-5


def test_a_count_of_zero_keeps_everything():
    layer = pst.PSTLinear(8, 8, config=pst.PSTConfig(sparsity=0.0))
    layer(torch.randn(1, 8))
    assert layer.mask.all()
    assert ops.is_small(layer.weight)
