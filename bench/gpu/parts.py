"""The parts of a GPU day, most valuable first: what each runs, its file, how long it may take, and its dry run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PYTHON = sys.executable
WHO = ["--providers", "LoRA", "PST released", "PST (triton)"]  # and dense; PyTorch's PST would take the others' time
SPARE = 15.0  # seconds of the benchmark's time that it leaves for its tables and for stopping


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    file: str  # of its result, in the folder of the device
    most: float  # seconds that it may take
    least: float  # seconds under which it is not started
    command: Callable[[Path, float], list[str]]  # for the result's path and the seconds it has
    dry_run: list[str]  # the same modules, without a device


def _imports(*modules: str) -> list[str]:
    return [PYTHON, "-c", f"import {', '.join(modules)}; print('imported: {', '.join(modules)}')"]


PARTS = (
    Part(
        "smoke", "one PST layer in each dtype and steps of AdamW, against the formulas in float64", "smoke.json",
        90.0, 20.0,
        lambda path, _: [PYTHON, "-m", "bench.gpu.smoke", "--output", str(path)],
        [PYTHON, "-m", "bench.gpu.smoke", "--device", "cpu"],
    ),
    Part(
        "tests", "the GPU tests: every op and the layers, graphs, routes, patterns", "tests.json", 230.0, 40.0,
        lambda path, seconds: [
            PYTHON, "-m", "bench.gpu.tests", "--output", str(path), "--seconds", f"{seconds - 5.0:.0f}",
        ],
        [PYTHON, "-m", "bench.gpu.tests", "--collect"],
    ),
    Part(
        "bench", "the quick grid: dense, LoRA, the released PST and ours, interleaved, timed by CUDA events",
        "benchmark.csv", 240.0, 40.0,
        lambda path, seconds: [
            PYTHON, "-m", "bench", "--quick", "--device", "cuda", *WHO, "--no-plots", "--output", str(path.parent),
            "--total", f"{max(SPARE, seconds - SPARE):.0f}",
        ],
        [PYTHON, "-m", "bench", "--quick", "--device", "cuda", *WHO, "--list"],
    ),
    Part(
        "captured", "whole steps as CUDA graphs, and what their kernels take", "captured.json", 150.0, 40.0,
        lambda path, _: [PYTHON, "-m", "bench.gpu.captured", "--output", str(path)], _imports("bench.gpu.captured"),
    ),
    Part(
        "decoding", "tokens a second of sparse language models, a decode step being one CUDA graph", "decoding.json",
        60.0, 20.0,
        lambda path, _: [PYTHON, "-m", "bench.gpu.decoding", "--output", str(path)], _imports("bench.gpu.decoding"),
    ),
    Part(
        "kernels", "registers, spills and main loops of every shipped kernel, compiled for this device",
        "kernels.json", 120.0, 30.0,
        lambda path, _: [PYTHON, "-m", "bench.gpu.kernels", "--output", str(path)],
        _imports("bench.gpu.kernels", "pst_kernels.triton.tools.machine_code"),
    ),
)  # fmt: skip
