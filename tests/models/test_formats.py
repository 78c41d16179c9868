"""merge_and_unload(format=...): blocks in BlockSparseLinear, 2:4 in torch's semi-structured tensors."""

import re

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels.export import formats
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear
from pst_kernels.model import pst_layers

BLOCKS = {"pattern": "block:16", "sparsity": 0.5}


def of(kind, model):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_every_family_runs_on_blocks_alone(family):
    model, twin = toys.trained(family, **BLOCKS), toys.trained(family, **BLOCKS)
    expected, names = toys.logits(model, family), [name for name, _ in pst_layers(model)]
    grids = {name: layer.mask[::16, ::16] for name, layer in pst_layers(model)}
    dense = pst.merge_and_unload(twin)
    merged = pst.merge_and_unload(model, format="bsr")
    assert merged is model
    layers = of(BlockSparseLinear, merged)
    assert list(layers) == names
    assert not of((pst.PSTLinear, pst.PSTConv1D), merged)
    for name, layer in layers.items():
        plain = dense.get_submodule(name)
        weight = plain.weight.T if family == "gpt2" else plain.weight
        assert torch.equal(layer.to_dense(), weight)
        assert len(layer.weight) == int(grids[name].sum())
        assert layer.block_size == 16
        assert (layer.bias is None) == (plain.bias is None)
    torch.testing.assert_close(toys.logits(merged, family), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(toys.logits(merged, family), toys.logits(dense, family), rtol=1e-5, atol=1e-6)


def test_ragged_blocks_and_bf16():
    torch.manual_seed(0)
    model = pst.replace_linear(toys.plain(50, 70, 33, 3).bfloat16(), pst.PSTConfig(pattern="block:32", sparsity=0.6))
    toys.perturb(model)
    expected = {name: layer.masked_weight() for name, layer in pst_layers(model)}
    merged = pst.merge_and_unload(model, format="bsr")
    for name, weight in expected.items():
        layer = merged.get_submodule(name)
        assert layer.weight.dtype is torch.bfloat16
        assert torch.equal(layer.to_dense(), weight)
    assert len(of(BlockSparseLinear, merged)) == 2


def test_merged_layers_and_a_root():
    model, other = toys.trained(**BLOCKS), toys.trained(**BLOCKS)
    for _, layer in pst_layers(model):
        layer.merge()
    one, two = (pst.merge_and_unload(m, format="bsr") for m in (model, other))
    assert not toys.differences(toys.snapshot(one), toys.snapshot(two))
    root = toys.perturb(pst.replace_linear(nn.Linear(64, 48), pst.PSTConfig(**BLOCKS)))
    x = torch.randn(3, 64)
    expected = root(x)
    plain = pst.merge_and_unload(root, format="bsr")
    assert type(plain) is BlockSparseLinear
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(32, 2))
    toys.perturb(pst.replace_linear(model, pst.PSTConfig(target_modules=["0", "2"], **BLOCKS)))
    merged = pst.merge_and_unload(model, format="bsr")
    assert merged[0] is merged[2]
    assert type(merged[0]) is BlockSparseLinear


def test_blocks_load_into_a_model_of_other_blocks(tmp_path):
    from safetensors.torch import load_file, save_file

    merged = pst.merge_and_unload(toys.trained(**BLOCKS), format="bsr")
    save_file(toys.snapshot(merged), tmp_path / "file")
    other = pst.replace_linear(toys.bert().eval(), pst.PSTConfig(pattern="block:16", sparsity=0.2))
    other = pst.merge_and_unload(other, format="bsr")
    other.load_state_dict(load_file(tmp_path / "file"))
    assert not toys.differences(toys.snapshot(other), toys.snapshot(merged))
    assert torch.equal(toys.logits(other), toys.logits(merged))


def test_gradients_pass_through_frozen_blocks():
    model = pst.merge_and_unload(toys.trained(**BLOCKS), format="bsr")
    twin = pst.merge_and_unload(toys.trained(**BLOCKS))
    gradients = []
    for one in (model, twin):
        embeddings = one.bert.embeddings.word_embeddings.weight.requires_grad_(True)
        one(**toys.inputs("bert")).loss.backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert gradients[0].any()


# Refusals leave the model as it was


def refused(model, match, error=ValueError, **arguments):
    before = toys.snapshot(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=match):
        pst.merge_and_unload(model, **arguments)
    assert not toys.differences(toys.snapshot(model), before)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not any(layer.merged for _, layer in pst_layers(model))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_only_blocks_become_blocks(pattern):
    refused(
        toys.trained(pattern=pattern),
        rf"format='bsr' stores blocks, but bert\S+ was pruned with pattern='{pattern}'; use format='dense'",
        format="bsr",
    )


