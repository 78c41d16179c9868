"""A loaded sparse model at work: generate with both caches, and torch.compile without a break."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from test_folder import of, zeroed

import pst_kernels as pst
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear
from pst_kernels.layers.sparse_linear import SparseLinear


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request, tmp_path_factory):
    """The dense model with zeros, and what its folder loads as."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = zeroed(request.param).eval()
    pst.save_sparse(dense, folder)
    return dense, pst.load_sparse(folder)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 3])
def test_generate_gives_the_dense_models_tokens(models, cache, rows):
    dense, sparse = models
    tokens = torch.randint(3, toys.VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    settings |= {"eos_token_id": None, "attention_mask": torch.ones_like(tokens)}
    expected, found = (model.generate(tokens, **settings) for model in (dense, sparse))
    assert found.shape == (rows, 13)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_compiled_without_a_break(tmp_path):
    dense = zeroed("llama").eval()
    pst.save_sparse(dense, tmp_path)
    sparse = pst.load_sparse(tmp_path)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for rows in (1, 4):
        tokens = torch.randint(3, toys.VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found, expected = compiled(tokens, use_cache=False).logits, dense(tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["sparse", "block:16"])
def test_one_token_through_a_compiled_layer(format, tmp_path):
    """The graph calls the same op, at one token too."""
    model = pst.merge_and_unload(toys.trained("gpt2", pattern="block:16", sparsity=0.5))
    pst.save_sparse(model, tmp_path, format=format)
    kind = SparseLinear if format == "sparse" else BlockSparseLinear
    layer = next(iter(of(kind, pst.load_sparse(tmp_path)).values()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (1, 1, 5):
        x = torch.randn(tokens, layer.in_features)
        with torch.no_grad():
            expected = torch.nn.functional.linear(x, layer.to_dense(), layer.bias)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_texts_of_many_lengths_and_strides():
    """Each number of tokens has a call of its own, of which a layer keeps a few."""
    torch.manual_seed(0)
    weight = torch.randn(70, 150) * (torch.rand(70, 150) < 0.2)
    bias = torch.nn.Parameter(torch.randn(70))
    layer = SparseLinear.from_dense(weight, bias)
    with torch.no_grad():
        for tokens in (3, 3, 40, 3, 1, 128, 129, 64, 65, 17, 3, 40, 1, 1):
            x = torch.randn(tokens, 150)
            torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
            wide = torch.randn(tokens, 300)[:, :150]  # rows of stride 1 that do not touch
            expected = torch.nn.functional.linear(wide, weight, bias)
            torch.testing.assert_close(layer(wide), expected, rtol=1e-5, atol=1e-5)
    assert 0 < len(layer.offsets._pst_ready) <= 4


@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_lists_loaded_anew(tokens, tmp_path):
    """What a layer keeps ready for few tokens goes when its lists change in place."""
    one, other = (SparseLinear.from_dense(torch.eye(40)[order], None) for order in (range(40), range(39, -1, -1)))
    x = torch.randn(tokens, 40)
    with torch.no_grad():
        assert torch.equal(one(x), x)
        assert torch.equal(one(x), x)
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), x.flip(1))
        one.weight.mul_(2)
        assert torch.equal(one(x), 2 * x.flip(1))
    with torch.inference_mode():
        assert torch.equal(one(x), 2 * x.flip(1))
    twin = copy.deepcopy(one)
    torch.save(one, tmp_path / "layer")
    loaded = torch.load(tmp_path / "layer", weights_only=False)
    one.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(twin(x), 2 * x.flip(1))
        assert torch.equal(loaded(x), 2 * x.flip(1))
        assert torch.equal(one(x.bfloat16()), 2 * x.bfloat16().flip(1))
