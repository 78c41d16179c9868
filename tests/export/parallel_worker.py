"""What test_parallel_loading.py runs in each of two processes (gloo, CPU), one launch for all: results go to a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import toys
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import pst_kernels as pst
import pst_kernels.hf
from pst_kernels.layers.stored import StoredParts

RANKS = 2
# GPT-2 has no plan of its own; its attention stays whole
GPT2 = {"transformer.h.*.mlp.c_fc": "colwise", "transformer.h.*.mlp.c_proj": "rowwise"}
ODD = {f"model.layers.*.mlp.{name}_proj": "replicate" for name in ("gate", "up", "down")}
PLANS = {"gpt2": GPT2, "odd": ODD}
WEIGHT = {"model.layers.*.mlp.up_proj.weight": "colwise"}
PACKED = {"model.layers.*.mlp.up_proj": "packed_colwise"}
CACHES = ("dynamic", "static")


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Rows, columns and kept weights or blocks of every packed layer."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, StoredParts))
    return {name: (layer.out_features, layer.in_features, len(layer.weight)) for name, layer in layers}


def of_tokens(model: Any) -> dict[str, torch.Tensor]:
    """Logits of several tokens and of one, and the gradient of the first norm, which crosses all layers."""
    tokens = toys.inputs("llama")["input_ids"]
    with torch.no_grad():
        found = {"many": model(tokens).logits, "one": model(tokens[:1, :1]).logits}
    model(tokens, labels=tokens).loss.backward()
    name, norm = next((n, p) for n, p in model.named_parameters() if "norm" in n or "ln_1" in n)
    return {key: value.detach().clone() for key, value in {**found, name: norm.grad}.items()}


def generated(model: Any, cache: str) -> torch.Tensor:
    tokens = toys.inputs("llama")["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), cache_implementation=cache, **settings)


def error(call: Any) -> str:
    try:
        call()
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


def cut(plan: Any = None, **sizes: int) -> dict[str, Any]:
    return {"distributed_config": DistributedConfig(tp_size=RANKS, tp_plan=plan, **sizes)}


def refused(folder: Path, model: Any) -> dict[str, str]:
    odd, llama = folder / "odd", folder / "llama"
    return {
        "odd": error(lambda: pst.load_sparse(odd, **cut())),
        "blocks": error(lambda: pst.load_sparse(folder / "blocks of 16", **cut())),
        "style": error(lambda: pst.load_sparse(llama, **cut(PACKED))),
        "weight": error(lambda: pst.load_sparse(llama, **cut(WEIGHT))),
        "others": error(
            lambda: pst.load_sparse(llama, distributed_config=DistributedConfig(tp_size=1, fsdp_size=RANKS))
        ),
        "save_sparse": error(lambda: pst.save_sparse(model, folder / "again")),
        "save_pretrained": error(lambda: model.save_pretrained(folder / "again")),
        "dequantize": error(model.dequantize),
    }


def run(rank: int, where: str) -> None:
    folder = Path(where)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    stock, about = AutoModelForCausalLM.from_pretrained(folder / "two shards", tp_plan="auto", output_loading_info=True)
    found["about"] = about
    found["two shards"] = sizes(stock), of_tokens(stock)
    found["generated"] = {cache: generated(stock, cache) for cache in CACHES}
    for name in ("llama", "neox", "blocks", "phi3", "gpt2", "odd", "bf16"):
        model = pst.load_sparse(folder / name, **cut(PLANS.get(name)))
        found[name] = sizes(model), of_tokens(model)
    found["errors"] = refused(folder, stock)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo may outlive Python otherwise
