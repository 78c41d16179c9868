"""save_sparse, load_sparse and from_pretrained: a folder that stays sparse on disk and in memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from safetensors import safe_open
from torch import nn

import pst_kernels as pst
from pst_kernels.export import checked
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear
from pst_kernels.layers.sparse_linear import SparseLinear
from pst_kernels.model import pst_layers

BLOCKS = {"pattern": "block:16", "sparsity": 0.5}


def of(kind, model):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def zeroed(family: str = "bert", dtype: torch.dtype = torch.float32, sparsity: float = 0.9) -> nn.Module:
    """A dense toy model with zeros."""
    return thinned(toys.seeded(family).to(dtype), sparsity)


def thinned(model: nn.Module, sparsity: float, block: int = 1) -> nn.Module:
    """Zeros in the linears of a model's blocks, as any method leaves them: W * mask, so that negative ones are -0.0."""
    for name, module in model.named_modules():
        if ("layer" in name or ".h." in name) and type(module).__name__ in ("Linear", "Conv1D"):
            generator = torch.Generator().manual_seed(len(name))
            sizes = [-(-size // block) for size in module.weight.shape]
            kept = (torch.rand(sizes, generator=generator) >= sparsity).repeat_interleave(block, 0)
            with torch.no_grad():
                rows, columns = module.weight.shape
                module.weight.mul_(kept.repeat_interleave(block, 1)[:rows, :columns])
    return model


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_every_family_is_saved_loaded_and_saved_again(family, tmp_path):
    model = toys.trained(family, sparsity=0.9)
    before, names = toys.snapshot(model), [name for name, _ in pst_layers(model)]
    dense = pst.merge_and_unload(toys.trained(family, sparsity=0.9)).eval()
    pst.save_sparse(model, tmp_path / "one")
    assert not toys.differences(toys.snapshot(model), before)
    loaded = pst.load_sparse(tmp_path / "one")
    assert type(loaded) is type(model)
    assert list(of(SparseLinear, loaded)) == names
    for name, layer in of(SparseLinear, loaded).items():
        plain = dense.get_submodule(name)
        assert torch.equal(layer.to_dense(), plain.weight.T if type(plain).__name__ == "Conv1D" else plain.weight)
        assert not layer.weight.requires_grad
        assert not layer._wrong(layer.weight, layer.offsets, layer.pointers)
    torch.testing.assert_close(toys.logits(loaded, family), toys.logits(dense, family), rtol=1e-5, atol=1e-5)
    pst.save_sparse(loaded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_unmerged_merged_and_sparse_models_make_one_folder(family, tmp_path):
    pst.save_sparse(toys.trained(family, sparsity=0.8), tmp_path / "unmerged")
    for format in ("dense", "sparse"):
        pst.save_sparse(pst.merge_and_unload(toys.trained(family, sparsity=0.8), format=format), tmp_path / format)
        assert contents(tmp_path / format) == contents(tmp_path / "unmerged")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_blocks(family, tmp_path):
    expected = toys.logits(toys.trained(family, **BLOCKS), family)
    pst.save_sparse(toys.trained(family, **BLOCKS), tmp_path / "a", format="block")
    loaded = pst.load_sparse(tmp_path / "a")
    layers = of(BlockSparseLinear, loaded)
    assert len(layers) == toys.LINEARS[family]
    assert all(layer.block_size == 16 for layer in layers.values())
    torch.testing.assert_close(toys.logits(loaded, family), expected, rtol=1e-5, atol=1e-5)
    pst.save_sparse(pst.merge_and_unload(toys.trained(family, **BLOCKS)), tmp_path / "b", format="block:16")
    pst.save_sparse(loaded, tmp_path / "c", format="block")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    pst.save_sparse(loaded, tmp_path / "d", format="block:8")
    pst.save_sparse(loaded, tmp_path / "e")
    for folder, kind in (("d", BlockSparseLinear), ("e", SparseLinear)):
        again = pst.load_sparse(tmp_path / folder)
        assert len(of(kind, again)) == toys.LINEARS[family]
        torch.testing.assert_close(toys.logits(again, family), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_dense_folder_is_the_merged_model(family, tmp_path):
    dense = pst.merge_and_unload(toys.trained(family, sparsity=0.9))
    sparse = pst.merge_and_unload(toys.trained(family, sparsity=0.9), format="sparse")
    pst.save_sparse(toys.trained(family, sparsity=0.9), tmp_path / "a", format="dense")
    pst.save_sparse(sparse, tmp_path / "b", format="dense")
    for folder in ("a", "b"):
        assert "quantization_config" not in json.loads((tmp_path / folder / "config.json").read_text())
        loaded = type(dense).from_pretrained(tmp_path / folder)
        assert not toys.differences(dict(loaded.state_dict()), dict(dense.state_dict()))
    with pytest.raises(ValueError, match="was not written by save_sparse; load it with transformers' from_pretrained"):
        pst.load_sparse(tmp_path / "a")


@pytest.mark.parametrize("format", ["sparse", "block:16"])
def test_shards_load_as_one_file_does(format, tmp_path):
    model = toys.trained(**BLOCKS)
    pst.save_sparse(model, tmp_path / "one", format=format)
    pst.save_sparse(model, tmp_path / "many", format=format, max_shard_size=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = pst.load_sparse(tmp_path / "one"), pst.load_sparse(tmp_path / "many")
    assert not toys.differences(dict(one.state_dict()), dict(many.state_dict()))
    pst.save_sparse(many, tmp_path / "many", format=format)  # over its own files
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


FRESH = """
import json, sys
import torch
import transformers
import pst_kernels.hf
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[3])
print(json.dumps(sorted({type(m).__name__ for m in model.modules()} & {"SparseLinear", "Linear"})))
"""


@pytest.mark.slow
def test_stock_from_pretrained_in_a_fresh_process(tmp_path):
    model = toys.trained(sparsity=0.9)
    pst.save_sparse(model, tmp_path / "folder")
    torch.save(toys.inputs("bert"), tmp_path / "inputs")
    arguments = [str(tmp_path / name) for name in ("folder", "inputs", "logits")]
    root = Path(pst.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["Linear", "SparseLinear"]
    dense = pst.merge_and_unload(model).eval()
    torch.testing.assert_close(torch.load(tmp_path / "logits"), toys.logits(dense, "bert"), rtol=1e-5, atol=1e-5)


@pytest.fixture
def unknown(monkeypatch):
    """transformers as it is where nobody imported pst_kernels.hf."""
    from transformers.quantizers import auto

    import pst_kernels.hf  # noqa: F401

    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, checked.METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, checked.METHOD)


def test_without_the_import_transformers_names_the_module_and_loads_nothing(unknown, tmp_path, caplog):
    import transformers

    pst.save_sparse(zeroed(), tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()  # a job of another test may have made it quieter
    try:
        with pytest.raises(RuntimeError):  # the values are no weight's shape
            transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
        transformers.logging.set_verbosity(before)
    assert "Unknown quantization type, got pst_kernels.hf" in caplog.text
    assert "import pst_kernels.hf" in (tmp_path / "config.json").read_text()


def test_a_pruned_weight_is_its_values_and_one_bit_a_place(tmp_path):
    pst.save_sparse(zeroed(dtype=torch.bfloat16), tmp_path)
    layers = of(SparseLinear, pst.load_sparse(tmp_path))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for name, layer in layers.items():
            own = {key: file.get_tensor(key) for key in names if key.startswith(f"{name}.") and "bias" not in key}
            assert own.keys() == {f"{name}.weight", f"{name}.weight_bits"}
            places, kept = layer.in_features * layer.out_features, layer.weight.numel()
            assert 8 * sum(tensor.nbytes for tensor in own.values()) == 16 * kept + places  # whole bytes a row here


def test_dtype_device_map_and_another_class(tmp_path):
    import transformers

    import pst_kernels.hf  # noqa: F401

    dense = zeroed("gpt2").eval()
    pst.save_sparse(dense, tmp_path)
    half = pst.load_sparse(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(layer.offsets.dtype == torch.uint8 for layer in of(SparseLinear, half).values())
    parts = dict.fromkeys(
        ("transformer.wte", "transformer.wpe", "transformer.ln_f", "transformer.h.0", "lm_head"), "cpu"
    )
    on_disk = {"device_map": parts | {"transformer.h.1": "disk"}, "offload_folder": tmp_path / "offloaded"}
    for settings in ({"device_map": "cpu"}, {"device_map": "auto"}, on_disk):
        mapped = pst.load_sparse(tmp_path, **settings)
        torch.testing.assert_close(toys.logits(mapped, "gpt2"), toys.logits(dense, "gpt2"), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="is on the meta device"):
        pst.save_sparse(mapped, tmp_path / "again")
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert len(of(SparseLinear, base)) == toys.LINEARS["gpt2"]
    tokens = toys.inputs("gpt2")["input_ids"]
    with torch.no_grad():
        expected = dense.transformer(tokens).last_hidden_state
        torch.testing.assert_close(base(tokens).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    pst.save_sparse(base, tmp_path / "base")
    whole = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(toys.logits(whole, "gpt2"), toys.logits(dense, "gpt2"), rtol=1e-5, atol=1e-5)


def test_the_models_own_save_pretrained_and_dequantize(tmp_path):
    dense = zeroed("gpt2").eval()
    pst.save_sparse(dense, tmp_path / "a")
    loaded = pst.load_sparse(tmp_path / "a")
    layer = next(iter(of(SparseLinear, loaded).values()))
    with torch.no_grad():
        layer.weight.mul_(2)
    loaded.save_pretrained(tmp_path / "b")
    again = pst.load_sparse(tmp_path / "b")
    assert not toys.differences(dict(again.state_dict()), dict(loaded.state_dict()))
    plain = pst.load_sparse(tmp_path / "a").dequantize()
    assert not of(SparseLinear, plain)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in dense.state_dict().items())


def test_generation_config_and_tokenizer_are_in_the_folder(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            Path(folder, "tokenizer.json").write_text("{}")

    model = zeroed("gpt2")
    model.generation_config.max_new_tokens = 3
    pst.save_sparse(model, tmp_path, tokenizer=Tokenizer())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} == contents(tmp_path).keys()
    assert pst.load_sparse(tmp_path).generation_config.max_new_tokens == 3


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(TypeError, match="must be a transformers model, got Sequential; save_compressed"):
        pst.save_sparse(toys.plain(), folder)
    with pytest.raises(ValueError, match="format='bsr' is not known; use 'sparse', 'block'"):
        pst.save_sparse(zeroed(), folder, format="bsr")
    with pytest.raises(ValueError, match=r"format='block' needs a size for .*, which has no blocks"):
        pst.save_sparse(zeroed(), folder, format="block")
    with pytest.raises(ValueError, match="no layer of the model has zeros to leave out with format='sparse'"):
        pst.save_sparse(toys.seeded("bert"), folder)
    assert not list(tmp_path.iterdir())
