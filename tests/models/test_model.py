"""Whole models: trainable numbers, status, merging and unmerging."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import toys
from safetensors.torch import load_file
from torch import nn

import pst_kernels as pst
from pst_kernels.model import pst_layers, trainable_summary


def converted(family: str = "bert", **settings) -> nn.Module:
    """A toy model under PST at 90 %, with factors as after some training, in eval mode; the same at every call."""
    torch.manual_seed(0)
    return toys.perturb(pst.replace_linear(toys.FAMILIES[family](), pst.PSTConfig(**settings))).eval()


def factor_numbers(model: nn.Module) -> int:
    return sum(factor.numel() for _, layer in pst_layers(model) for factor in layer.factors)


def test_bert_base_has_the_published_number_of_factors():
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = pst.replace_linear(BertForSequenceClassification(BertConfig()))
    head = sum(p.numel() for p in model.classifier.parameters())
    assert factor_numbers(model) == 2_820_096
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_820_096 + head
    assert sum(layer.weight.numel() for _, layer in pst_layers(model)) == 84_934_656
    assert len(list(pst_layers(model))) == 72


def test_gpt2_medium_factors():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = pst.replace_linear(GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)))
    assert len(list(pst_layers(model))) == 96
    assert sum(layer.weight.numel() for _, layer in pst_layers(model)) == 301_989_888
    # The published 7,520,256 counts q, k and v apart; c_attn holds the three, and shares V, B and C among them.
    shared = 24 * 2 * (8 + 8 + 1) * 1024
    assert factor_numbers(model) == 7_520_256 - shared == 6_684_672
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6_684_672


def test_print_trainable_parameters(capsys):
    model = converted(sparsity=0.9)
    pst.print_trainable_parameters(model)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    numbers = [int(n.replace(",", "")) for n in re.findall(r": ([\d,]+) \|\|", line)]
    total = sum(p.numel() for p in model.parameters())
    assert numbers == [factor_numbers(model) + 3 * toys.WIDTH + 3, total]
    assert f"trainable%: {100 * numbers[0] / total:.4f}" in line
    assert "(target 0.9000)" in line


def test_trainable_summary_counts_pruned_weights_now_and_in_the_end():
    model = pst.replace_linear(toys.plain(), pst.PSTConfig(sparsity=0.9, initial_sparsity=0.2))
    pst.SparsitySchedule(model, total_steps=10)
    summary = trainable_summary(model)
    sizes = [40 * 24, 33 * 40]
    assert summary.prunable == sum(sizes)
    assert summary.sparsity == sum(int(size * 0.2) for size in sizes) / sum(sizes)
    assert summary.target_sparsity == pytest.approx(0.9)


def test_get_layer_status():
    model = converted("gpt2", sparsity=0.5)
    rows = pst.get_layer_status(model)
    assert [row.name for row in rows] == [name for name, _ in pst_layers(model)]
    fused = next(row for row in rows if row.name.endswith("c_attn"))
    assert fused.shape == (3 * toys.WIDTH, toys.WIDTH)
    assert (fused.dtype, fused.backend, fused.sparsity, fused.target_sparsity) == (torch.float32, "torch", 0.5, 0.5)
    assert not any(row.merged for row in rows)
    next(pst_layers(model))[1].merge()
    assert [row.merged for row in pst.get_layer_status(model)] == [True] + [False] * (len(rows) - 1)
    assert pst.get_layer_status(toys.plain()) == []


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_merged_checkpoint_loads_in_stock_transformers(family, tmp_path):
    dense = toys.FAMILIES[family]()
    names = set(dense.state_dict())
    scales = {"beta": 0.5, "alpha1": 2.0, "alpha2": 0.25}
    model = toys.perturb(pst.replace_linear(dense, pst.PSTConfig(sparsity=0.9, **scales))).eval()
    shapes = [layer.weight.shape for _, layer in pst_layers(model)]
    before = toys.logits(model, family)
    merged = pst.merge_and_unload(model)
    assert set(merged.state_dict()) == names
    assert not any(isinstance(m, (pst.PSTLinear, pst.PSTConv1D)) for m in merged.modules())
    torch.testing.assert_close(toys.logits(merged, family), before, rtol=1e-5, atol=1e-6)

    merged.save_pretrained(tmp_path)
    # found by their zeros: transformers may rename on saving, as it does for ViT
    zeros = {w: int((w == 0).sum()) for w in load_file(tmp_path / "model.safetensors").values() if w.dim() == 2}
    pruned = sorted((w.numel(), n) for w, n in zeros.items() if n > w.numel() / 2)
    assert pruned == sorted((shape.numel(), int(shape.numel() * 0.9)) for shape in shapes)
    stock = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(toys.logits(stock, family), toys.logits(merged, family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_merge_keeps_exactly_the_unpruned_weights(dtype, sparsity):
    model = toys.perturb(pst.replace_linear(toys.plain().to(dtype), pst.PSTConfig(sparsity=sparsity)))
    masks = {name: layer.mask for name, layer in pst_layers(model)}
    merged = pst.merge_and_unload(model)
    for name, mask in masks.items():
        weight = merged.get_submodule(name).weight
        assert weight.dtype is dtype
        assert torch.equal(weight != 0, mask)
        assert int((~mask).sum()) == int(mask.numel() * sparsity)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_merge_is_idempotent_and_unmerge_is_exact(family):
    model = converted(family)
    before, output = toys.snapshot(model), toys.logits(model, family)
    for _, layer in pst_layers(model):
        layer.merge()
    once = {name: layer.weight.clone() for name, layer in pst_layers(model)}
    merged_output = toys.logits(model, family)
    torch.testing.assert_close(merged_output, output, rtol=1e-5, atol=1e-6)
    for name, layer in pst_layers(model):
        layer.merge()
        assert layer.merged
        assert torch.equal(layer.weight, once[name])
    for _ in range(2):
        for _, layer in pst_layers(model):
            layer.unmerge()
        assert not toys.differences(toys.snapshot(model), before)
        assert torch.equal(toys.logits(model, family), output)


def test_unmerge_restores_bf16_bits():
    # in bf16, W' - beta U V would not give W back
    model = toys.perturb(pst.replace_linear(toys.plain().to(torch.bfloat16)), scale=3.0)
    before = toys.snapshot(model)
    for _, layer in pst_layers(model):
        layer.merge()
        layer.unmerge()
    assert not toys.differences(toys.snapshot(model), before)


def test_state_dict_of_a_merged_layer_is_that_of_the_unmerged_one():
    model = converted("gpt2")
    before = toys.snapshot(model)
    for _, layer in pst_layers(model):
        layer.merge()
    assert not toys.differences(toys.snapshot(model), before)


def test_a_merged_layer_neither_trains_nor_loads():
    model = converted()
    state = toys.snapshot(model)
    for _, layer in pst_layers(model):
        layer.merge()
    with pytest.raises(RuntimeError, match=r"is merged; call unmerge\(\)"):
        model.load_state_dict(state)
    model.train()
    with pytest.raises(RuntimeError, match=r"merged, so its factors would not train; call unmerge\(\)"):
        model(**toys.inputs("bert"))
    with torch.no_grad():
        model(**toys.inputs("bert"))


def test_merge_and_unload_of_merged_layers():
    model, other = converted(), converted()
    for _, layer in pst_layers(model):
        layer.merge()
    one, two = pst.merge_and_unload(model), pst.merge_and_unload(other)
    assert not toys.differences(toys.snapshot(one), toys.snapshot(two))


def test_merge_and_unload_again_is_an_error_that_says_why():
    merged = pst.merge_and_unload(converted())
    before = toys.snapshot(merged)
    with pytest.raises(ValueError, match=r"has no PST layers; call replace_linear"):
        pst.merge_and_unload(merged)
    assert not toys.differences(toys.snapshot(merged), before)


def test_merge_and_unload_of_a_root():
    model = toys.perturb(pst.replace_linear(nn.Linear(40, 24), pst.PSTConfig(sparsity=0.5)))
    x = torch.randn(3, 40)
    expected = model(x)
    plain = pst.merge_and_unload(model)
    assert type(plain) is nn.Linear
    assert int((plain.weight == 0).sum()) == 480
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", toys.FAMILIES)
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(family, value):
    model = converted(family)
    name, layer = list(pst_layers(model))[-1]
    with torch.no_grad():
        layer.pst_R[0] = 100.0  # its row is kept
        layer.pst_U[0, 0] = value
        layer.pst_V[0] = 1.0
    layer.mark_stale()
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has \d+ NaN or infinite values .*learning rate"):
        pst.merge_and_unload(model, safe_merge=True)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert not toys.differences(toys.snapshot(model), before)
    assert len(list(pst_layers(model))) == toys.LINEARS[family]


def test_safe_merge_of_finite_weights():
    one, two = converted(), converted()
    assert not toys.differences(
        toys.snapshot(pst.merge_and_unload(one, safe_merge=True)), toys.snapshot(pst.merge_and_unload(two))
    )


def test_merging_into_a_shared_parameter_is_refused():
    model = toys.plain(8, 8, 8, 2)
    model[2].weight = model[0].weight
    pst.replace_linear(model, pst.PSTConfig(target_modules=["0"]))
    before = toys.snapshot(model)
    with pytest.raises(RuntimeError, match=r"weight of 0 is shared with another module.*untie it"):
        pst.merge_and_unload(model)
    assert not toys.differences(toys.snapshot(model), before)
    assert not model[0].merged


def test_merge_does_not_touch_the_parameters_of_a_copy():
    model = converted()
    other = copy.deepcopy(model)
    before = toys.snapshot(other)
    pst.merge_and_unload(model)
    assert not toys.differences(toys.snapshot(other), before)


@pytest.mark.slow
def test_gpt2_medium_trains_a_step_and_merges_into_a_stock_model(tmp_path):
    # three of its 24 blocks, and words for the batch: all of it takes 30 s of one core and 3.1 GiB
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=1024, n_layer=3, n_head=16, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    model = pst.replace_linear(GPT2LMHeadModel(config)).train()
    batch = {"input_ids": torch.randint(1000, (1, 8))}
    batch["labels"] = batch["input_ids"]
    before = model.transformer.h[0].attn.c_attn.pst_V.clone()
    toys.train_step(model, batch, lr=1e-3)
    assert not torch.equal(model.transformer.h[0].attn.c_attn.pst_V, before)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
    pst.merge_and_unload(model).save_pretrained(tmp_path)
    del model
    stock = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    for block in stock.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            assert int((layer.weight == 0).sum()) == int(layer.weight.numel() * 0.9)
    assert stock.transformer.h[0].attn.c_attn.weight.shape == (1024, 3072)


def test_conv1d_at_full_width_learns():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=1024, n_layer=1, n_head=16, vocab_size=500, bos_token_id=0, eos_token_id=0)
    model = pst.replace_linear(GPT2LMHeadModel(config)).train()
    batch = {"input_ids": torch.randint(500, (1, 16))}
    batch["labels"] = batch["input_ids"]
    losses = [toys.train_step(model, batch, lr=1e-3) for _ in range(3)]
    assert losses[-1] < losses[0]
