"""Part `smoke`: does a PST layer run on this device at all, and is it right?

One layer in each dtype: output, gradients and mask against the method's formulas in float64, then steps of AdamW.
"""

from __future__ import annotations

import argparse
import time

import torch

from pst_kernels import env
from pst_kernels.files import write_json

from ..speed import cases, check, modes
from ..speed.providers import Provider, all_providers
from . import exits
from .conditions import conditions_or_why_not

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def provider_of(device: str) -> Provider:
    """Ours: of Triton on a GPU, of PyTorch elsewhere."""
    wanted = "triton" if device == "cuda" else "torch"
    found = [provider for provider in all_providers(device) if provider.backend == wanted]
    if not found:
        raise RuntimeError(f"no provider of the {wanted} backend on {device}: triton {env.versions()['triton']}")
    return found[0]


def run(device: str, shape: cases.Shape) -> dict[str, dict[str, object]]:
    """By what was tried: "ok" or what is wrong, and the seconds it took, compilation included."""
    provider, found = provider_of(device), {}
    tries = {f"layer, {cases.short(dtype)}": dtype for dtype in DTYPES}
    for name, dtype in tries.items():
        start = time.perf_counter()
        result = check.check_layer(provider, shape, dtype, device)
        found[name] = {"check": result, "seconds": round(time.perf_counter() - start, 1)}
        print(f"{name}: {found[name]}", flush=True)
    start = time.perf_counter()
    try:
        result = check.check_steps(provider, lambda layer: modes.adamw(layer, "fused"), device)
    except Exception as error:  # whatever goes wrong is the result
        result = f"raised {type(error).__name__}: {error}"
    found["steps of AdamW"] = {"check": result, "seconds": round(time.perf_counter() - start, 1)}
    print(f"steps of AdamW: {found['steps of AdamW']}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", default=None, help="JSON file")
    options = parser.parse_args()
    shape = cases.BY_NAME["BERT-base up"] if options.device == "cuda" else cases.Shape("small", 96, 80)
    found = run(options.device, shape)
    report = {**conditions_or_why_not(options.device), "results": found}
    if options.output:
        write_json(options.output, report)
    wrong = [f"{name}: {one['check']}" for name, one in found.items() if one["check"] != check.OK]
    print("; ".join(wrong) or f"{len(found)} checks ok")
    return exits.FAILED if wrong else exits.PASSED


if __name__ == "__main__":
    raise SystemExit(main())
