"""`pst-kernels show`: what its table and picture say is what the tensors hold."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import load_file

import pst_kernels as pst
from pst_kernels import cli, reference
from pst_kernels.checkpoint import ADAPTER_NAME
from pst_kernels.model import pst_layers
from pst_kernels.show import drawing
from pst_kernels.show.reading import look

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model of Conv1D layers (one of them square) with a layer's row and column emptied, in every form."""
    here = tmp_path_factory.mktemp("saved")
    model = toys.trained("gpt2", sparsity=0.8)
    layer = model.transformer.h[0].mlp.c_proj  # (32, 128)
    with torch.no_grad():
        layer.pst_R[3], layer.pst_C[5] = -100.0, -100.0
        layer.refresh_mask()
    dense = {name: layer.masked_weight().clone() for name, layer in pst_layers(model)}
    toys.seeded("gpt2").save_pretrained(here / "base")
    pst.save_pretrained(model, here / "adapter")
    pst.save_sparse(model, here / "sparse")
    pst.save_sparse(model, here / "shards", max_shard_size=6000)
    model.save_pretrained(here / "whole")
    pst.merge_and_unload(model).save_pretrained(here / "dense")
    return here, dense


def size(folder, name, *parts):
    return sum(load_file(folder / "model.safetensors")[f"{name}.{part}"].nbytes for part in parts)


@pytest.mark.parametrize("kind", ["sparse", "shards", "dense", "whole", "adapter"])
def test_counts_are_those_of_the_tensors(kind, saved):
    here, dense = saved
    found = look(here / kind)
    assert [layer.name for layer in found.layers] == list(dense)
    for layer in found.layers:
        zero = dense[layer.name] == 0
        assert layer.shape == zero.shape
        assert layer.zeros == int(zero.sum()) == int(0.8 * zero.numel() + 1e-9)
        assert layer.empty_rows == int(zero.all(1).sum())
        assert layer.empty_columns == int(zero.all(0).sum())
    by_name = {layer.name: layer for layer in found.layers}
    emptied = by_name["transformer.h.0.mlp.c_proj"]
    assert emptied.empty_rows >= 1
    assert emptied.empty_columns >= 1
    assert found.bytes == sum(path.stat().st_size for path in (here / kind).glob("*.safetensors"))


def test_layer_2_comes_before_layer_10(tmp_path):
    model = pst.replace_linear(
        toys.seeded("bert", num_hidden_layers=11), pst.PSTConfig(target_modules=["intermediate.dense"])
    )
    pst.save_pretrained(model, tmp_path / "adapter")
    pst.save_sparse(model, tmp_path / "sparse")
    for kind in ("adapter", "sparse"):
        assert [layer.name for layer in look(tmp_path / kind).layers] == [name for name, _ in pst_layers(model)]
    names = [name for name, _ in pst_layers(model)]
    assert drawing._short(names)[::10] == ["0.intermediate.dense", "10.intermediate.dense"]
    assert drawing._short(names[:1]) == names[:1]


def test_bytes_of_a_layer(saved):
    here, _ = saved
    name = "transformer.h.0.mlp.c_proj"
    of = {kind: {layer.name: layer.bytes for layer in look(here / kind).layers}[name] for kind in ("sparse", "dense")}
    assert of["sparse"] == size(here / "sparse", name, "weight", "weight_bits", "bias") == 820 * 4 + 32 * 16 + 32 * 4
    assert of["dense"] == size(here / "dense", name, "weight", "bias") == 33 * 32 * 4 * 4 - 96 * 4
    adapter = {layer.name: layer.bytes for layer in look(here / "adapter").layers}[name]
    tensors = load_file(here / "adapter" / ADAPTER_NAME)
    assert adapter == sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}."))


def test_magnitudes_are_those_of_the_kept_weights(saved):
    here, dense = saved
    for kind in ("sparse", "dense"):
        for layer in look(here / kind).layers:
            kept = dense[layer.name][dense[layer.name] != 0].abs()
            assert layer.quantiles[0] == float(kept.min())
            assert layer.quantiles[-1] == float(kept.max())
            assert layer.threshold is None


