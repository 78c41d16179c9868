"""`python -m bench blocks`: the cost of block and N:M patterns beside dense training and torch's block-sparse product.

A block mask stays for `mask_interval` steps, and the last of them makes all of G, so a step is the mean of a whole
interval. Rounds are interleaved: in each, one interval of every block pattern and a few dense steps; ratios are of the
same round. Nothing is timed for a pattern whose output is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pst_kernels as pst
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear

from ..tables.report import Report, measured_on
from . import cases, modes
from .cases import Case
from .check import relative_error
from .providers import DENSE, Provider, all_providers
from .sparse_providers import pattern_provider

Key = tuple[str, float] | None  # pattern and sparsity; None is dense
Run = Callable[[], Any]
Times = dict[Key, list[float]]  # ms, one a round

SHAPE, TOKENS = cases.BY_NAME["BERT-base up"], 1024
LAYER = (("block:64", 0.9), ("block:64", 0.95), ("block:32", 0.9), ("2:4", 0.5))
MODEL = (("block:32", 0.9),)
DENSE_STEPS = 4


@dataclasses.dataclass
class Row:
    """One pattern's median ratios to dense in the same round.

    Those with `bsr` are to torch's block-sparse product, `merged` is the layer that stores the kept blocks.
    """

    case: str
    pattern: str
    sparsity: float
    step: float
    step_ms: float
    dense_step_ms: float
    forward: float | None = None
    forward_bsr: float | None = None
    merged_forward: float | None = None
    merged_forward_bsr: float | None = None


def _cells(row: Row) -> list[str]:
    more = [row.forward, row.forward_bsr, row.merged_forward, row.merged_forward_bsr]
    numbers = [f"{row.step:.2f}", f"{row.step_ms:.1f}", f"{row.dense_step_ms:.1f}"]
    ratios = ["-" if n is None else f"{n:.2f}" for n in more]
    return [row.case, row.pattern, f"{100 * row.sparsity:g} %", *numbers, *ratios]


REPORT = Report(
    "blocks", Row, "block patterns: ratios to dense in the same round, medians",
    ("case", "pattern", "pruned", "step", "step, ms", "dense step, ms", "forward", "forward to BSR", "merged forward",
     "merged forward to BSR"),
    _cells,
    lambda under: (
        f"{measured_on(under)} Ratios to dense in the same round, fp32, medians; a step is forward, backward and"
        " AdamW, the mean over the steps from one mask to the next, the mask's own included. BSR is torch's own product"
        ' with the same blocks; merged is a `BlockSparseLinear` of `merge_and_unload(model, format="bsr")`.'
    ),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="of the layer; the model gets half as many")
    REPORT.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    REPORT.run(options, lambda: [*_layer_rows(options.rounds), *_model_rows(max(1, options.rounds // 2))])
    return 0


def _provider(pattern: str, sparsity: float) -> Provider:
    provider = pattern_provider(f"{pattern} at {sparsity:g}", pattern, sparsity)
    return dataclasses.replace(provider, steps=1)  # the rounds below count the steps of an interval


def _layer_rows(rounds: int) -> list[Row]:
    shape, tokens = SHAPE, TOKENS
    dense = next(p for p in all_providers("cpu") if p.name == DENSE)
    chosen = {key: _provider(*key) for key in LAYER}

    def task(provider: Provider, mode: str) -> Run:
        made = modes.layer_task(provider, Case(mode, shape, tokens, torch.float32), "cpu", "default")
        if made is None:
            raise ValueError(f"{provider.name} has no {mode}")
        return made.run

    steps: dict[Key, Run] = {None: task(dense, "step")}
    forwards: dict[Key, Run] = {None: task(dense, "forward")}
    products: dict[Key, Run] = {}
    merged: dict[Key, Run] = {}
    for key, provider in chosen.items():
        if key[0].startswith("block"):
            merged[key], products[key] = _checked_products(provider, shape, tokens, int(key[0].partition(":")[2]))
        steps[key], forwards[key] = task(provider, "step"), task(provider, "forward")
    times: dict[str, Times] = {"step": {}, "forward": {}, "merged": {}, "bsr": {}}
    for number in range(rounds + 1):
        for one, run in steps.items():
            _add(times["step"], one, _mean_ms(run, _interval(one)), number)
        for name, runs in (("forward", forwards), ("merged", merged), ("bsr", products)):
            for one, run in runs.items():
                _add(times[name], one, _mean_ms(run, 3), number)
    case = f"{shape.name} {shape.columns} -> {shape.out}, T = {tokens}"
    return [_row(case, key, times["step"], *_forward_ratios(key, times)) for key in LAYER]


def _forward_ratios(key: tuple[str, float], times: dict[str, Times]) -> list[float | None]:
    """Of the layer in training and of the merged one, each to dense and to BSR; None for patterns without blocks."""
    dense, bsr = times["forward"][None], times["bsr"].get(key)
    ours = [times[name].get(key) for name in ("forward", "merged")]
    return [None if one is None or other is None else _ratio(one, other) for one in ours for other in (dense, bsr)]


def _model_rows(rounds: int) -> list[Row]:
    dense = next(p for p in all_providers("cpu") if p.name == DENSE)
    steps: dict[Key, Run] = {None: modes.model_task(dense, "cpu", "default").run}
    for key in MODEL:
        steps[key] = modes.model_task(_provider(*key), "cpu", "default").run
    times: Times = {}
    for number in range(rounds + 1):
        for one, run in steps.items():
            _add(times, one, _mean_ms(run, _interval(one) if number else 1), number)
    return [_row("MiniLM-L6, batch 16 x 128", key, times) for key in MODEL]


def _interval(key: Key) -> int:
    """Steps that make up a fair mean: for a pattern of blocks, from one mask to the next."""
    return max(DENSE_STEPS, 1 if key is None else pst.PSTConfig(pattern=key[0]).mask_interval)


def _row(case: str, key: tuple[str, float], step: Times, *forwards: float | None) -> Row:
    ours, dense = statistics.median(step[key]), statistics.median(step[None])
    return Row(case, *key, _ratio(step[key], step[None]), ours, dense, *forwards)


def _checked_products(provider: Provider, shape: cases.Shape, tokens: int, size: int) -> tuple[Run, Run]:
    """The merged layer's forward and torch's product with the same blocks, after our layer's output and that of the
    merged one were compared with a dense product in float64.
    """
    layer: Any = modes.settled(provider.layer(modes.base_linear(shape, torch.float32, "cpu")))
    x = torch.randn(tokens, shape.columns, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight = layer.masked_weight()
        merged = BlockSparseLinear.from_dense(weight, layer.bias, size)
        exact = nn.functional.linear(x.double(), weight.double(), layer.bias.double())
        for name, y in ((provider.name, layer(x)), (f"{provider.name}, merged,", merged(x))):
            error = relative_error(y, exact)
            if not error <= 1e-5:
                raise ValueError(f"the output of {name} is off by {error:.1e} of its size; nothing was timed")
    sparse = weight.to_sparse_bsr((size, size))
    # torch's is several times faster than nn.functional.linear with a BSR weight
    return lambda: merged(x), lambda: sparse @ x.t()


def _mean_ms(run: Run, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return 1e3 * (time.perf_counter() - start) / times


def _add(times: Times, key: Key, value: float, number: int) -> None:
    if number:  # the first round warms up
        times.setdefault(key, []).append(value)


def _ratio(ours: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))
