"""Which layers are converted, and what stays trainable beside them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels.config import matches
from pst_kernels.layers.checks import is_conv1d
from pst_kernels.layers.pst_layer import FACTORS, PSTLayer
from pst_kernels.model import pst_layers


def converted(model: nn.Module) -> list[str]:
    return [name for name, _ in pst_layers(model)]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def factor_names(model: nn.Module) -> set[str]:
    return {f"{name}.{factor}" if name else factor for name, _ in pst_layers(model) for factor in FACTORS}


class Tied(nn.Module):
    """Two linears with one weight, and a body."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.again = self.one
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.again(torch.relu(self.one(x))))


class Listed(nn.Module):
    """A home-made model that keeps all its layers, the last one too, in a ModuleList."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)])


class Wrapped(nn.Module):
    """A transformers model inside a home-made one with its own head."""

    def __init__(self):
        super().__init__()
        self.encoder = toys.bert().bert
        self.scorer = nn.Linear(toys.WIDTH, 2)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_all_linear_converts_the_linears_of_blocks_alone(family):
    model = toys.FAMILIES[family]()
    dense = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    names = converted(pst.replace_linear(model))
    assert len(names) == toys.LINEARS[family]
    assert set(names) <= dense
    left = {name.rsplit(".", 1)[-1] for name in dense - set(names)}
    assert left <= {"dense", "classifier", "lm_head", "out_proj"}  # "dense" is the pooler's, or RoBERTa's head's
    assert not any(part in name for name in names for part in ("embed", "pooler", "classifier", "lm_head", "shared"))


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("roberta", {f"classifier.{layer}.{p}" for layer in ("dense", "out_proj") for p in ("weight", "bias")}),
        ("gpt2", set()),  # its lm_head is tied to the embedding, as T5's is
        ("vit", {"classifier.weight", "classifier.bias"}),
        ("t5", set()),
    ],
)
def test_factors_and_head_train_and_the_rest_gets_no_gradient(family, head):
    model = pst.replace_linear(toys.FAMILIES[family]())
    assert trainable(model) == factor_names(model) | head
    model(**toys.inputs(family)).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trainable(model)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_training_changes_factors_and_head_alone(family):
    model = toys.perturb(pst.replace_linear(toys.FAMILIES[family](), pst.PSTConfig(sparsity=0.5)))
    before, may_change = toys.snapshot(model), trainable(model)
    toys.train_step(model, toys.inputs(family))
    after = toys.snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if not name.endswith("pst_mask")} == may_change


def test_plain_model_keeps_its_last_linear_dense_and_trains_it():
    model = pst.replace_linear(toys.plain())
    assert converted(model) == ["0", "2"]
    assert trainable(model) == factor_names(model) | {"4.weight", "4.bias"}


def test_a_module_list_outside_transformers_is_not_a_stack_of_blocks():
    model = pst.replace_linear(Listed())
    assert converted(model) == ["layers.0", "layers.1"]
    assert trainable(model) == factor_names(model) | {"layers.2.weight", "layers.2.bias"}


def test_blocks_of_a_transformers_model_inside_another_model():
    model = pst.replace_linear(Wrapped())
    assert len(converted(model)) == 12
    assert all(".layer." in name for name in converted(model))
    assert trainable(model) == factor_names(model) | {"scorer.weight", "scorer.bias"}


def test_a_root_that_is_a_linear_returns_a_new_root():
    linear = nn.Linear(8, 6)
    model = pst.replace_linear(linear)
    assert isinstance(model, pst.PSTLinear)
    assert model.weight is linear.weight
    assert trainable(model) == set(FACTORS)
    assert pst.replace_linear(model) is model


BLOCK = "bert.encoder.layer.{}.{}"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r"bert\.encoder\.layer\.1\..*query", [BLOCK.format(1, "attention.self.query")]),
        (["query"], [BLOCK.format(i, "attention.self.query") for i in (0, 1)]),
        (
            ["self.key", "pooler.dense"],
            [*(BLOCK.format(i, "attention.self.key") for i in (0, 1)), "bert.pooler.dense"],
        ),
        (("classifier",), ["classifier"]),
        (
            lambda module, name: module.weight.shape[0] == 48,
            [BLOCK.format(i, "intermediate.dense") for i in (0, 1)],
        ),
    ],
    ids=["regex", "suffix", "dotted suffixes", "tuple", "callable"],
)
def test_target_modules(targets, expected):
    assert converted(pst.replace_linear(toys.bert(), pst.PSTConfig(target_modules=targets))) == expected


def test_a_suffix_matches_whole_names_only():
    assert matches(["dense"], nn.Linear(1, 1), "a.dense")
    assert not matches(["dense"], nn.Linear(1, 1), "a.condense")
    assert not matches("dense", nn.Linear(1, 1), "a.dense")  # a string is a regular expression for the whole name


@pytest.mark.parametrize(
    "exclude",
    [["query", "key"], r".*\.(query|key)", lambda module, name: name.endswith(("query", "key"))],
    ids=["suffixes", "regex", "callable"],
)
def test_exclude_modules(exclude):
    names = converted(pst.replace_linear(toys.bert(), pst.PSTConfig(exclude_modules=exclude)))
    assert len(names) == 8
    assert not any(name.endswith(("query", "key")) for name in names)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_same_parameter_objects(family):
    model = toys.FAMILIES[family]()
    before = {name: id(p) for name, p in model.named_parameters()}
    pst.replace_linear(model)
    after = {name: id(p) for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == factor_names(model)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_second_call_keeps_learned_factors(family):
    model = toys.perturb(pst.replace_linear(toys.FAMILIES[family](), pst.PSTConfig(sparsity=0.5)))
    before, modules, trains = toys.snapshot(model), dict(model.named_modules()), trainable(model)
    assert pst.replace_linear(model, pst.PSTConfig(sparsity=0.5)) is model
    assert not toys.differences(toys.snapshot(model), before)
    assert dict(model.named_modules()) == modules
    assert trainable(model) == trains


def test_second_call_with_other_settings_says_that_it_changes_nothing(caplog):
    model = pst.replace_linear(toys.plain(), pst.PSTConfig(sparsity=0.5))
    before = toys.snapshot(model)
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        pst.replace_linear(model, pst.PSTConfig(sparsity=0.9))
    assert "sparsity=0.5" in caplog.text
    assert "0.9" in caplog.text
    assert not toys.differences(toys.snapshot(model), before)


def test_second_call_can_add_layers():
    model = pst.replace_linear(toys.bert(), pst.PSTConfig(target_modules=["query"]))
    pst.replace_linear(model, pst.PSTConfig(target_modules=["query", "key"]))
    assert len(converted(model)) == 4


def test_a_layer_under_two_names_stays_one_layer():
    model = pst.replace_linear(Twice())
    assert model.one is model.again
    assert isinstance(model.one, pst.PSTLinear)
    assert not isinstance(model.head, PSTLayer)
    model(torch.randn(3, 8)).sum().backward()
    assert model.one.pst_V.grad is not None
    merged = pst.merge_and_unload(toys.perturb(model))
    assert merged.one is merged.again
    assert type(merged.one) is nn.Linear


def test_tied_weights_stay_dense_unless_asked_for(caplog):
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        model = pst.replace_linear(Tied())
    assert converted(model) == ["body"]
    assert model.first.weight is model.second.weight
    assert "first, second" in caplog.text
    asked = pst.replace_linear(Tied(), pst.PSTConfig(target_modules=["first"]))
    assert converted(asked) == ["first"]
    assert asked.first.weight is asked.second.weight


def test_tied_embedding_stays_tied():
    model = pst.replace_linear(toys.gpt2())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.lm_head.weight.requires_grad


def test_train_bias():
    model = pst.replace_linear(toys.bert(), pst.PSTConfig(train_bias=True))
    biases = {f"{name}.bias" for name in converted(model)}
    assert trainable(model) == factor_names(model) | biases | {"classifier.weight", "classifier.bias"}
    model(**toys.inputs("bert")).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in biases)


def test_modules_to_save():
    model = pst.replace_linear(toys.bert(), pst.PSTConfig(modules_to_save=["pooler", "LayerNorm"]))
    norms = {name for name, _ in model.named_parameters() if "LayerNorm" in name}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert len(norms) == 10
    assert trainable(model) == factor_names(model) | norms | pooler
    none = pst.replace_linear(toys.bert(), pst.PSTConfig(modules_to_save=[]))
    assert trainable(none) == factor_names(none)


def test_modules_to_save_that_hold_converted_layers_leave_their_weights_frozen():
    model = pst.replace_linear(toys.bert(), pst.PSTConfig(modules_to_save=["encoder.layer.0"]))
    assert not any(layer.weight.requires_grad or layer.bias.requires_grad for _, layer in pst_layers(model))
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in trainable(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_dtype_over_a_bf16_base(dtype):
    model = toys.bert().to(torch.bfloat16)
    pst.replace_linear(model, pst.PSTConfig(sparsity=0.5, adapter_dtype=dtype))
    layer = model.bert.encoder.layer[0].intermediate.dense
    assert layer.weight.dtype is torch.bfloat16
    assert {factor.dtype for factor in layer.factors} == {dtype}
    toys.perturb(model)
    output = model(**toys.inputs("bert"))
    assert output.logits.dtype is torch.bfloat16
    output.loss.backward()
    assert layer.pst_V.grad.dtype is dtype
    assert torch.isfinite(layer.pst_V.grad).all()
    assert layer.pst_V.grad.abs().sum() > 0


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_conversion_on_the_meta_device_and_loading_into_it(family):
    dense = toys.FAMILIES[family]()
    with torch.device("meta"):
        model = pst.replace_linear(toys.FAMILIES[family](), pst.PSTConfig(sparsity=0.5))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(converted(model)) == toys.LINEARS[family]
    reference = toys.perturb(pst.replace_linear(dense, pst.PSTConfig(sparsity=0.5)))
    model.load_state_dict(toys.snapshot(reference), assign=True)
    model.tie_weights()
    toys.copy_unsaved_buffers(reference, model)
    for one in (model, reference):
        torch.manual_seed(0)
        toys.train_step(one, toys.inputs(family))
    assert not toys.differences(toys.snapshot(model), toys.snapshot(reference))


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_a_dense_state_dict_loads_with_only_factors_missing(family):
    dense = toys.FAMILIES[family]()
    torch.manual_seed(1)
    model = pst.replace_linear(toys.FAMILIES[family]())
    result = model.load_state_dict(dense.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert len(result.missing_keys) == 8 * toys.LINEARS[family]
    assert all(name.rsplit(".", 1)[-1].startswith("pst_") for name in result.missing_keys)
    for name, layer in pst_layers(model):
        assert torch.equal(layer.weight, dense.get_submodule(name).weight)


def test_hooks_go_on_being_called():
    model, calls = toys.plain(), []
    model[0].register_forward_hook(lambda module, arguments, output: calls.append(type(module)))
    pst.replace_linear(model)(torch.randn(2, 24))
    assert calls == [pst.PSTLinear]


def test_training_flag_and_copies_survive():
    model = pst.replace_linear(toys.plain().eval())
    assert not model[0].training
    toys.perturb(model)
    x = torch.randn(5, 24)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
