"""Somebody's pruned checkpoint (magnitude, SparseGPT, Wanda, ours): pack it, load it sparse, compare, time it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM

import pst_kernels as pst

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="a transformers folder of a causal language model with zeros in its weights")
parser.add_argument("--output", default="runs/converted")
parser.add_argument("--tokens", type=int, default=32)
options = parser.parse_args()

subprocess.run([sys.executable, "-m", "pst_kernels.cli", "convert", options.folder, options.output], check=True)
dense = AutoModelForCausalLM.from_pretrained(options.folder).eval()
sparse = pst.load_sparse(options.output).eval()
prompt = torch.randint(dense.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
for name, model in (("dense", dense), ("sparse", sparse)):
    with torch.no_grad():
        logits = model(input_ids=prompt).logits
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0)
    print(f"{name}: {options.tokens / (time.perf_counter() - start):.1f} tokens a second, {float(logits.std()):.6f}")
