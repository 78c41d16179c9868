"""A training loop of one's own: convert, train with a fixed mask at the end, save sparse, load, run."""

from __future__ import annotations

import argparse

import torch
from transformers import BertConfig, BertForSequenceClassification

import pst_kernels as pst

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--output", default="runs/plain_loop")
options = parser.parse_args()

torch.manual_seed(0)
size = {"hidden_size": options.width, "num_hidden_layers": 2, "num_attention_heads": 4}
model = BertForSequenceClassification(BertConfig(**size, intermediate_size=4 * options.width, vocab_size=1000))
config = pst.PSTConfig(sparsity=0.9, freeze=0.2, train_kept=True)  # kept weights train in the last fifth of the steps
model = pst.replace_linear(model, config).train()
optimizer = torch.optim.AdamW(pst.parameter_groups(model, lr=1e-4), weight_decay=0.0)
schedule = pst.SparsitySchedule(model, options.steps)
for step in range(options.steps):
    tokens = torch.randint(1000, (8, 32))
    labels = (tokens[:, 0] > 500).long()  # something to learn
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % max(1, options.steps // 5) == 0:
        print(f"step {step}: loss {float(loss.detach()):.3f}, sparsity {schedule.sparsity:.2f}")
pst.print_trainable_parameters(model)
pst.save_sparse(model, options.output)
sparse = pst.load_sparse(options.output).eval()
with torch.no_grad():
    difference = (sparse(input_ids=tokens).logits - model.eval()(input_ids=tokens).logits).abs().max()
print(f"saved to {options.output}; loaded again it differs by {float(difference):.1e}")
