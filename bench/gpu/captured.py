"""Part `captured`: what a training step takes of the device itself, the host left out: whole steps as CUDA graphs.

The quick grid times calls from Python, as people make them, and where the host is slower than the device its time is
the host's. A captured step is launched as one: its time is the kernels'. For each step the profiler also tells what its
kernels take. Dense, LoRA and ours take turns, with emptied caches, as in the grid.

A graph holds STEPS steps of every contestant, so that all are as far in their training when they are timed: the search
for a mask takes longer where the threshold moves faster, and with a gradient that never changes it moves faster for the
first hundred steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pst_kernels as pst

from ..baselines.lora import LoRA
from ..speed import cases, measure, modes
from ..speed.cases import BY_NAME, Case
from ..speed.providers import DENSE, SPARSITY, all_providers
from . import exits
from .conditions import write_rows
from .graphs import captured

PROFILED = 5  # replays
INTERVAL = 4  # of the contestant whose scores rest
STEPS = INTERVAL  # of a graph: one gradient of the scores and what lies between
BF16, FP32 = torch.bfloat16, torch.float32
CASES = [
    Case("step", BY_NAME[name], tokens, dtype)
    for name, tokens, dtype in (
        ("Llama-8B query", 4096, BF16), ("Llama-8B up", 4096, BF16), ("GPT-2 medium up", 2048, BF16),
        ("BERT-base up", 1024, BF16), ("BERT-base up", 1024, FP32), ("Llama-8B query", 16384, BF16),
        ("Llama-8B query", 512, BF16),
    )
]  # fmt: skip
MODEL = Case("model", cases.MINILM, 2048, BF16)
SETTINGS: dict[str, dict[str, Any]] = {
    "PST": {}, "PST, M * W' remade": {"masked_weight": "remake"}, f"PST, score_interval={INTERVAL}":
    {"score_interval": INTERVAL}, "PST, mask fixed": {"freeze": 0.2},
    "PST, block:64, between masks": {"pattern": "block:64", "mask_interval": 10**6},
}  # fmt: skip


@dataclasses.dataclass
class Row:
    """One contestant in one case; times are of one step."""

    case: str
    contestant: str
    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    ratio: float  # to dense, median over rounds
    kernels: dict[str, tuple[float, float]]  # by name: launches, and microseconds, of one step


def kernels_of(replay: Callable[[], Any]) -> dict[str, tuple[float, float]]:
    """Launches and microseconds of one replay by kernel, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            replay()
        torch.cuda.synchronize()
    found = [
        (event.key[:80], (event.count / PROFILED, round(event.self_device_time_total / PROFILED, 2)))
        for event in profiler.key_averages()
        if event.self_device_time_total
    ]
    return dict(sorted(found, key=lambda pair: -pair[1][1]))


def rows_of(case: Case, seconds: float) -> Iterator[Row]:
    replays = {}
    for name in (DENSE, "LoRA", *SETTINGS):
        try:
            step = _model_step(name) if case.mode == "model" else _layer_step(name, case)
            replays[name] = captured(partial(_several, step, STEPS))
        except Exception as error:  # one that cannot be captured loses the others nothing
            print(f"{name} is left out of {case}: {type(error).__name__}: {error}", flush=True)
    timers = {n: measure.timer(replay, None, "cuda", STEPS) for n, replay in replays.items()}
    timings = measure.interleaved(timers, seconds, reference=DENSE, min_rounds=5, max_rounds=40)
    for name, timing in timings.items():
        times, ratio = timing.quantiles, timing.ratio_to(timings[DENSE]).median if DENSE in timings else float("nan")
        kernels = {key: (count / STEPS, micro / STEPS) for key, (count, micro) in kernels_of(replays[name]).items()}
        median, p20, p80 = (round(1e6 * value, 2) for value in (times.median, times.p20, times.p80))
        yield Row(str(case), name, median, p20, p80, timing.rounds, round(ratio, 4), kernels)


def _several(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def _converted(name: str, module: nn.Module) -> nn.Module:
    if name == "LoRA":
        return LoRA.from_linear(module)  # type: ignore[arg-type]
    return pst.PSTLinear.from_linear(module, pst.PSTConfig(sparsity=SPARSITY, **SETTINGS[name]))  # type: ignore[arg-type]


def _layer_step(name: str, case: Case) -> Callable[[], None]:
    layer: Any = modes.base_linear(case.shape, case.dtype, "cuda")
    if name != DENSE:
        layer = _settled(modes.settled(_converted(name, layer)))
    x = torch.randn(case.tokens, case.shape.columns).to(layer.weight).requires_grad_()
    gy = torch.randn(case.tokens, case.shape.out).to(layer.weight) / case.tokens
    return _step(layer, lambda: layer(x).backward(gy), [x])


def _model_step(name: str) -> Callable[[], None]:
    model: Any = modes.minilm("cuda").to(MODEL.dtype).train()
    if name == "LoRA":
        model = next(p for p in all_providers("cuda") if p.name == name).model(model)
    elif name != DENSE:
        pst.replace_linear(model, pst.PSTConfig(sparsity=SPARSITY, **SETTINGS[name]))
        for layer in model.modules():
            if isinstance(layer, pst.PSTLinear):
                _settled(modes.settled(layer))
    tokens = torch.randint(1000, 30000, (16, 128), generator=torch.Generator().manual_seed(0)).cuda()
    labels = torch.arange(16, device="cuda") % model.config.num_labels
    return _step(model, lambda: model(input_ids=tokens, labels=labels).loss.backward(), [])


def _settled(layer: Any) -> Any:
    if isinstance(layer, pst.PSTLinear) and layer.config.freeze:
        layer.freeze_mask()
    return layer


def _step(module: nn.Module, run: Callable[[], Any], inputs: list[torch.Tensor]) -> Callable[[], None]:
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=modes.LEARNING_RATE, weight_decay=0.0, fused=True, capturable=True)

    def step() -> None:
        for tensor in inputs:
            tensor.grad = None
        optimizer.zero_grad()
        run()
        optimizer.step()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a case")
    options = parser.parse_args()
    rows: list[Row] = []
    for case in (*CASES, MODEL):
        rows += rows_of(case, options.seconds)
        write_rows(options.output, rows)
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{len(rows)} captured steps")
    return exits.PASSED if rows else exits.FAILED


if __name__ == "__main__":
    raise SystemExit(main())
