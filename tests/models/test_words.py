"""Word embeddings that learn, by factors or in full: values, gradients, which embedding, saving and merging."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels.config import FULL, WEIGHED_ABOVE, WORDS_RANK
from pst_kernels.layers.embedding import ENTRIES, PSTEmbedding, attach
from pst_kernels.model import get_config

WORDS = {
    "bert": "bert.embeddings.word_embeddings", "roberta": "roberta.embeddings.word_embeddings",
    "llama": "model.embed_tokens",
}  # fmt: skip
CONFIG = pst.PSTConfig(sparsity=0.8, embedding_rank=3)


def converted(family: str = "bert", config: pst.PSTConfig = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    return pst.replace_linear(toys.FAMILIES[family](), config)


def learned(family: str = "bert", config: pst.PSTConfig = CONFIG) -> nn.Module:
    """Converted, with factors as after some training."""
    model = converted(family, config)
    for module in model.modules():
        if isinstance(module, PSTEmbedding):
            nn.init.normal_(module.pst_embedding_U, std=0.1)
    return model.eval()


def words_of(model: nn.Module, family: str = "bert") -> PSTEmbedding:
    found = model.get_submodule(WORDS[family])
    assert isinstance(found, PSTEmbedding)
    return found


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3 * toys.LENGTH).view(3, -1) % toys.VOCABULARY
    return model(input_ids=ids).logits


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(padding, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    module = nn.Embedding(11, 6, padding_idx=padding, dtype=dtype)
    attach(module, 3, torch.float32 if dtype == torch.bfloat16 else dtype)
    module.weight.requires_grad_(False)
    nn.init.normal_(module.pst_embedding_U, generator=generator)
    ids = torch.randint(11, shape, generator=generator)
    if ids.numel() > 1:
        ids.view(-1)[:2] = 4  # twice the same, and padding where there is one
    y = module(ids)
    gy = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(gy)
    E, U, V = (tensor.detach().double() for tensor in (module.weight, module.pst_embedding_U, module.pst_embedding_V))
    one_hot = torch.nn.functional.one_hot(ids.view(-1), 11).double()
    g = gy.double().view(-1, 6)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(y.double(), (one_hot @ (E + U @ V)).view(*shape, 6), **close)
    expected = one_hot.T @ g @ V.T
    if padding is not None:
        expected[padding] = 0.0  # as in nn.Embedding
    torch.testing.assert_close(module.pst_embedding_U.grad.double(), expected, **close)
    torch.testing.assert_close(module.pst_embedding_V.grad.double(), (one_hot @ U).T @ g, **close)


@pytest.mark.parametrize("family", WORDS)
def test_it_is_the_same_module_with_the_same_weight_and_at_first_the_same_values(family):
    torch.manual_seed(0)
    model = toys.FAMILIES[family]().eval()
    module = model.get_submodule(WORDS[family])
    weight, seen = module.weight, []
    module.register_forward_hook(lambda *_: seen.append(1))
    before = module(torch.arange(9))
    pst.replace_linear(model, CONFIG)
    assert words_of(model, family) is module
    assert module.weight is weight
    assert not weight.requires_grad
    assert all(getattr(module, name).requires_grad for name in ENTRIES)
    assert torch.equal(module(torch.arange(9)), before)
    assert len(seen) == 2
    assert module.pst_embedding_U.shape == (toys.VOCABULARY, 3)
    assert module.pst_embedding_V.shape == (3, toys.WIDTH)
    assert sum(isinstance(m, PSTEmbedding) for m in model.modules()) == 1


def test_a_preset_has_it_above_half(caplog):
    for name, below in (("accurate", FULL), ("fast", 0)):
        assert pst.PSTConfig.preset(name, sparsity=WEIGHED_ABOVE).embedding_rank == below
        assert pst.PSTConfig.preset(name, sparsity=WEIGHED_ABOVE, embedding_rank=2).embedding_rank == 2
        for more in ({}, {"pattern": "2:4", "sparsity": 0.5}, {"pattern": "block:16", "train_kept": False}):
            config = pst.PSTConfig.preset(name, **more)
            assert config.embedding_rank == (WORDS_RANK if config.sparsity > WEIGHED_ABOVE else below)
    for name in ("paper", "released", "recipe"):
        assert pst.PSTConfig.preset(name).embedding_rank == 0
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        model = converted(config=pst.PSTConfig.preset("fast", dropout=None))
    assert words_of(model).pst_embedding_U.shape == (toys.VOCABULARY, WORDS_RANK)
    assert get_config(model).embedding_rank == WORDS_RANK
    assert not caplog.records


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_tied_words_stay_frozen_under_a_preset_and_are_refused_if_asked_for(caplog, sparsity):
    reason = "the weight of transformer.wte is shared with another module"
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        model = converted("gpt2", pst.PSTConfig.preset("accurate", sparsity=sparsity, dropout=None))
    assert [record.message for record in caplog.records] == [f"word embeddings stay frozen, preset or not: {reason}"]
    assert get_config(model).embedding_rank == 0
    assert not any(isinstance(module, PSTEmbedding) for module in model.modules())
    assert not model.get_submodule("transformer.wte").weight.requires_grad
    model = toys.FAMILIES["gpt2"]()
    for rank in (3, FULL):
        with pytest.raises(ValueError, match=f"embedding_rank={rank!r} cannot be had: {reason}"):
            pst.replace_linear(model, pst.PSTConfig(embedding_rank=rank))
    assert not any(name.rpartition(".")[2].startswith("pst_") for name, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


class Scaled(nn.Embedding):
    def forward(self, input):
        return 2.0 * super().forward(input)


def patched() -> nn.Embedding:
    module = nn.Embedding(50, 24)
    module.forward = lambda input: nn.Embedding.forward(module, input)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Scaled(50, 24), "0 is a Scaled, and no plain nn.Embedding"),
        (lambda: nn.Embedding(50, 24, max_norm=1.0), "0 has max_norm=1.0, sparse=False"),
        (lambda: nn.Embedding(50, 24, sparse=True), "0 has max_norm=None, sparse=True"),
        (patched, "0 has a forward of its own, set on the instance"),
        (nn.Identity, "the model has no nn.Embedding for words"),
    ],
)
def test_what_cannot_have_it_is_named(make, reason):
    model = nn.Sequential(make(), toys.plain())
    with pytest.raises(ValueError, match=reason):
        pst.replace_linear(model, CONFIG)
    assert type(pst.replace_linear(model, pst.PSTConfig.preset("fast"))[0]) is type(make())


def test_of_a_model_of_ones_own_it_is_the_largest(caplog):
    model = nn.Sequential(nn.Embedding(7, 24), nn.Embedding(50, 24), toys.plain())
    pst.replace_linear(model, CONFIG)
    assert [isinstance(module, PSTEmbedding) for module in model[:2]] == [False, True]


def test_what_is_trained_in_full_stays_so(caplog):
    saved = ("classifier", "word_embeddings")
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        model = converted(config=pst.PSTConfig.preset("accurate", modules_to_save=saved, dropout=None))
    module = model.get_submodule(WORDS["bert"])
    assert type(module) is nn.Embedding
    assert module.weight.requires_grad
    assert not caplog.records
    with pytest.raises(ValueError, match="is trained in full, by modules_to_save"):
        converted(config=pst.PSTConfig(embedding_rank=3, modules_to_save=saved))


def test_converting_twice_changes_nothing(caplog):
    model = learned()
    before, factor = outputs(model), words_of(model).pst_embedding_U
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        pst.replace_linear(model, CONFIG)
    assert words_of(model).pst_embedding_U is factor
    assert torch.equal(outputs(model), before)
    assert not caplog.records


@pytest.mark.parametrize("family", WORDS)
@pytest.mark.parametrize("format", ["dense", "sparse"])
def test_merged_it_is_a_plain_embedding_of_the_same_values(family, format):
    model = learned(family)
    module, before = words_of(model, family), outputs(model)
    assert module.padding_idx == {"bert": 0, "roberta": 1, "llama": None}[family]
    expected = module(torch.arange(toys.VOCABULARY))
    pst.merge_and_unload(model, format=format)
    assert type(module) is nn.Embedding
    assert list(module.state_dict()) == ["weight"]
    torch.testing.assert_close(module.weight, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)


def test_a_merge_that_fails_leaves_it():
    model = learned()
    with torch.no_grad():
        words_of(model).pst_embedding_V[1, 2] = torch.nan
    with pytest.raises(ValueError, match=f"the merged weight of {WORDS['bert']} has .* NaN"):
        pst.merge_and_unload(model, safe_merge=True)
    assert words_of(model).weight.isfinite().all()
    model = learned()
    model.tied = nn.Embedding(1, 1)
    model.tied.weight = words_of(model).weight
    with pytest.raises(RuntimeError, match=f"the weight of {WORDS['bert']} is shared with another module"):
        pst.merge_and_unload(model)
    words_of(model)


def test_an_adapter_holds_it(tmp_path):
    model = learned()
    before = outputs(model)
    pst.save_pretrained(model, tmp_path)
    torch.manual_seed(0)
    loaded = pst.load_pretrained(toys.FAMILIES["bert"](), tmp_path).eval()
    assert torch.equal(outputs(loaded), before)
    assert torch.equal(outputs(pst.load_pretrained(converted(), tmp_path).eval()), before)
    torch.manual_seed(0)
    dense = toys.FAMILIES["bert"](vocab_size=toys.VOCABULARY + 1)
    with pytest.raises(ValueError, match=r"word_embeddings.pst_embedding_U has shape \(50, 3\), the model needs"):
        pst.load_pretrained(dense, tmp_path)
    assert not any(isinstance(module, PSTEmbedding) for module in dense.modules())
    pst.save_pretrained(converted(config=pst.PSTConfig(sparsity=0.8)), tmp_path)
    with pytest.raises(ValueError, match=r"missing bert.embeddings.word_embeddings.pst_embedding_U"):
        pst.load_pretrained(converted(), tmp_path)
    pst.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"unexpected bert.embeddings.word_embeddings.pst_embedding_U"):
        pst.load_pretrained(converted(config=pst.PSTConfig(sparsity=0.8)), tmp_path)


def test_a_saved_model_is_read_with_it_by_stock_transformers_and_resumed_without(tmp_path):
    from transformers import BertForSequenceClassification

    model = learned()
    model.save_pretrained(tmp_path)
    stock = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(stock), outputs(model), rtol=1e-4, atol=1e-5)
    from safetensors.torch import load_file

    resumed = converted()
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(words_of(resumed).weight, words_of(model).weight)
    assert torch.equal(outputs(resumed.eval()), outputs(model))


def test_a_compiled_graph_holds_it():
    module, ids = words_of(learned()), torch.arange(6).view(2, 3)
    graph = torch.compile(module, backend="aot_eager", fullgraph=True)
    graph(ids).sum().backward()
    found = [getattr(module, name).grad.clone() for name in ENTRIES]
    module.zero_grad()
    y = module(ids)
    y.sum().backward()
    assert torch.equal(graph(ids), y)
    assert all(torch.equal(getattr(module, name).grad, grad) for name, grad in zip(ENTRIES, found, strict=True))


def test_under_autocast_it_keeps_the_dtype_of_the_embeddings():
    module = words_of(learned())
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.arange(5))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, module(torch.arange(5)), rtol=1e-2, atol=1e-2)


def test_a_copy_learns_by_itself():
    model = learned()
    for other in (copy.deepcopy(words_of(model)), pickle.loads(pickle.dumps(words_of(model)))):
        assert isinstance(other, PSTEmbedding)
        nn.init.zeros_(other.pst_embedding_U)
        assert words_of(model).pst_embedding_U.any()


def test_it_trains_at_a_rate_of_its_own():
    model = converted(config=pst.PSTConfig.preset("accurate", dropout=None))
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    groups = {group["name"]: group for group in pst.parameter_groups(model, 1e-4)}
    assert {names[id(p)] for p in groups["words"]["params"]} == set(ENTRIES)
    assert groups["words"]["lr"] == pytest.approx(2e-3)
    optimizer = torch.optim.AdamW(groups.values(), weight_decay=0.0)
    before = outputs(model)
    ids = torch.arange(2 * toys.LENGTH).view(2, -1)
    for _ in range(2):  # V learns once U has moved
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    moved = words_of(model).pst_embedding_U.detach()
    assert moved[1 : 2 * toys.LENGTH].abs().sum(1).min() > 0.0
    assert not moved[2 * toys.LENGTH :].any()
    assert not moved[0].any()  # padding
    assert not torch.equal(outputs(model), before)


def test_shards_are_refused():
    module = words_of(converted())
    module.pst_embedding_U.full_tensor = None
    with pytest.raises(RuntimeError, match="not for a model under tensor parallelism"):
        module(torch.tensor([1]))


def test_the_rank_is_a_whole_number():
    with pytest.raises(ValueError, match="embedding_rank must be at least 0, got -1"):
        pst.PSTConfig(embedding_rank=-1)
    with pytest.raises(TypeError, match="embedding_rank must be a whole number"):
        pst.PSTConfig(embedding_rank=2.0)
    with pytest.raises(ValueError, match="embedding_rank='fulll' is not known; give a rank, or 'full'"):
        pst.PSTConfig(embedding_rank="fulll")


IN_FULL = pst.PSTConfig.preset("accurate", sparsity=0.5, dropout=None)


@pytest.mark.parametrize("family", WORDS)
def test_in_full_it_is_a_plain_embedding_that_trains_at_a_rate_of_its_own(family, caplog):
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        model = pst.replace_linear(converted(family, IN_FULL), IN_FULL)  # twice: harmless
    assert not caplog.records
    module = model.get_submodule(WORDS[family])
    assert type(module) is nn.Embedding
    assert [name for name, m in model.named_modules() if type(m) is nn.Embedding and m.weight.requires_grad] == [
        WORDS[family]
    ]
    groups = {group["name"]: group for group in pst.parameter_groups(model, 1e-4)}
    assert [id(p) for p in groups["embeddings"]["params"]] == [id(module.weight)]
    assert groups["embeddings"]["lr"] == pytest.approx(5e-4)
    assert "words" not in groups
    assert sum(len(group["params"]) for group in groups.values()) == sum(p.requires_grad for p in model.parameters())
    assert get_config(model).embedding_rank == FULL


def test_in_full_it_is_saved_with_the_factors(tmp_path):
    model = converted(config=IN_FULL).eval()
    with torch.no_grad():
        model.get_submodule(WORDS["bert"]).weight.add_(0.3)
    before = outputs(model)
    pst.save_pretrained(model, tmp_path)
    torch.manual_seed(0)
    loaded = pst.load_pretrained(toys.FAMILIES["bert"](), tmp_path).eval()
    assert loaded.get_submodule(WORDS["bert"]).weight.requires_grad
    assert torch.equal(outputs(loaded), before)
    assert torch.equal(outputs(pst.load_pretrained(converted(config=IN_FULL), tmp_path).eval()), before)
    torch.testing.assert_close(outputs(pst.merge_and_unload(model)), before, rtol=1e-4, atol=1e-5)
    other = converted(config=pst.PSTConfig.preset("fast", sparsity=0.5, dropout=None))
    assert torch.equal(outputs(pst.load_pretrained(other, tmp_path).eval()), before)


def test_a_model_that_has_the_factors_keeps_them(caplog):
    model = learned()
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        pst.replace_linear(model, pst.PSTConfig(sparsity=0.8, embedding_rank=FULL))
    assert [record.message for record in caplog.records] == [
        "bert.encoder.layer.0.attention.self.query is under PST already and keeps its settings:"
        " embedding_rank=3, not 'full'"
    ]
    assert not words_of(model).weight.requires_grad
