"""A small GPT-2 from a config: trained on the text of this repository, saved sparse, loaded, and asked to go on."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import pst_kernels as pst

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--output", default="runs/causal_lm")
options = parser.parse_args()

torch.manual_seed(0)
pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
text = torch.tensor(list("\n".join(page.read_text(encoding="utf-8") for page in pages).encode()))  # a token a byte
size = {"n_embd": options.width, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 256}
model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
model = pst.replace_linear(model, pst.PSTConfig(sparsity=0.8, beta=1 / 16)).train()
optimizer = torch.optim.AdamW(pst.parameter_groups(model, lr=3e-4), weight_decay=0.0)
schedule = pst.SparsitySchedule(model, options.steps)
for step in range(options.steps):
    first = torch.randint(len(text) - 65, (8,))
    tokens = torch.stack([text[i : i + 64] for i in first.tolist()])
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % max(1, options.steps // 5) == 0:
        print(f"step {step}: loss {float(loss.detach()):.2f}, sparsity {schedule.sparsity:.2f}")
pst.save_sparse(model, options.output)
sparse = pst.load_sparse(options.output).eval()
prompt = torch.tensor([list(b"The mask ")])
written = sparse.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
print(bytes(written[0].tolist()).decode(errors="replace"))
