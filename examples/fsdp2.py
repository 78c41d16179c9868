"""FSDP2 over several processes: `torchrun --standalone --nproc-per-node 2 examples/fsdp2.py`. Runs on CPUs too."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification

import pst_kernels as pst

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--output", default="runs/fsdp2")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
mesh = init_device_mesh(device, (dist.get_world_size(),))
torch.manual_seed(0)  # the same model in every process
size = {"hidden_size": options.width, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}
model = BertForSequenceClassification(BertConfig(**size, intermediate_size=4 * options.width)).to(device)
model = pst.replace_linear(model, pst.PSTConfig(sparsity=0.9))  # first convert, then shard
for layer in model.bert.encoder.layer:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
schedule = pst.SparsitySchedule(model, options.steps)
torch.manual_seed(dist.get_rank())  # other texts in each
for _ in range(options.steps):
    tokens = torch.randint(1000, (4, 32), device=device)
    model(input_ids=tokens, labels=(tokens[:, 0] > 500).long()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
pst.save_pretrained(model, f"{options.output}/{dist.get_rank()}")  # gathers, so every process must call it
if dist.get_rank() == 0:
    print(f"sparsity {schedule.sparsity:.2f}; the adapter is in {options.output}/0")
del model, optimizer, schedule
dist.destroy_process_group()
