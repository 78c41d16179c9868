"""`pst-kernels convert`: anybody's zeros into a packed folder, and back bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
import toys
from safetensors.torch import save_file
from test_folder import contents, of, zeroed

import pst_kernels as pst
from pst_kernels import cli
from pst_kernels.export.convert import SIGNS, convert
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear
from pst_kernels.layers.sparse_linear import SparseLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_there_and_back_is_the_same_folder(family, dtype, tmp_path):
    model = zeroed(family, dtype)
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "dense", tmp_path / "sparse")
    loaded = pst.load_sparse(tmp_path / "sparse")
    assert len(of(SparseLinear, loaded)) == toys.LINEARS[family]
    assert loaded.dtype == dtype
    dense = pst.load_sparse(tmp_path / "sparse").dequantize()
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())
    convert(tmp_path / "sparse", tmp_path / "again", to="dense")
    assert contents(tmp_path / "again") == contents(tmp_path / "dense")
    assert (tmp_path / "sparse" / SIGNS).is_file()  # W * mask leaves -0.0


def test_shards_and_blocks(tmp_path):
    model = pst.merge_and_unload(toys.trained("gpt2", pattern="block:16", sparsity=0.5)).eval()
    model.save_pretrained(tmp_path / "dense", max_shard_size=20_000)
    assert len(contents(tmp_path / "dense")) > 4
    convert(tmp_path / "dense", tmp_path / "blocks", to="block:16")
    loaded = pst.load_sparse(tmp_path / "blocks")
    assert len(of(BlockSparseLinear, loaded)) == toys.LINEARS["gpt2"]
    torch.testing.assert_close(toys.logits(loaded, "gpt2"), toys.logits(model, "gpt2"), rtol=1e-5, atol=1e-5)
    convert(tmp_path / "blocks", tmp_path / "again", to="dense")
    assert contents(tmp_path / "again") == contents(tmp_path / "dense")


def test_what_save_sparse_wrote_becomes_dense(tmp_path):
    model = zeroed("gpt2")
    pst.save_sparse(model, tmp_path / "sparse", max_shard_size=9_000)  # values and bits fall into different files
    convert(tmp_path / "sparse", tmp_path / "dense", to="dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_names_without_the_prefix_and_odd_values(tmp_path, caplog):
    """A checkpoint of the base model alone, as GPT-2's own is, with an infinity and a NaN, and a pruned embedding."""
    model = zeroed("gpt2")
    with torch.no_grad():
        weight = model.transformer.h[0].attn.c_attn.weight
        weight[0, :2] = torch.tensor([float("nan"), float("inf")])
        model.transformer.wpe.weight[:, 5:] = 0
    state = {name.removeprefix("transformer."): t for name, t in model.transformer.state_dict().items()}
    (tmp_path / "dense").mkdir()
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "sparse")
    assert "wpe.weight stays dense: it has zeros, but is no weight of a linear layer" in caplog.text
    loaded = pst.load_sparse(tmp_path / "sparse")
    assert len(of(SparseLinear, loaded)) == toys.LINEARS["gpt2"]
    convert(tmp_path / "sparse", tmp_path / "again", to="dense")
    assert contents(tmp_path / "again") == contents(tmp_path / "dense")


def test_the_command_and_its_errors(tmp_path, capsys):
    dense, sparse = str(tmp_path / "dense"), str(tmp_path / "sparse")
    zeroed().save_pretrained(dense)
    assert cli.main(["convert", dense, sparse]) == 0
    assert "bytes of weights, from" in capsys.readouterr().out
    plain = str(tmp_path / "plain")
    toys.seeded("bert").save_pretrained(plain)
    for arguments, error in (
        ([dense, dense], "OUT must be another folder"),
        ([dense, f"{sparse}2", "--to", "csr"], "format='csr' is not known"),
        ([dense, f"{sparse}2", "--to", "block"], "to='block' needs a size"),
        ([dense, f"{sparse}2", "--to", "dense"], "was not written by save_sparse"),
        ([sparse, f"{sparse}2"], "is quantised or packed already"),
        ([plain, f"{sparse}2"], "no linear layer of"),
        ([str(tmp_path), f"{sparse}2"], "does not exist"),
    ):
        assert cli.main(["convert", *arguments]) == 2
        assert error in capsys.readouterr().err
    file = tmp_path / "sparse" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["convert", sparse, f"{sparse}2", "--to", "dense"]) == 2
    assert "is damaged or foreign" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "plain", "sparse"]


def test_a_folder_without_safetensors_or_of_an_unknown_class(tmp_path):
    zeroed().save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"architectures": ["Unheard"]}))
    with pytest.raises(ValueError, match="has no class Unheard"):
        convert(tmp_path / "dense", tmp_path / "out")
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "dense" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="save the model with safetensors"):
        convert(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
