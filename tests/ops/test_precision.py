"""Half-precision bases, autocast, gradient scaling and activation checkpointing: dtypes, values and what is skipped."""

from __future__ import annotations

import contextlib

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels import reference
from pst_kernels.layers.pst_layer import FACTORS
from pst_kernels.model import pst_layers

HALF = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest output


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def layer_over(base: torch.dtype) -> pst.PSTLinear:
    torch.manual_seed(0)
    layer = pst.PSTLinear(40, 24, dtype=base, config=pst.PSTConfig(sparsity=0.6, weight_rank=3, score_rank=2))
    return toys.perturb(layer)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("under", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", HALF, ids=str)
def test_fp32_factors_over_any_base_with_and_without_autocast(base, under, compiled):
    layer = layer_over(base)
    torch.compiler.reset()
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(5, 40).to(base).requires_grad_()
    with autocast(under):
        y = forward(x)
    assert y.dtype == (under or base)
    gy = torch.randn_like(y)
    y.backward(gy)
    assert x.grad.dtype == base
    assert {getattr(layer, name).grad.dtype for name in FACTORS} == {torch.float32}
    assert layer.weight.grad is None

    factors = [factor.detach().double().requires_grad_() for factor in layer.factors]
    exact = reference.pst_linear(x.detach().double(), layer.weight.double(), layer.bias.double(), *factors, layer.mask)
    exact.backward(gy.double())
    tolerance = max(HALF[base], HALF[under or base])
    found = [y, *(factor.grad for factor in layer.factors)]
    for ours, theirs in zip(found, [exact, *(factor.grad for factor in factors)], strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def scaled_step(model: nn.Module, optimizer, scaler, batch, spoil: bool = False) -> None:
    with torch.autocast("cpu", torch.float16):
        loss = model(**batch).loss
    scaler.scale(loss * float("inf") if spoil else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("base", [torch.float32, torch.float16], ids=str)
def test_gradient_scaling_with_fp16(base):
    """Scaling by a power of two changes nothing; a step with infinite gradients is skipped, and so is its mask."""

    def build():
        model = pst.replace_linear(toys.seeded().to(base), pst.PSTConfig(sparsity=0.5)).train()
        model.classifier.float()  # GradScaler takes no fp16 gradients; the factors are fp32 already
        toys.perturb(model)
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    (scaled, ours), (plain, theirs) = build(), build()
    scaler, off = (torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled) for enabled in (True, False))
    for seed in range(3):
        batch = toys.inputs("bert", seed=seed)
        scaled_step(scaled, ours, scaler, batch)
        scaled_step(plain, theirs, off, batch)
    one, other = toys.snapshot(scaled), toys.snapshot(plain)
    for name, tensor in other.items():
        if name.endswith("pst_mask"):  # fp16 gradients below the normal range differ, and so may single scores
            flipped = int(sum(bin(word & 0xFFFFFFFF).count("1") for word in (one[name] ^ tensor).flatten().tolist()))
            assert flipped <= 4, name
        else:
            torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=2e-4, msg=name)

    before, scale = toys.snapshot(scaled), scaler.get_scale()
    scaled_step(scaled, ours, scaler, toys.inputs("bert", seed=9), spoil=True)
    assert scaler.get_scale() == scale / 2
    assert not toys.differences(toys.snapshot(scaled), before)


def test_gradient_scaling_over_an_fp16_head_is_refused_by_torch_by_name():
    model = pst.replace_linear(toys.seeded().half()).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):  # in docs/troubleshooting.md
        scaled_step(model, optimizer, torch.amp.GradScaler("cpu"), toys.inputs("bert"))


@pytest.mark.parametrize("family", toys.FAMILIES)
@pytest.mark.parametrize("base", HALF, ids=str)
def test_models_in_any_precision_train_and_stay_exactly_sparse(family, base):
    model = toys.perturb(pst.replace_linear(toys.seeded(family).to(base), pst.PSTConfig(sparsity=0.8))).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    schedule = pst.SparsitySchedule(model, 3)
    batch = {k: v.to(base) if v.is_floating_point() else v for k, v in toys.inputs(family).items()}
    # not AdamW, whose eps of 1e-8 is 0 in the fp16 of the head
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = model(**batch).loss
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for _, layer in pst_layers(model):
            pruned = int(layer.weight.numel() * schedule.sparsity)
            assert int((~layer.mask).sum()) == pruned
            assert int((layer.masked_weight() == 0).sum()) >= pruned
    assert {layer.pst_U.dtype for _, layer in pst_layers(model)} == {torch.float32}
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_transformers_own_activation_checkpointing(family, reentrant):
    """The same gradients as without, in both modes. Reentrant, the frozen embeddings' output must require grad."""

    def gradients(checkpointing: bool):
        model = toys.perturb(pst.replace_linear(toys.seeded(family))).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**toys.inputs(family)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
