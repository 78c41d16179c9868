"""Adapter checkpoints: what they hold, and that what was saved is what loads."""

from __future__ import annotations

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from torch import nn

import pst_kernels as pst
from pst_kernels.checkpoint import ADAPTER_NAME
from pst_kernels.config import CONFIG_NAME
from pst_kernels.layers.pst_layer import FACTORS
from pst_kernels.model import pst_layers

ENTRIES = (*FACTORS, "pst_mask", "pst_num_pruned")


@pytest.mark.parametrize("family", toys.FAMILIES)
@pytest.mark.parametrize("into", ["dense", "converted"])
def test_round_trip_into_a_freshly_seeded_model(family, into, tmp_path):
    model = toys.trained(family)
    pst.save_pretrained(model, tmp_path)
    fresh = toys.seeded(family)
    torch.manual_seed(123)
    if into == "converted":
        pst.replace_linear(fresh)
    loaded = pst.load_pretrained(fresh, tmp_path)
    assert loaded is fresh
    assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))
    assert torch.equal(toys.logits(loaded, family), toys.logits(model, family))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_checkpoint_holds_adapters_and_head_alone(family, tmp_path):
    model = toys.trained(family)
    pst.save_pretrained(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ADAPTER_NAME, CONFIG_NAME]
    names = {f"{name}.{entry}" for name, _ in pst_layers(model) for entry in ENTRIES}
    head = {"classifier.weight", "classifier.bias"} if family == "bert" else set()
    assert load_file(tmp_path / ADAPTER_NAME).keys() == names | head
    assert pst.PSTConfig.from_pretrained(tmp_path) == pst.PSTConfig()


def test_a_loaded_model_goes_on_training_as_the_saved_one(tmp_path):
    model = toys.trained()
    pst.save_pretrained(model, tmp_path)
    loaded = pst.load_pretrained(toys.seeded(), tmp_path)
    for one in (model, loaded):
        toys.train_step(one.train(), toys.inputs("bert", seed=5))
    assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))


def test_a_mask_between_two_sparsities_survives(tmp_path):
    model = pst.replace_linear(toys.seeded())
    schedule = pst.SparsitySchedule(model, 10)
    for _ in range(3):
        toys.train_step(model.train(), toys.inputs("bert"))
        schedule.step()
    pst.save_pretrained(model, tmp_path)
    loaded = pst.load_pretrained(toys.seeded(), tmp_path)
    assert [layer.sparsity for _, layer in pst_layers(loaded)] == [layer.sparsity for _, layer in pst_layers(model)]
    assert 0.1 < next(pst_layers(loaded))[1].sparsity < 0.9


@pytest.mark.parametrize("freeze", ["everything", "head"])
def test_a_frozen_head_is_saved_all_the_same(freeze, tmp_path):
    model = toys.trained(train_bias=True)
    before = toys.logits(model)
    (model if freeze == "everything" else model.classifier).requires_grad_(False)
    pst.save_pretrained(model, tmp_path)
    assert torch.equal(toys.logits(pst.load_pretrained(toys.seeded(), tmp_path)), before)


def test_whatever_else_is_trained_is_saved(tmp_path):
    model = pst.replace_linear(toys.seeded(), pst.PSTConfig(train_bias=True))
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    toys.train_step(toys.perturb(model).train(), toys.inputs("bert"))
    pst.save_pretrained(model.eval(), tmp_path)
    assert torch.equal(toys.logits(pst.load_pretrained(toys.seeded(), tmp_path)), toys.logits(model))


def test_modules_to_save_with_buffers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    state = toys.snapshot(model)
    pst.replace_linear(model, pst.PSTConfig(target_modules=["0"], modules_to_save=["1", "2"]))
    model(torch.randn(16, 8))  # moves the running mean
    pst.save_pretrained(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    fresh.load_state_dict(state)
    pst.load_pretrained(fresh, tmp_path)
    assert not toys.differences(toys.snapshot(fresh), toys.snapshot(model))
    assert fresh[1].running_mean.abs().sum() > 0


def test_a_layer_under_two_names(tmp_path):
    def build():
        torch.manual_seed(0)
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 2))

    model = toys.perturb(pst.replace_linear(build()))
    pst.save_pretrained(model, tmp_path)
    assert not [name for name in load_file(tmp_path / ADAPTER_NAME) if name.startswith("2.")]
    for fresh in (build(), pst.replace_linear(build())):
        loaded = pst.load_pretrained(fresh, tmp_path)
        assert loaded[0] is loaded[2]
        assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))


