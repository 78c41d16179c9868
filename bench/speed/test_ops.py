"""pytest-benchmark over the ops, `make bench-ops`; compare two runs with `--benchmark-autosave --benchmark-compare`."""

import itertools
from typing import Any

import pytest
import torch

from bench.speed.cases import BY_NAME
from bench.speed.modes import base_linear, settled
from pst_kernels import PSTConfig, PSTLinear, functional, ops
from pst_kernels.operands import MaskedWeight, Scales

SHAPES = [BY_NAME[name] for name in ("BERT-base attention", "BERT-base up", "GPT-2 medium up")]
TOKENS = 1024


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape.columns}x{shape.out}")
def shape(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def layer(request, shape) -> Any:
    layer: Any = settled(PSTLinear.from_linear(base_linear(shape, request.param, "cpu"), PSTConfig(sparsity=0.9)))
    layer.refresh_mask()
    return layer.requires_grad_(False)


@pytest.fixture
def x(layer):
    return torch.randn(TOKENS, layer.in_features).to(layer.weight.dtype)


def operands(layer):
    return MaskedWeight(layer.weight, layer.factors, layer.pst_mask, Scales()).flat


def test_scores(benchmark, layer):
    benchmark(ops.scores, layer.weight, *layer.factors, *Scales())


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_kth_value(benchmark, shape, fraction):
    scores = torch.randn(shape.numel)
    k = int(fraction * scores.numel())
    value, _ = benchmark(ops.kth_value, scores, k)
    assert value == torch.kthvalue(scores, k).values


def test_prune_mask_cold(benchmark, layer):
    arguments = (layer.weight, *layer.factors, *Scales(), layer.pst_num_pruned)
    packed = benchmark(lambda: ops.prune_mask(*arguments, functional.new_guess(), "unstructured"))
    assert int((~functional.unpack_mask(packed, layer.in_features)).sum()) == int(layer.pst_num_pruned)


def test_prune_mask_warm(benchmark, layer):
    """The threshold of one step after the other; between two, every factor moves by a learning rate."""
    guess, signs = functional.new_guess(), itertools.cycle([1e-4, -1e-4])

    def moved():
        for factor in layer.factors:
            factor.add_(torch.randn_like(factor), alpha=next(signs))
        return (layer.weight, *layer.factors, *Scales(), layer.pst_num_pruned, guess, "unstructured"), {}

    benchmark.pedantic(ops.prune_mask, setup=moved, rounds=20, warmup_rounds=2)


def test_masked_weight(benchmark, layer):
    benchmark(ops.masked_weight, *operands(layer), layer.weight.dtype)


def test_linear_forward(benchmark, layer, x):
    benchmark(ops.linear_forward, x, *operands(layer), layer.bias)


def test_linear_backward(benchmark, layer, x):
    gy = torch.randn(TOKENS, layer.out_features).to(x.dtype)
    benchmark(ops.linear_backward, gy, x, *operands(layer), True, True, True)