def test_scores_and_threshold_of_an_adapter(saved):
    """Also of a square Conv1D, whose shape does not tell how it lies."""
    here, dense = saved
    found, tensors = look(here / "adapter", here / "base"), load_file(here / "adapter" / ADAPTER_NAME)
    base = toys.seeded("gpt2").state_dict()
    assert found.measured == "score"
    assert found.notes == []
    for layer in found.layers:
        factors = [tensors[f"{layer.name}.pst_{f}"].double() for f in "UVABRC"]
        scores = reference.scores(base[f"{layer.name}.weight"].T.double(), *factors)
        ordered = scores.flatten().sort().values
        assert layer.threshold == pytest.approx(float(ordered[layer.zeros - 1]), abs=1e-6)
        assert layer.quantiles[0] == pytest.approx(float(ordered[0]), rel=1e-6)
        assert layer.quantiles[500] == pytest.approx(float(ordered[ordered.numel() // 2]), abs=2e-3)
        assert bool((scores[dense[layer.name] == 0] <= layer.threshold + 1e-6).all())


def test_scores_with_weighed_magnitudes(tmp_path):
    model = toys.trained("gpt2", sparsity=0.8, magnitude="fisher")
    toys.seeded("gpt2").save_pretrained(tmp_path / "base")
    pst.save_pretrained(model, tmp_path / "adapter")
    found = look(tmp_path / "adapter", tmp_path / "base")
    assert found.notes == []  # such as of masks that are not of these scores
    for layer in found.layers:
        ordered = model.get_submodule(layer.name).scores().flatten().sort().values
        assert layer.threshold == float(ordered[layer.zeros - 1])


def test_a_base_without_its_head_and_blocks(tmp_path):
    """The prefix of the larger class is in the adapter's names, but not in the base's file."""
    model = toys.seeded("bert")
    model.bert.save_pretrained(tmp_path / "base")
    model = toys.perturb(pst.replace_linear(model, pst.PSTConfig(sparsity=0.5, pattern="block:16")))
    pst.refresh_masks(model)
    pst.save_pretrained(model, tmp_path / "adapter")
    pst.save_sparse(model, tmp_path / "sparse")
    found = look(tmp_path / "adapter", tmp_path / "base")
    assert found.notes == ["pattern='block:16' has no threshold of single scores."]
    packed = {layer.name: layer for layer in look(tmp_path / "sparse").layers}
    for layer in found.layers:
        mask = model.get_submodule(layer.name).mask
        assert layer.zeros == packed[layer.name].zeros == int((~mask).sum())
        assert layer.empty_rows == packed[layer.name].empty_rows == int((~mask).all(1).sum())
        assert layer.threshold is None
        assert len(layer.quantiles) == 1001


def test_experts(tmp_path, capsys):
    """Each has rows and columns of its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=50)
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    model = toys.perturb(pst.replace_linear(model, pst.PSTConfig(sparsity=0.9)))
    pst.refresh_masks(model)
    pst.save_pretrained(model, tmp_path / "adapter")
    found = look(tmp_path / "adapter")
    layers = dict(pst_layers(model))
    assert {layer.name for layer in found.layers} == layers.keys()
    assert {len(layer.shape) for layer in found.layers} == {2, 3}
    for layer in found.layers:
        mask = layers[layer.name].mask
        assert layer.shape == mask.shape
        assert layer.zeros == int((~mask).sum())
        assert layer.empty_rows == int((~mask).all(-1).sum())
        assert layer.empty_columns == int((~mask).all(-2).sum())
    picture, base = str(tmp_path / "one.png"), str(tmp_path / "base")
    assert cli.main(["show", str(tmp_path / "adapter"), "--model", base, "--output", picture]) == 0
    assert "The scores of experts are not shown." in capsys.readouterr().out


def test_masks_that_are_not_of_these_scores_are_told(saved, caplog):
    here, _ = saved
    torch.manual_seed(1)
    other = toys.gpt2()
    other.save_pretrained(here / "other")
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        found = look(here / "adapter", here / "other")
    assert found.notes == ["Masks of an earlier step than their scores, or fixed: 8."]
    assert "other base weights" in caplog.text


def test_histogram_of_quantiles():
    values = np.sort(np.random.default_rng(0).normal(size=100_001))
    edges = np.linspace(-5, 5, 41)
    exact = np.histogram(values, edges)[0] / len(values)
    np.testing.assert_allclose(drawing.histogram(values[::100], edges), exact, atol=1.1e-3)
    assert drawing.histogram(None, edges).sum() == 0


@pytest.mark.parametrize("arguments", [["sparse"], ["adapter"], ["adapter", "--model", "base"]], ids=" ".join)
def test_the_command_prints_a_table_and_writes_one_picture(arguments, saved, tmp_path, monkeypatch, capsys):
    here, dense = saved
    monkeypatch.chdir(tmp_path)
    assert cli.main(["show", *(a if a == "--model" else str(here / a) for a in arguments)]) == 0
    output = capsys.readouterr().out
    for name in dense:
        assert name in output
    assert "8 layers" in output
    zeros = sum(int((weight == 0).sum()) for weight in dense.values())
    assert f"{zeros:,}" in output
    assert ("--model BASE" in output) == (arguments == ["adapter"])
    assert ("threshold" in output) == ("--model" in arguments)
    picture = tmp_path / f"zeros_{arguments[0]}.png"
    assert list(tmp_path.iterdir()) == [picture]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_name_for_the_picture(saved, tmp_path, capsys):
    here, _ = saved
    target = tmp_path / "new" / "one.png"
    odd = shutil.copytree(here / "dense", tmp_path / "[bold]")
    assert cli.main(["show", str(odd), "--output", str(target)]) == 0
    assert "[bold] (dense folder)" in " ".join(capsys.readouterr().out.split())  # wherever the title wraps
    assert target.is_file()


def test_what_is_wrong_is_one_line_and_nothing_is_written(saved, tmp_path, monkeypatch, capsys):
    here, _ = saved
    monkeypatch.chdir(tmp_path)
    damaged = shutil.copytree(here / "adapter", tmp_path / "damaged")
    content = bytearray((damaged / ADAPTER_NAME).read_bytes())
    tensors = load_file(damaged / ADAPTER_NAME)
    place = bytes(content).index(tensors["transformer.h.0.attn.c_attn.pst_mask"].numpy().tobytes())
    content[place] ^= 1
    (damaged / ADAPTER_NAME).write_bytes(content)
    broken = shutil.copytree(here / "sparse", tmp_path / "broken")
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    cut = shutil.copytree(here / "dense", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-8])
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        (["nowhere"], "nowhere does not exist; give a folder"),
        ([here / "dense" / "config.json"], "is a file; give the folder that it lies in"),
        (["empty"], f"empty has neither {ADAPTER_NAME} nor config.json"),
        ([here / "base"], "has a zero; give a folder of a pruned model, or an adapter"),
        (["damaged"], "is damaged: the mask of transformer.h.0.attn.c_attn prunes other weights"),
        (["broken"], "save the folder again"),
        (["cut"], "is damaged"),
        ([here / "sparse", "--model", here / "base"], "--model is for adapters"),
        ([here / "adapter", "--model", "nowhere"], "--model nowhere is not a folder"),
        ([here / "adapter", "--model", here / "sparse"], "is quantised or packed; give the dense model"),
        ([here / "dense", "--output", "picture.pdf"], "must be the name of a .png file"),
    ):
        assert cli.main(["show", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
    toys.bert().save_pretrained(tmp_path / "bert")
    assert cli.main(["show", str(here / "adapter"), "--model", "bert"]) == 2
    assert "is not this adapter's base model: it has no layer transformer.h.0.attn.c_attn" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "bert"])


def test_without_the_packages(saved, monkeypatch, capsys):
    monkeypatch.setattr("pst_kernels.show.PACKAGES", ("rich", "no_such_package"))
    assert cli.main(["show", str(saved[0] / "sparse")]) == 2
    assert capsys.readouterr().err == (
        "pst-kernels show: no_such_package not installed; run: pip install 'pst_kernels[finetune]'\n"
    )
