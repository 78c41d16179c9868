"""`pst-kernels env`: what is installed, what the machine has, and which backend each op would run on, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from . import env, ops
from .cpu.compiled import passes_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(options: argparse.Namespace) -> int:
    report = capability_report()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    for section, rows in report.items():
        print(section)
        for name, value in rows.items():
            print(f"  {name:<22} {value}")
    return 0


def capability_report() -> dict[str, dict[str, Any]]:
    """Versions, machine, variables, and per op and device the backend with the reason for it."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": env.versions(),
        "machine": env.machine(),
        "variables": env.variables(),
        **{f"backend on {device}": _backends(device) for device in devices},
    }


# Ops that Numba compiles on a CPU.
PASSES = ("scores", "prune_mask", "refresh_mask", "masked_weight", "linear_forward", "linear_backward")
LISTS = ("sparse_forward", "sparse_backward")
BLOCKS = ("kept_blocks_forward", "kept_blocks_backward")
COMPILED = {
    **dict.fromkeys(PASSES, "passes over W; products are torch's"),
    **dict.fromkeys(LISTS, "lists of kept weights"),
    **dict.fromkeys(BLOCKS, "stored blocks, up to 128 tokens; above a product of torch's a block"),
    "kth_value": "a look at more than 65,536 scores; the rest is NumPy's",
}


def _backends(device: str) -> dict[str, str]:
    return {op: _how(op, device) for op in ops.NAMES}


def _how(op: str, device: str) -> str:
    """What runs an op for tensors on a device, and why."""
    backend, reason = env.backend_for(device)
    if op == "stack_gradients":
        return "torch (batched products)"
    if device != "cpu" and op in BLOCKS:
        return "torch (its block-sparse product)"
    if backend == "triton" and op not in BLOCKS:
        return f"triton ({reason})"
    if device != "cpu" and op in LISTS:
        return "torch (the dense weight first)"
    if device == "cpu" and op in COMPILED:
        if passes_for(torch.ones(1, 1)) is not None:
            return f"numba ({COMPILED[op]}{'' if op == 'kth_value' else ', in float32 and bfloat16'})"
        asked = "PST_KERNELS_CPU=torch" if env.cpu() == "torch" else "numba is not installed"
        return f"{'numpy' if op == 'kth_value' else 'torch'} ({asked})"
    return f"torch ({reason})"
