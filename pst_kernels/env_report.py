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


# Ops whose passes over W Numba compiles on a CPU, and those that are products with lists of kept weights.
PASSES = ("scores", "prune_mask", "refresh_mask", "masked_weight", "linear_forward", "linear_backward")
LISTS = ("sparse_forward", "sparse_backward")
ELSEWHERE = {  # the same on every device
    "stack_gradients": "torch (batched products)",
    "kept_blocks_forward": "torch (a product a block on a CPU, else its block-sparse product)",
    "kept_blocks_backward": "torch (a product a block on a CPU, else its block-sparse product)",
}


def _backends(device: str) -> dict[str, str]:
    return {op: _how(op, device) for op in ops.NAMES}


def _how(op: str, device: str) -> str:
    """What runs an op for tensors on a device, and why."""
    backend, reason = env.backend_for(device)
    if op in ELSEWHERE:
        return ELSEWHERE[op]
    if op in LISTS and device != "cpu":
        return "torch (the dense weight first)"
    if backend == "triton" and op not in LISTS:
        return f"triton ({reason})"
    if device == "cpu" and op == "kth_value":
        return f"numpy ({reason})"
    if device == "cpu" and op in (*PASSES, *LISTS):
        passes = passes_for(torch.ones(1, 1))
        if passes is not None:
            kept = "lists of kept weights" if op in LISTS else "passes over W; products are torch's"
            return f"numba ({kept}, in float32 and bfloat16)"
        asked = "PST_KERNELS_CPU=torch" if env.cpu() == "torch" else "numba is not installed"
        return f"torch ({asked})"
    return f"torch ({reason})"
