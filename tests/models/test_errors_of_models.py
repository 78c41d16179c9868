"""Models that cannot be converted: the error names the layer and says what to do, and nothing has changed."""

from __future__ import annotations

import math
import re

import pytest
import torch
import toys
from torch import nn
from torch.nn.utils import parametrizations

import pst_kernels as pst
from pst_kernels.layers.pst_layer import PSTLayer


class Quantised(nn.Linear):
    """Stands for a quantisation library's layer, a subclass of nn.Linear."""


class Foreign(nn.Module):
    """Stands for a library's layer that is no nn.Linear, such as an AWQ or GPTQ one."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


class Special(nn.Parameter):
    """Stands for a parameter of a quantisation library."""


def with_layer(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 2))


def with_weight(weight) -> nn.Module:
    model = with_layer(nn.Linear(8, 8))
    model[1].weight = weight
    return model


def with_value(value: float) -> nn.Module:
    model = toys.bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = value
    return model


def dispatched() -> nn.Module:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = with_layer(nn.Linear(8, 8))
    add_hook_to_module(model[1], AlignDevicesHook(execution_device="cpu"))
    return model


def quantised_head() -> nn.Module:
    model = toys.plain()
    model[4].weight = nn.Parameter(torch.zeros(3, 33, dtype=torch.int8), requires_grad=False)
    return model


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)


INT8 = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
FLOAT8 = nn.Parameter(torch.zeros(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
NAMED = {"target_modules": ["0", "1"]}  # what "all-linear" leaves dense is refused if it is asked for
MODELS = {
    "subclass": (
        lambda: with_layer(Quantised(8, 8)), NAMED, TypeError,
        (r"^1 is a .*Quantised", r"exclude_modules=\['1'\]"),
    ),
    "foreign layer": (
        lambda: with_layer(Foreign()), NAMED, TypeError,
        (r"^1 is a .*Foreign", "only nn.Linear"),
    ),
    "int8": (
        lambda: with_weight(INT8), NAMED, TypeError,
        ("^1 has a weight", "torch.int8", "quantised", "load the model in"),
    ),
    "float8": (
        lambda: with_weight(FLOAT8), NAMED, TypeError,
        ("^1 has a weight", "torch.float8_e4m3fn", "load the model"),
    ),
    "special parameter": (
        lambda: with_weight(Special(torch.ones(8, 8))), NAMED, TypeError,
        ("^1 has a weight of type Special",),
    ),
    "parametrised": (
        lambda: with_layer(parametrizations.weight_norm(nn.Linear(8, 8))), NAMED, TypeError,
        ("^1 is ", r"exclude_modules=\['1'\]"),
    ),
    "encoder layer": (
        encoder, {"target_modules": ["linear1"]}, TypeError,
        (r"^layers\.0\.", "fast path reads the weight without calling", "exclude_modules="),
    ),
    "attention": (
        lambda: with_layer(nn.MultiheadAttention(8, 2)), {"target_modules": ["out_proj"]}, TypeError,
        (r"^1\.out_proj sits in a MultiheadAttention", r"exclude_modules=\['1.out"),
    ),
    "accelerate hook": (
        dispatched, {}, RuntimeError,
        ("^1 is managed by an accelerate hook", "convert the model before"),
    ),
    **{
        str(value): (
            lambda value=value: with_value(value), {}, ValueError,
            (r"^the weight of bert\.encoder\.layer\.1\.output\.dense has 1 NaN or infinite values of 1536", "damaged"),
        )
        for value in (math.nan, math.inf, -math.inf)
    },
    "quantised head": (
        quantised_head,
        {},
        TypeError,
        ("^4.weight is to be trained, but is torch.int8", r"modules_to_save=\["),
    ),
    "near miss": (
        toys.bert, {"target_modules": ["querry"]}, ValueError,
        (r"target_modules=\['querry'\] matches no linear layer", "did you mean 'query'"),
    ),
    "near miss beside a match": (
        toys.bert, {"target_modules": ["query", "vlaue"]}, ValueError,
        ("target_modules names 'vlaue', which matches no linear layer", "did you mean 'value'"),
    ),
    "near miss of what to exclude": (
        toys.bert, {"exclude_modules": ["key", "qurey"]}, ValueError,
        ("exclude_modules names 'qurey', which matches nothing", "did you mean .*'query'"),
    ),
    "a regex that excludes nothing": (
        toys.bert, {"exclude_modules": "qurey"}, ValueError,
        ("exclude_modules names 'qurey', which matches nothing", "did you mean .*'query'"),
    ),
    "a container to exclude": (
        toys.bert, {"exclude_modules": ["attention"]}, ValueError,
        ("exclude_modules names 'attention', which holds linear layers but is none", "give a regular expression"),
    ),
    "nothing that can be converted": (
        encoder, {}, ValueError,
        ("target_modules='all-linear' finds no layer that PST can convert", r"layers\.0\.linear1, ", "fast path"),
    ),
    "near miss of a regex": (
        toys.bert, {"target_modules": "query"}, ValueError,
        ("did you mean .*'query'", "a string must match a whole name"),
    ),
    "no near miss": (
        toys.bert, {"target_modules": ["zzz"]}, ValueError,
        ("matches no linear layer", "its linear layers end in classifier, dense"),
    ),
    "callable": (toys.bert, {"target_modules": lambda m, n: False}, ValueError, ("matches no linear layer", "end in")),
    "all excluded": (
        toys.bert, {"exclude_modules": ".*"}, ValueError, ("matches no linear layer outside exclude_modules='.*'",),
    ),
    "no linears": (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, ("matches no linear layer; the model has none",)),
    "module to save": (
        toys.bert, {"modules_to_save": ["clasifier"]}, ValueError,
        ("modules_to_save names 'clasifier'", "there are .*classifier"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "settings", "error", "says"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_converted_stays_as_it_was(build, settings, error, says):
    model = build()
    before = toys.snapshot(model)
    modules = {name: id(module) for name, module in model.named_modules()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error) as caught:
        pst.replace_linear(model, pst.PSTConfig(**settings))
    assert type(caught.value) is error
    for pattern in says:
        caught.match(pattern)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert not toys.differences(toys.snapshot(model), before)
    assert not any(isinstance(module, PSTLayer) for module in model.modules())


@pytest.mark.parametrize("exclude", ["suffixes", r"1(\..*)?"])
def test_what_the_message_says_helps(exclude):
    for layer, name in ((Quantised(8, 8), "1"), (nn.MultiheadAttention(8, 2), "out_proj")):
        model = with_layer(layer)
        excluded = [name] if exclude == "suffixes" else exclude
        pst.replace_linear(model, pst.PSTConfig(target_modules=".*[01].*", exclude_modules=excluded))
        assert isinstance(model[0], pst.PSTLinear)
        assert model[1] is layer


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("bert-base-uncased",), ("^model must be an nn.Module", "got str")),
        ((nn.Linear(2, 2), {"sparsity": 0.5}), ("^config must be a PSTConfig", "got dict", "PSTConfig\\(")),
        ((nn.Linear(2, 2), 0.9), ("^config must be a PSTConfig", "got float")),
    ],
)
def test_wrong_arguments_of_replace_linear(arguments, says):
    with pytest.raises(TypeError) as caught:
        pst.replace_linear(*arguments)
    for pattern in says:
        caught.match(pattern)


LEFT_DENSE = {
    "subclass": (lambda: with_layer(Quantised(8, 8)), "1 (each is a .*Quantised, which PST cannot convert"),
    "foreign layer": (lambda: with_layer(Foreign()), "1 (each is a .*Foreign, which PST cannot convert"),
    "int8": (lambda: with_weight(INT8), "1 (each has a weight .*torch.int8"),
    "parametrised": (lambda: with_layer(parametrizations.weight_norm(nn.Linear(8, 8))), "1 (each is parametrised"),
    "attention": (lambda: with_layer(nn.MultiheadAttention(8, 2)), "1.out_proj (each sits in a MultiheadAttention"),
}


@pytest.mark.parametrize(("build", "says"), LEFT_DENSE.values(), ids=LEFT_DENSE)
def test_what_cannot_be_converted_among_others_stays_dense_and_is_said(build, says, caplog):
    model = build()
    layer = model[1]
    pst.replace_linear(model)
    assert isinstance(model[0], pst.PSTLinear)
    assert model[1] is layer
    (record,) = caplog.records
    assert record.name == "pst_kernels"
    assert re.search("^left dense, because PST cannot convert them: " + says.replace("(", r"\("), record.message)


def test_partly_quantised_blocks_are_said(caplog):
    model = toys.bert()
    for layer in model.bert.encoder.layer:
        layer.attention.self = torch.ao.quantization.quantize_dynamic(layer.attention.self, {nn.Linear})
    pst.replace_linear(model)
    assert len(pst.get_layer_status(model)) == 6
    assert "bert.encoder.layer.0.attention.self.query" in caplog.text
    assert "quantized.dynamic" in caplog.text