def test_a_root_that_is_a_linear(tmp_path):
    linear = nn.Linear(40, 24)
    state = toys.snapshot(linear)
    model = toys.perturb(pst.replace_linear(linear, pst.PSTConfig(sparsity=0.5)))
    pst.save_pretrained(model, tmp_path)
    fresh = nn.Linear(40, 24)
    fresh.load_state_dict(state)
    loaded = pst.load_pretrained(fresh, tmp_path)
    assert isinstance(loaded, pst.PSTLinear)
    assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))


def test_callable_targets_are_saved_as_the_names_they_chose(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 2))

    config = pst.PSTConfig(target_modules=lambda module, name: name in ("0", "1.1"), exclude_modules=lambda m, n: False)
    model = toys.perturb(pst.replace_linear(build(), config))
    pst.save_pretrained(model, tmp_path)
    loaded = pst.load_pretrained(build(), tmp_path)
    assert [name for name, _ in pst_layers(loaded)] == ["0", "1.1"]  # "1.0" ends in "0" and stays dense
    assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_of_half_precision_factors(dtype, tmp_path):
    def build():
        torch.manual_seed(0)
        return toys.plain().to(dtype)

    model = toys.perturb(pst.replace_linear(build(), pst.PSTConfig(adapter_dtype=dtype)))
    pst.save_pretrained(model, tmp_path)
    loaded = pst.load_pretrained(build(), tmp_path)
    assert loaded[0].pst_U.dtype is dtype
    assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))


def test_factors_on_the_meta_device(tmp_path):
    model = toys.trained()
    pst.save_pretrained(model, tmp_path)
    with torch.device("meta"):
        loaded = pst.replace_linear(toys.bert())
    loaded.load_state_dict(toys.snapshot(toys.seeded()), strict=False, assign=True)
    embeddings = toys.seeded().bert.embeddings
    for name in ("position_ids", "token_type_ids"):
        setattr(loaded.bert.embeddings, name, getattr(embeddings, name))
    pst.load_pretrained(loaded, tmp_path)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert torch.equal(toys.logits(loaded.eval()), toys.logits(model))
    for one in (model, loaded):
        toys.train_step(one.train(), toys.inputs("bert", seed=5))
    assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))


def test_a_merged_model_saves_its_factors(tmp_path):
    model = toys.trained()
    before = toys.logits(model)
    for _, layer in pst_layers(model):
        layer.merge()
    pst.save_pretrained(model, tmp_path)
    assert torch.equal(toys.logits(pst.load_pretrained(toys.seeded(), tmp_path)), before)
    with pytest.raises(RuntimeError, match=r"is merged; call unmerge\(\) before loading"):
        pst.load_pretrained(model, tmp_path)


def test_saving_over_an_earlier_checkpoint(tmp_path):
    pst.save_pretrained(toys.trained(sparsity=0.5), tmp_path)
    model = toys.trained(sparsity=0.8)
    pst.save_pretrained(model, tmp_path)
    assert torch.equal(toys.logits(pst.load_pretrained(toys.seeded(), tmp_path)), toys.logits(model))
    assert len(list(tmp_path.iterdir())) == 2


# The authors' release


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_released_names(name, tmp_path):
    model = toys.trained()
    state = toys.released_state(model)
    assert "bert.encoder.layer.0.output.dense.mask_scores_R" in state
    assert "bert.encoder.layer.0.output.dense.weight_U" in state
    torch.save(state, tmp_path / name) if name.endswith(".bin") else save_file(state, tmp_path / name)
    torch.manual_seed(5)
    loaded = pst.load_pretrained(pst.replace_linear(toys.bert()), tmp_path)
    assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))
    assert torch.equal(toys.logits(loaded.eval()), toys.logits(model))


def test_released_state_needs_a_converted_model(tmp_path):
    torch.save(toys.released_state(toys.trained()), tmp_path / "pytorch_model.bin")
    model = toys.seeded()
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=r"authors' release.*call replace_linear"):
        pst.load_pretrained(model, tmp_path)
    assert not toys.differences(toys.snapshot(model), before)


def test_an_adapter_over_another_base_is_said(tmp_path, caplog):
    pst.save_pretrained(toys.trained(), tmp_path)
    pst.load_pretrained(toys.seeded(), tmp_path)
    pst.load_pretrained(toys.seeded().to(torch.bfloat16), tmp_path)
    assert caplog.text == ""
    other = toys.seeded()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.add_(0.01)
    pst.load_pretrained(other, tmp_path)
    assert "was trained over other base weights than this model's" in caplog.text
