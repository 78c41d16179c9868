"""`pst-kernels env`: what is installed, what the machine has, and which backend each op would run on, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from . import env, ops


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


def _backends(device: str) -> dict[str, str]:
    backend, reason = env.backend_for(device)
    return dict.fromkeys(ops.NAMES, f"{backend} ({reason})")
