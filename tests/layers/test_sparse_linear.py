"""SparseLinear: what it stores, its products and gradients, and what it refuses."""

import re

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels import SparseLinear, notices, ops
from pst_kernels.model import pst_layers


def pruned(out=50, columns=300, sparsity=0.8, dtype=torch.float32, bias=True):
    linear = nn.Linear(columns, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(out, columns) >= sparsity)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_it_stores(dtype):
    linear = pruned(dtype=dtype)
    layer = SparseLinear.from_linear(linear.eval())
    assert torch.equal(layer.to_dense(), linear.weight)
    assert torch.equal(layer.to_csr().to_dense(), linear.weight)
    assert layer.bias is linear.bias
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.sparsity == float((linear.weight == 0).double().mean())
    assert layer.weight.dtype is dtype
    kept = torch.rand(linear.weight.shape) > 0.5
    some = SparseLinear.from_dense(linear.weight, None, kept)
    assert torch.equal(some.to_dense(), linear.weight * kept)
    assert len(some.weight) == kept.sum()
    assert some.bias is None


def test_a_conv1d():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(40, 130)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(130, 40) > 0.7)
    layer, x = SparseLinear.from_linear(conv), torch.randn(2, 3, 130)
    assert (layer.in_features, layer.out_features) == (130, 40)
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (0, 300), (5, 300), (3, 4, 300), (70, 300)])
def test_forward_and_gradients(shape, dtype, cpu_passes):
    linear = pruned(dtype=dtype)
    layer = SparseLinear.from_linear(linear, trainable=True)
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    x = torch.randn(*shape[:-1], 300, dtype=dtype)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    found, expected = layer(ours), linear(theirs)
    torch.testing.assert_close(found, expected)
    gy = torch.randn_like(expected)
    found.backward(gy)
    expected.backward(gy)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.weight.grad, linear.weight.grad[layer.lists.places()])
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)


def test_gradients_are_those_of_finite_differences():
    layer = SparseLinear.from_linear(pruned(7, 33, 0.6, torch.float64), trainable=True)
    x = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


def test_a_gradient_of_stride_zero_and_frozen_values():
    linear = pruned()
    layer, x = SparseLinear.from_linear(linear), torch.randn(6, 300, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(6, 300))
    assert layer.weight.grad is None


def test_it_trains_at_the_kept_weights():
    linear = pruned()
    layer, x, target = SparseLinear.from_linear(linear, trainable=True), torch.randn(64, 300), torch.randn(64, 50)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(layer.to_dense() != 0, linear.weight != 0)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_dense(), layer.bias))


def test_autocast():
    layer, x = SparseLinear.from_linear(pruned(), trainable=True), torch.randn(9, 300, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.weight.grad.dtype is x.grad.dtype is torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y)


def test_a_state_dict_brings_its_own_mask():
    first, second = (SparseLinear.from_linear(pruned(sparsity=sparsity)) for sparsity in (0.9, 0.5))
    for start in (SparseLinear(300, 50), second, SparseLinear(300, 50, trainable=True)):
        trains = start.weight.requires_grad
        start.load_state_dict(first.state_dict())
        assert start.weight.requires_grad == trains
        assert torch.equal(start.to_dense(), first.to_dense())
        assert torch.equal(start(torch.ones(2, 300)), first(torch.ones(2, 300)))


def test_bad_lists_are_refused():
    layer = SparseLinear.from_linear(pruned())
    state = layer.state_dict()

    def refused(match, **changes):
        with pytest.raises(RuntimeError, match=match):
            SparseLinear(300, 50).load_state_dict(state | changes)

    pointers, offsets = state["pointers"], state["offsets"]
    refused(r"pointers \(3,\)", pointers=pointers[:3])
    refused("not uint8 and int32", pointers=pointers.long())
    refused("do not rise from 0", pointers=pointers.flip(0))
    refused("do not rise within each row", offsets=torch.zeros_like(offsets))
    beyond = offsets.clone()
    beyond[-1] = 44  # columns 256 to 299 are the last chunk
    refused("beyond in_features=300", offsets=beyond)
    beyond[-1] = 200
    refused("beyond a chunk of 128", offsets=beyond)


def test_opcheck():
    layer = SparseLinear.from_linear(pruned(12, 140))
    lists = (layer.weight.detach(), layer.offsets, layer.pointers)
    for dtype in (torch.float32, torch.bfloat16):
        x, gy = torch.randn(6, 140).to(dtype), torch.randn(6, 12).to(dtype)
        torch.library.opcheck(ops.sparse_forward, (x, *lists, layer.bias.detach(), 12))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(ops.sparse_backward, (gy, x, *lists, 140, *needs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_as_one_graph(backend):
    layer = SparseLinear.from_linear(pruned(), trainable=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        gradients = []
        for run in (compiled, layer):
            layer.zero_grad()
            x = torch.ones(5, 300, requires_grad=True)
            run(x).pow(2).sum().backward()
            gradients.append((x.grad, layer.weight.grad.clone()))
        torch.testing.assert_close(*gradients)
        with torch.no_grad():
            layer.weight.mul_(0.5)


@pytest.mark.parametrize("family", toys.FAMILIES)
@pytest.mark.parametrize("settings", [{"sparsity": 0.7}, {"pattern": "2:4", "sparsity": 0.5}])
def test_every_family_and_pattern_merges(family, settings):
    model, twin = toys.trained(family, **settings), toys.trained(family, **settings)
    expected = toys.logits(model, family)
    pruned = {name: layer.weights_pruned for name, layer in pst_layers(model)}
    merged, dense = pst.merge_and_unload(model, format="sparse"), pst.merge_and_unload(twin)
    assert not list(pst_layers(merged))
    for name, count in pruned.items():
        layer, plain = merged.get_submodule(name), dense.get_submodule(name)
        assert type(layer) is SparseLinear
        assert layer.weight.numel() == plain.weight.numel() - count
        assert torch.equal(layer.to_dense(), plain.weight.T if family == "gpt2" else plain.weight)
    torch.testing.assert_close(toys.logits(merged, family), expected, rtol=1e-5, atol=1e-6)


def test_elsewhere_it_is_dense_and_says_so(caplog):
    notices.say_once.cache_clear()
    linear = pruned(dtype=torch.float16)
    layer = SparseLinear.from_linear(linear)
    for _ in range(2):
        x = torch.randn(3, 300).half()
        torch.testing.assert_close(layer(x), linear(x))
    assert len(caplog.records) == 1
    assert "float16 on cpu as a dense layer" in caplog.text


def test_refusals():
    layer = SparseLinear.from_linear(pruned())
    with pytest.raises(ValueError, match=re.escape("x must be (..., 300), got shape (2, 299)")):
        layer(torch.ones(2, 299))
    with pytest.raises(TypeError, match=r"x is torch.float64 but weight is torch.float32; cast x"):
        layer(torch.ones(2, 300).double())
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear or a transformers Conv1D, got Conv1d"):
        SparseLinear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(TypeError, match=r"weight must be 2-d"):
        SparseLinear.from_dense(torch.ones(4, 4, dtype=torch.int8), None)
    with pytest.raises(ValueError, match=re.escape("kept must be bool of shape (4, 5)")):
        SparseLinear.from_dense(torch.ones(4, 5), None, torch.ones(4, 4, dtype=torch.bool))
    for name in ("in_features", "out_features"):
        for value in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match=rf"^{name} must be a whole number from 1"):
                SparseLinear(**{"in_features": 8, "out_features": 8} | {name: value})
