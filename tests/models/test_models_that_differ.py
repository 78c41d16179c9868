"""Models that do not just call their linear layers: each is converted right, left dense with a word, or refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import toys
from torch import nn
from torch.nn import functional as F

import pst_kernels as pst

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40}


class Past(nn.Module):
    """Reads the weight of q past q."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        if x.dtype == self.k.weight.dtype:
            x = self.k(x)
        return self.head(F.linear(x, self.q.weight, self.q.bias))


class Hidden(Past):
    """The same through another name, which the source does not tell."""

    def forward(self, x):
        layer = self.q
        return self.head(F.linear(self.k(x), layer.weight, layer.bias))


class Guarded(nn.Module):
    """Reads the weight on a path that the settings turn off."""

    def __init__(self, exact: bool = False):
        super().__init__()
        self.exact = exact
        self.q, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = F.linear(x, self.q.weight) if self.exact else self.q(x)
        return self.head(x)


def named(model: nn.Module) -> set[str]:
    return {row.name.rpartition(".")[2] for row in pst.get_layer_status(model)}


def wavlm() -> nn.Module:
    from transformers import WavLMConfig, WavLMForCTC

    convolutions = {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return WavLMForCTC(WavLMConfig(**TINY | convolutions | positions))


def test_weights_read_past_their_layers_stay_dense_and_are_said(caplog):
    model = pst.replace_linear(wavlm())
    assert named(model) == {"gru_rel_pos_linear", "intermediate_dense", "output_dense"}
    assert "encoder.layers.0.attention.q_proj" in caplog.text
    assert "torch_multi_head_self_attention reads or changes without calling" in caplog.text
    model = pst.replace_linear(Past())
    assert named(model) == {"k"}
    with pytest.raises(
        TypeError, match=r"^q has a weight that Past.forward reads .*; leave it out with exclude_modules"
    ):
        pst.replace_linear(Past(), pst.PSTConfig(target_modules=["q", "k"]))


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_nothing_is_said_of_the_usual_families(family, caplog):
    pst.replace_linear(toys.FAMILIES[family]())
    assert caplog.text == ""


def test_a_path_that_the_settings_turn_off_does_not_count():
    assert named(pst.replace_linear(Guarded())) == {"q"}
    with pytest.raises(ValueError, match=r"finds no layer that PST can convert: q"):
        pst.replace_linear(Guarded(exact=True))
    # by name, for who knows that the path is never taken
    assert named(pst.replace_linear(Guarded(exact=True), pst.PSTConfig(target_modules=["q"]))) == {"q"}


def test_mamba_and_rwkv():
    from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, state_size=4, num_hidden_layers=2))
    assert named(pst.replace_linear(mamba)) == {"in_proj"}
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 16}
    rwkv = pst.replace_linear(RwkvForCausalLM(RwkvConfig(vocab_size=40, rescale_every=1, **sizes)))
    rows = [row.name for row in pst.get_layer_status(rwkv)]
    assert rows
    assert not any(name.endswith(("attention.output", "feed_forward.value")) for name in rows)


def test_a_bypassed_layer_is_refused_after_the_first_step():
    model = pst.replace_linear(Hidden())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(3, 8)).sum().backward()
    says = r"^q: never called, but Hidden.forward reads the weight, .* exclude_modules=\['q'\]"
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    with pytest.raises(RuntimeError, match=says):
        pst.merge_and_unload(model)
    again = pst.replace_linear(Hidden(), pst.PSTConfig(exclude_modules=["q"]))
    again(torch.randn(3, 8))
    pst.merge_and_unload(again)


def test_reading_a_weight_beside_calling_its_layer_is_no_bypass():
    model = pst.replace_linear(Hidden(), pst.PSTConfig(exclude_modules=["q"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert model.k.weight.norm() > 0
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    copy.deepcopy(model)(torch.randn(3, 8))
    x = torch.randn(3, 8)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, state, (x,)), model(x))


def test_a_subclass_that_computes_the_same_is_converted():
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    model = FalconForCausalLM(FalconConfig(**sizes)).eval()
    keys, ids = list(model.state_dict()), torch.arange(10)[None]
    toys.perturb(pst.replace_linear(model, pst.PSTConfig(sparsity=0.5)))
    assert named(model) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(pst.merge_and_unload(model)(input_ids=ids).logits, expected)
    assert list(model.state_dict()) == keys


def test_heads_in_a_list_train():
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48}
    model = pst.replace_linear(MusicgenForCausalLM(MusicgenDecoderConfig(**sizes)))
    assert {type(head) for head in model.lm_heads} == {nn.Linear}
    assert all(head.weight.requires_grad for head in model.lm_heads)
    assert "fc1" in named(model)