@pytest.mark.parametrize("pattern", ["unstructured", "block:16", "1:4"])
def test_only_two_of_four_become_semi_structured(pattern):
    refused(
        toys.trained(pattern=pattern),
        rf"'semi_structured' needs 2 of every 4 weights, but bert\S+ was pruned with pattern='{pattern}'",
        format="semi_structured",
    )


def test_semi_structured_needs_cuda():
    refused(
        toys.trained(pattern="2:4").bfloat16(),
        r"'semi_structured' needs CUDA, but the weight of bert\S+ is on cpu; call model.cuda\(\) first, or use",
        format="semi_structured",
    )


def test_semi_structured_needs_a_dtype_and_a_shape_that_torch_has():
    cuda, check = torch.device("cuda"), formats.refuse_semi_structured
    for dtype in (torch.float16, torch.bfloat16):
        check("up", (64, 128), dtype, cuda)
    with pytest.raises(
        ValueError, match=r"needs float16 or bfloat16, but the weight of up is torch.float32; .*bfloat16"
    ):
        check("up", (64, 128), torch.float32, cuda)
    for shape in ((48, 128), (64, 96)):
        with pytest.raises(
            ValueError, match=rf"multiples of 32 outputs and 64 inputs, but .* is {shape[0]} x {shape[1]}"
        ):
            check("up", shape, torch.float16, cuda)


def test_semi_structured_needs_the_end_of_the_schedule(monkeypatch):
    """A mask that still keeps 3 of 4 would lose weights without a word."""
    monkeypatch.setattr(formats, "refuse_semi_structured", lambda *_: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    model = toys.trained(pattern="2:4")
    for _, layer in pst_layers(model):
        layer.sparsity = 0.25
    refused(model, r"but bert\S+ is 25.0% pruned: its schedule has not ended", format="semi_structured")


def test_an_unknown_format_is_refused():
    for value in ("csr", "BSR", None):
        refused(
            toys.trained(**BLOCKS),
            rf"format={re.escape(repr(value))} is not known; use one of 'dense', 'sparse', 'bsr', 'semi_structured'",
            format=value,
        )


def test_shared_weights_and_values_that_are_not_finite_are_refused_in_every_format():
    model = toys.plain(16, 16, 16, 2)
    model[2].weight = model[0].weight
    pst.replace_linear(model, pst.PSTConfig(target_modules=["0"], **BLOCKS))
    refused(model, "weight of 0 is shared with another module", RuntimeError, format="bsr")
    model = toys.trained(**BLOCKS)
    for _, layer in pst_layers(model):
        layer.sparsity = 0.0
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
    refused(model, "1 NaN or infinite values", format="bsr", safe_merge=True)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    made = []

    def twice(layer):
        made.append(layer)
        if len(made) == 3:
            raise MemoryError("no room")
        return BlockSparseLinear(1, 1, 1)

    monkeypatch.setattr(formats, "_blocks", twice)
    refused(toys.trained(**BLOCKS), "no room", MemoryError, format="bsr")
    assert len(made) == 3


# torch's semi-structured tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_survive_torchs_packing(dtype):
    """What to_sparse_semi_structured stores, by the part of torch that runs on a CPU: nothing of the weight is lost."""
    from torch.sparse import _semi_structured_conversions as torchs

    layer = toys.perturb(pst.PSTLinear(128, 64, dtype=dtype, config=pst.PSTConfig(pattern="2:4")))
    weight = layer.masked_weight()
    packed = torchs.sparse_semi_structured_from_dense_cutlass(weight)
    assert packed[0].shape == (64, 64)
    assert torch.equal(torchs.sparse_semi_structured_to_dense_cutlass(*packed), weight)


def test_every_two_of_four_layer_gets_torchs_tensor(monkeypatch):
    """The conversion around torch's own, which needs CUDA: which weight it is given, and where the result goes."""
    monkeypatch.setattr(formats, "refuse_semi_structured", lambda *_: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight + 0)
    for family in ("bert", "gpt2"):
        model, twin = toys.trained(family, pattern="2:4"), toys.trained(family, pattern="2:4")
        names, expected = [name for name, _ in pst_layers(model)], toys.logits(model, family)
        dense = pst.merge_and_unload(twin)
        merged = pst.merge_and_unload(model, format="semi_structured")
        for name in names:
            layer, plain = merged.get_submodule(name), dense.get_submodule(name)
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, plain.weight.T if family == "gpt2" else plain.weight)
            assert not layer.weight.requires_grad
        torch.testing.assert_close(toys.logits(merged, family), expected, rtol=1e-5, atol=1e-6)
