"""A vision transformer: the same three lines, and a look at where the zeros lie."""

from __future__ import annotations

import argparse

import torch
from transformers import ViTConfig, ViTForImageClassification

import pst_kernels as pst

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--width", type=int, default=192)
options = parser.parse_args()

torch.manual_seed(0)
size = {
    "hidden_size": options.width,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
model = ViTForImageClassification(ViTConfig(**size, intermediate_size=4 * options.width, num_labels=4))
config = pst.PSTConfig(sparsity=0.8, allocation="global")  # one threshold over all layers
model = pst.replace_linear(model, config).train()
optimizer = torch.optim.AdamW(pst.parameter_groups(model, lr=1e-4), weight_decay=0.0)
schedule = pst.SparsitySchedule(model, options.steps)
for _ in range(options.steps):
    labels = torch.randint(4, (8,))
    images = torch.randn(8, 3, 32, 32) + labels[:, None, None, None]  # brighter or darker
    model(pixel_values=images, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
for row in pst.get_layer_status(model):
    print(f"{row.sparsity:.3f}  {row.name}")
merged = pst.merge_and_unload(model, format="sparse")
print(merged.vit)
