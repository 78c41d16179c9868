"""What test_accelerate_configs.py runs under `accelerate launch`, in each of two CPU processes; the first writes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import toys
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, save_fsdp_model
from torch import nn

import pst_kernels as pst
from pst_kernels.layers.checks import whole

STEPS, ROWS = 3, 8


def build() -> nn.Module:
    return toys.perturb(pst.replace_linear(toys.seeded(), pst.PSTConfig(sparsity=0.7))).train()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, ranks: int = 1) -> None:
    schedule = pst.SparsitySchedule(model, STEPS)
    for step in range(STEPS):
        batch = {name: t.chunk(ranks)[rank] for name, t in toys.inputs("bert", ROWS, seed=step).items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found = accelerator.distributed_type.value
    # Without a GPU Accelerate overlooks the request for FSDP. Told that it is FSDP, it does all the rest on CPUs too.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin()
    model = build()
    model, optimizer = accelerator.prepare(model, sgd(model))
    train(model, optimizer, accelerator.process_index, accelerator.num_processes)
    save_fsdp_model(plugin, accelerator, model, str(folder))
    state = {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}
    if accelerator.is_main_process:
        shards = sorted({type(m).__name__ for m in model.modules() if type(m).__name__.startswith("FSDP")})
        torch.save({"found": found, "sharded": shards, "state": state}, folder / "result.pt")
    dist.barrier()
    os._exit(0)  # the ways of leaving a group are not the subject here


if __name__ == "__main__":
    main(Path(sys.argv[1]))
