"""Training with lists of the kept weights on a CPU: the values of the dense way, in forward and in every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from oracle import relative_error
from torch import nn

import pst_kernels as pst
from pst_kernels import cpu, ops, reference
from pst_kernels.layers.pst_layer import FACTORS

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402


def layer_of(kind: str, shape: tuple[int, int], **settings) -> nn.Module:
    """Of shape (out, in)."""
    torch.manual_seed(0)
    config = pst.PSTConfig(**{"sparsity": 0.9, "products": "sparse"} | settings)
    out, columns = shape
    base = nn.Linear(columns, out) if kind == "linear" else Conv1D(out, columns)
    cls = pst.PSTLinear if kind == "linear" else pst.PSTConv1D
    return toys.perturb(cls.from_linear(base, config))


@pytest.fixture
def products(monkeypatch):
    """Counts the sparse products, forward and backward."""
    counted = {"forward": 0, "backward": 0}
    for name in counted:
        op = getattr(ops, f"sparse_{name}")

        def counting(*args, op=op, name=name):
            counted[name] += 1
            return op(*args)

        monkeypatch.setattr(ops, f"sparse_{name}", counting)
    return counted


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("tokens", [(0,), (1,), (7,), (2, 65)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_forward_and_gradients_are_those_of_the_reference(kind, tokens, sparsity, products):
    layer = layer_of(kind, (70, 300), sparsity=sparsity)
    x = torch.randn(*tokens, 300, requires_grad=True)
    y = layer(x)
    gy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, *layer.factors), gy)
    exact = [t.detach().double().requires_grad_() for t in (x, *layer.factors)]
    config = layer.config
    expected = reference.pst_linear(
        exact[0], layer.oriented_weight.double(), layer.bias.double(), *exact[1:], layer.mask,
        beta=config.beta, alpha1=config.alpha1, alpha2=config.alpha2,
    )  # fmt: skip
    assert relative_error(y, expected) < 1e-6
    for value, right in zip(found, torch.autograd.grad(expected, exact, gy.double()), strict=True):
        assert value.shape == right.shape
        assert relative_error(value, right) < 2e-6
    assert products == {"forward": 1, "backward": 1}


def test_a_run_is_that_of_the_dense_way():
    """Masks to the bit, over a schedule that crosses from dense products to sparse ones."""
    runs = {}
    for way in ("auto", "dense"):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(300, 400), nn.GELU(), nn.Linear(400, 300), nn.GELU(), nn.Linear(300, 4))
        model = pst.replace_linear(base, pst.PSTConfig(sparsity=0.9, products=way))
        schedule = pst.SparsitySchedule(model, 8)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for step in range(8):
            x = torch.randn(20, 300, generator=torch.Generator().manual_seed(step))
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        runs[way] = torch.stack(losses), [layer.mask for layer in model if isinstance(layer, pst.PSTLinear)]
    torch.testing.assert_close(runs["auto"][0], runs["dense"][0], rtol=1e-5, atol=1e-6)
    differ = [int((a != b).sum()) for a, b in zip(runs["auto"][1], runs["dense"][1], strict=True)]
    assert max(differ) <= 4  # where scores lie within rounding of the threshold


def test_auto_takes_lists_from_three_tenths_on(products):
    layer = layer_of("linear", (260, 300), products="auto", sparsity=0.29)
    x = torch.randn(4, 300)
    layer(x)
    assert products["forward"] == 0
    layer.sparsity = 0.3
    layer(x)
    layer.eval()
    layer(x)
    assert products["forward"] == 2
    odd = layer_of("linear", (259, 303), products="auto", sparsity=0.3)  # 30 % of which is no whole number
    odd(torch.randn(4, 303))
    assert products["forward"] == 3
    layer_of("linear", (26, 300), products="auto")(x)  # small: M * W' is kept
    assert products["forward"] == 3


@pytest.mark.parametrize(("capability", "least"), [("AVX512", 0.8), ("AVX2", 0.3)])
def test_auto_in_bf16_goes_by_the_processor(products, monkeypatch, capability, least):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layer = layer_of("linear", (260, 300), products="auto", sparsity=least - 0.1)
    x = torch.randn(4, 300)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        assert products["forward"] == 0
        layer.sparsity = least
        layer(x)
    assert products["forward"] == 1


def test_lists_follow_the_factors(products):
    layer, x = layer_of("linear", (70, 300)), torch.randn(4, 300)
    layer(x)
    before = layer._ready.made
    layer(x)
    assert layer._ready.made is before
    with torch.no_grad():
        layer.pst_U.mul_(1.5)
    y = layer(x)
    assert layer._ready.made is not before
    exact = reference.pst_linear(
        x.double(), layer.weight.double(), layer.bias.double(), *(f.double() for f in layer.factors), layer.mask
    )
    assert relative_error(y, exact) < 1e-6


def test_lists_of_a_mask_that_is_not_due_hold_the_new_weights():
    layer, x = layer_of("linear", (70, 300), mask_interval=5), torch.randn(4, 300)
    layer(x)
    mask = layer.pst_mask.clone()
    with torch.no_grad():
        layer.pst_V.add_(0.1)
    y = layer(x)
    assert torch.equal(layer.pst_mask, mask)
    kept = reference.updated_weight(layer.weight.double(), layer.pst_U.double(), layer.pst_V.double())
    kept = kept * pst.functional.unpack_mask(mask, 300)
    assert relative_error(y, nn.functional.linear(x.double(), kept, layer.bias.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bf16(dtype):
    layer = layer_of("linear", (70, 300)).to(dtype)
    dense = copy.deepcopy(layer)
    dense.config = pst.PSTConfig(sparsity=0.9, products="dense")
    x = torch.randn(9, 300, dtype=dtype)
    for value, expected in zip(step(layer, x), step(dense, x), strict=True):
        assert value.dtype == expected.dtype
        assert relative_error(value, expected) < 1e-2


def step(layer, x):
    y = layer(x)
    y.float().pow(2).mean().backward()
    return [y.detach(), *(getattr(layer, name).grad for name in FACTORS)]


def test_an_explicit_request_never_falls_back(monkeypatch):
    layer, x = layer_of("linear", (70, 300)).double(), torch.randn(4, 300, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"products='sparse' needs .* but the weight is torch\.float64"):
        layer(x)
    monkeypatch.setenv("PST_KERNELS_CPU", "torch")
    assert not cpu.lists.serve(torch.ones(4, 4), torch.float32)
    with pytest.raises(RuntimeError, match="and Numba"):
        layer_of("linear", (70, 300))(x.float())
    with pytest.raises(ValueError, match="products='sparse' is for pattern='unstructured'"):
        pst.PSTConfig(products="sparse", pattern="block:16")
    with pytest.raises(ValueError, match="exclude one another"):
        pst.PSTConfig(products="sparse", masked_weight="keep")
    with pytest.raises(ValueError, match="products='csr' is not known"):
        pst.PSTConfig(products="csr")


def test_nothing_of_the_weights_size_is_kept_for_backward():
    """At 90 % the lists take half a byte a weight."""
    layer, kept = layer_of("linear", (300, 400), recompute_input=False), {}
    x = torch.randn(3, 400)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    there = {t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.pst_mask, *layer.factors)}
    extra = sum(size for address, size in kept.items() if address not in there)
    count = 12_000
    assert extra <= 5 * count + 8 * (2 * 300 + 1) + 64
