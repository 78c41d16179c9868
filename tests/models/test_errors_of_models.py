"""Models that cannot be converted: the error names the layer and says what to do, and nothing has changed."""

from __future__ import annotations

import math

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
MODELS = {
    "subclass": (
        lambda: with_layer(Quantised(8, 8)), {}, TypeError,
        (r"^1 is a .*Quantised", r"exclude_modules=\['1'\]"),
    ),
    "foreign layer": (
        lambda: with_layer(Foreign()), {"target_modules": ["0", "1"]}, TypeError,
        (r"^1 is a .*Foreign", "only nn.Linear"),
    ),
    "int8": (
        lambda: with_weight(INT8), {}, TypeError,
        ("^1 has a weight", "torch.int8", "quantised", "load the model in"),
    ),
    "float8": (
        lambda: with_weight(FLOAT8), {}, TypeError,
        ("^1 has a weight", "torch.float8_e4m3fn", "load the model"),
    ),
    "special parameter": (
        lambda: with_weight(Special(torch.ones(8, 8))), {}, TypeError,
        ("^1 has a weight of type Special",),
    ),
    "parametrised": (
        lambda: with_layer(parametrizations.weight_norm(nn.Linear(8, 8))), {}, TypeError,
        ("^1 is ", r"exclude_modules=\['1'\]"),
    ),
    "encoder layer": (
        encoder, {}, TypeError, (r"^layers\.0\.", "fast path reads the weight without calling", "exclude_modules="),
    ),
    "attention": (
        lambda: with_layer(nn.MultiheadAttention(8, 2)), {}, TypeError,
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


@pytest.mark.parametrize("exclude", [["1"], r"1(\..*)?"])
def test_what_the_message_says_helps(exclude):
    for layer in (Quantised(8, 8), nn.MultiheadAttention(8, 2)):
        model = with_layer(layer)
        excluded = ["1", "out_proj"] if isinstance(exclude, list) else exclude
        pst.replace_linear(model, pst.PSTConfig(exclude_modules=excluded))
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