def test_a_model_whose_only_linear_is_its_head_is_refused():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 2))
    says = r"matches no linear layer but the head: 1, which trains in full; .*target_modules=\['1'\]"
    with pytest.raises(ValueError, match=says):
        pst.replace_linear(model)
    assert type(model[1]) is nn.Linear
    assert named(pst.replace_linear(model, pst.PSTConfig(target_modules=["1"]))) == {"1"}


HOOKS = {
    "forward": lambda layer, call: layer.register_forward_hook(lambda *a: call()),
    "forward with kwargs": lambda layer, call: layer.register_forward_hook(lambda m, a, k, o: call(), with_kwargs=True),
    "always": lambda layer, call: layer.register_forward_hook(lambda *a: call(), always_call=True),
    "pre": lambda layer, call: layer.register_forward_pre_hook(lambda *a: call()),
    "pre with kwargs": lambda layer, call: layer.register_forward_pre_hook(lambda m, a, k: call(), with_kwargs=True),
    "full backward": lambda layer, call: layer.register_full_backward_hook(lambda *a: call()),
    "full backward pre": lambda layer, call: layer.register_full_backward_pre_hook(lambda *a: call()),
    "state dict": lambda layer, call: layer.register_state_dict_post_hook(lambda *a: call()),
    "state dict pre": lambda layer, call: layer.register_state_dict_pre_hook(lambda *a: call()),
    "load": lambda layer, call: layer.register_load_state_dict_pre_hook(lambda *a: call()),
    "after load": lambda layer, call: layer.register_load_state_dict_post_hook(lambda *a: call()),
}


@pytest.mark.parametrize("put", HOOKS.values(), ids=HOOKS)
def test_hooks_of_every_kind_are_carried_over_and_can_be_removed(put):
    model, calls = toys.plain(8, 8, 2), []
    handle = put(model[0], lambda: calls.append(1))
    for convert in (pst.replace_linear, pst.merge_and_unload):
        model = convert(model)
        calls.clear()
        x = torch.randn(3, 8, requires_grad=True)
        model(x).sum().backward()
        model.load_state_dict(model.state_dict())
        assert calls
    handle.remove()
    calls.clear()
    model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert not calls


def test_a_forward_of_its_own_is_refused_by_name(caplog):
    def model():
        made = toys.plain(8, 8, 8, 2)
        made[0].forward = lambda x: x
        return made

    with pytest.raises(TypeError, match=r"^0 has a forward of its own"):
        pst.replace_linear(model(), pst.PSTConfig(target_modules=["0", "2"]))
    assert named(pst.replace_linear(model())) == {"2"}
    assert "0 (each has a forward of its own" in caplog.text


def test_weights_tied_through_data_stay_dense(caplog):
    model = toys.plain(8, 8, 8, 8, 2)
    model[2].weight.data = model[0].weight.data
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        pst.replace_linear(model)
    assert named(model) == {"4"}
    assert "tied to other modules: 0, 2" in caplog.text


def test_placeholders_of_zero_3_are_refused_by_name():
    model = toys.bert()
    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)
    with pytest.raises(RuntimeError, match=r"query is partitioned by DeepSpeed ZeRO-3 .* before deepspeed.initialize"):
        pst.replace_linear(model)


def test_a_frozen_weight_that_is_written_in_place_is_said_once(caplog):
    model = toys.plain(8, 8, 8, 2)
    pst.replace_linear(model)
    x = torch.randn(3, 8)
    model(x)
    model.load_state_dict(model.state_dict())
    for _ in range(2):
        model(x)
        model[0].merge()
        model[0].unmerge()
        model(x)
    assert caplog.text == ""
    for _ in range(2):
        with torch.no_grad():
            model[2].weight.div_(2)
        model(x)
    (record,) = caplog.records
    assert record.message.startswith("the frozen weight of 2 was written in place after the conversion")


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_save_pretrained_of_a_model_under_pst_loads_pruned_in_transformers(family, tmp_path):
    model = copy.deepcopy(toys.trained(family))
    expected = toys.logits(model, family)
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(toys.logits(stock, family), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"holds a whole model under PST, .* no adapter"):
        pst.load_pretrained(toys.seeded(family), tmp_path)
    assert "save_pretrained" not in vars(pst.merge_and_unload(model))


def test_what_save_pretrained_writes_goes_on_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    model = toys.trained()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    other = pst.replace_linear(toys.seeded(), pst.PSTConfig())
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not result.unexpected_keys
    assert not toys.differences(toys.snapshot(other), toys.snapshot(model))
