"""A sparse folder loaded under tensor parallelism: each process holds its rows or columns of every layer that is cut.

One launch of two processes makes all results (parallel_worker.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel_worker as worker
import pytest
import torch
import toys
from processes import launch
from test_folder import thinned
from torch import nn

import pst_kernels as pst

LAUNCH = """
import sys, torch.multiprocessing as mp, parallel_worker as worker
if __name__ == "__main__":
    mp.get_context("forkserver").set_forkserver_preload(["parallel_worker"])  # imported once for both
    mp.start_processes(worker.run, (sys.argv[1],), nprocs=worker.RANKS, start_method="forkserver")
"""
MODELS = ("two shards", "llama", "neox", "blocks", "phi3", "gpt2", "odd", "bf16")

COLUMNS = {"neox": {"dense", "dense_4h_to_h"}, "gpt2": {"c_proj"}, "odd": {"o_proj"}}  # which layers are cut by these
PACKED = {"neox": 8, "phi3": 8, "gpt2": 8}
WHOLE = {"gpt2": "attn", "odd": "mlp"}  # which stay whole


def neox() -> nn.Module:
    """Biases everywhere, also where columns are cut."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=toys.VOCABULARY, max_position_embeddings=32))


def phi3() -> nn.Module:
    """Its plan gathers the outputs of fused layers, and cuts what the next ones are given. One layer is not packed."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=toys.VOCABULARY, pad_token_id=0, num_key_value_heads=1))
    thinned(model, 0.8)
    nn.init.sparse_(model.lm_head.weight, 0.8)
    nn.init.normal_(model.model.layers[1].mlp.gate_up_proj.weight, std=0.1)
    return model.eval()


def with_biases(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_all(folder: Path) -> None:
    torch.manual_seed(0)
    wide = thinned(toys.seeded("llama", intermediate_size=300), 0.8)  # half of it ends within a chunk and a byte
    pst.save_sparse(wide, folder / "llama")
    pst.save_sparse(wide, folder / "two shards", max_shard_size=50_000)
    assert len(list((folder / "two shards").glob("*.safetensors"))) == 2
    pst.save_sparse(with_biases(thinned(neox(), 0.8)), folder / "neox")
    for name, size in (("blocks", 8), ("blocks of 16", 16)):
        pst.save_sparse(thinned(toys.seeded("llama"), 0.7, size), folder / name, format=f"block:{size}")
    pst.save_sparse(phi3(), folder / "phi3")
    pst.save_sparse(with_biases(thinned(toys.seeded("gpt2"), 0.8)), folder / "gpt2")
    pst.save_sparse(thinned(toys.seeded("llama"), 0.8).bfloat16(), folder / "bf16")
    pst.save_sparse(thinned(toys.seeded("llama", intermediate_size=49), 0.8), folder / "odd")


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("parallel")
    save_all(where)
    return launch(where, LAUNCH, worker)


@pytest.fixture(scope="module")
def results(launched) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    return [torch.load(launched / f"{rank}.pt") for rank in range(worker.RANKS)]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_one_process(launched, results, name):
    whole = pst.load_sparse(launched / name)
    expected = worker.of_tokens(whole)
    tolerance = 2e-2 if name == "bf16" else 1e-5
    for found in results:
        assert not any(found["about"].values())
        for key, tensor in expected.items():
            torch.testing.assert_close(found[name][1][key], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_each_process_holds_its_part_alone(launched, results, name):
    whole = worker.sizes(pst.load_sparse(launched / name))
    assert len(whole) == PACKED.get(name, 14)
    one, other = (found[name][0] for found in results)
    assert one.keys() == other.keys() == whole.keys()
    by_rows, by_columns = set(), set()
    for layer, (rows, columns, kept) in whole.items():
        if f".{WHOLE.get(name)}." in layer:
            assert one[layer] == other[layer] == whole[layer]
            continue
        assert one[layer][:2] == other[layer][:2]
        assert one[layer][2] + other[layer][2] == kept
        assert one[layer][:2] in ((rows // 2, columns), (rows, columns // 2))
        (by_rows if one[layer][0] == rows // 2 else by_columns).add(layer.rpartition(".")[2])
    assert by_columns == COLUMNS.get(name, {"o_proj", "down_proj"})
    assert not by_rows & by_columns
    assert ("lm_head" in by_rows) == (name == "phi3")


def test_generate_gives_the_tokens_of_one_process(launched, results):
    whole = pst.load_sparse(launched / "two shards")
    for cache in worker.CACHES:
        expected = worker.generated(whole, cache)
        assert all(torch.equal(found["generated"][cache], expected) for found in results)


PART = "RuntimeError: model.layers.0.self_attn.q_proj is one of 2 parts of a layer: the model was loaded under"
SAID = {
    "odd": "_proj has 49 columns, which do not make 2 equal parts; load it on another number of processes, or give it",
    "blocks": "_proj has 48 columns, which do not make 2 equal parts of whole blocks of 16; load it on another number",
    "style": "layers.0.mlp.up_proj is 'packed_colwise' in the tensor parallel plan, and a packed layer is cut by",
    "weight": "ValueError: tp_plan names the weight of model.layers.0.mlp.up_proj, which is packed; name the layer",
    "others": "ValueError: a model saved by save_sparse is loaded under tensor parallelism alone, got fsdp_size=2",
    "save_sparse": PART,
    "save_pretrained": PART,
    "dequantize": PART,
}


@pytest.mark.parametrize("case", SAID)
def test_what_cannot_be_is_said_on_every_process(launched, results, case):
    for found in results:
        assert SAID[case] in found["errors"][case]
    assert not list(launched.glob("again/*.safetensors"))
