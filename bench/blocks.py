"""`python -m bench blocks`: what block patterns cost beside dense training and torch's own block-sparse product.

A block mask stays for `mask_interval` steps, and the last of them makes all of G, so a step is the mean of a whole
interval. Rounds are interleaved: in each, one interval of every block pattern and a few dense steps; ratios are of the
same round. Nothing is timed for a pattern whose output is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import pst_kernels as pst
from pst_kernels.files import write_json

from . import cases, modes, results
from .cases import Case
from .check import relative_error
from .console import console
from .providers import DENSE, Provider, all_providers
from .table import replace_between

Key = tuple[str, float] | None  # pattern and sparsity; None is dense
Run = Callable[[], Any]
Times = dict[Key, list[float]]  # ms, one a round

LAYER = (("block:64", 0.9), ("block:64", 0.95), ("block:32", 0.9))
MODEL = (("block:32", 0.9),)
DENSE_STEPS = 4
COLUMNS = ("case", "pattern", "pruned", "step", "step, ms", "dense step, ms", "forward", "forward to BSR")
BEGIN, END = "<!-- blocks:begin -->", "<!-- blocks:end -->"


@dataclasses.dataclass
class Row:
    """One pattern's median ratios to dense in the same round; `forward_bsr` is to torch's block-sparse product."""

    case: str
    pattern: str
    sparsity: float
    step: float
    step_ms: float
    dense_step_ms: float
    forward: float | None = None
    forward_bsr: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="of the layer; the model gets half as many")
    parser.add_argument("--readme", type=Path, default=None, help="rewrite the table between the markers there")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder of blocks.json")


def main(options: argparse.Namespace) -> int:
    rows = [*_layer_rows(options.rounds), *_model_rows(max(1, options.rounds // 2))]
    conditions = {"machine": results.machine(), "threads": torch.get_num_threads(), "versions": results.versions()}
    conditions |= {"date": results.today(), "commit": results.commit()}
    write_json(options.output / "blocks.json", {**conditions, "rows": [dataclasses.asdict(row) for row in rows]})
    table = Table(title="block patterns: ratios to dense in the same round, medians")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:2] else "right")
    for row in rows:
        table.add_row(*_cells(row))
    console().print(table)
    if options.readme is not None:
        replace_between(options.readme, BEGIN, END, _markdown(rows, conditions))
    return 0


def _cells(row: Row) -> list[str]:
    more = ["-" if n is None else f"{n:.2f}" for n in (row.forward, row.forward_bsr)]
    numbers = [f"{row.step:.2f}", f"{row.step_ms:.1f}", f"{row.dense_step_ms:.1f}"]
    return [row.case, row.pattern, f"{100 * row.sparsity:g} %", *numbers, *more]


def _markdown(rows: Sequence[Row], conditions: dict[str, Any]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    text = (
        f"Measured on {conditions['machine']} (cpu, {conditions['threads']} threads), {conditions['versions']},"
        f" {conditions['date']}, commit {conditions['commit']}. Ratios to dense in the same round, fp32, medians; a"
        " step is forward, backward and AdamW, the mean over the steps from one mask to the next, the mask's"
        " own included."
    )
    return "\n".join([*lines, "", text])


def _provider(pattern: str, sparsity: float) -> Provider:
    config = pst.PSTConfig(sparsity=sparsity, pattern=pattern)
    ours = next(p for p in all_providers("cpu") if p.ours)
    return dataclasses.replace(
        ours, name=f"{pattern} at {sparsity:g}", layer=lambda linear: pst.PSTLinear.from_linear(linear, config),
        model=lambda model: pst.replace_linear(model, config),
    )  # fmt: skip


def _layer_rows(rounds: int) -> list[Row]:
    shape, tokens = cases.BY_NAME["BERT-base up"], 1024
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
    for key, provider in chosen.items():
        products[key] = _checked_bsr_product(provider, shape, tokens, int(key[0].partition(":")[2]))
        steps[key], forwards[key] = task(provider, "step"), task(provider, "forward")
    times: dict[str, Times] = {"step": {}, "forward": {}, "bsr": {}}
    for number in range(rounds + 1):
        for one, run in steps.items():
            _add(times["step"], one, _mean_ms(run, _interval(one)), number)
        for name, runs in (("forward", forwards), ("bsr", products)):
            for one, run in runs.items():
                _add(times[name], one, _mean_ms(run, 3), number)
    forward, bsr = times["forward"], times["bsr"]
    case = f"{shape.name} {shape.columns} -> {shape.out}, T = {tokens}"
    return [
        _row(case, key, times["step"], _ratio(forward[key], forward[None]), _ratio(forward[key], bsr[key]))
        for key in LAYER
    ]


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
    """Steps that make up a fair mean: for a pattern, from one mask to the next."""
    return DENSE_STEPS if key is None else pst.PSTConfig(pattern=key[0]).mask_interval


def _row(
    case: str, key: tuple[str, float], step: Times, forward: float | None = None, forward_bsr: float | None = None
) -> Row:
    ours, dense = statistics.median(step[key]), statistics.median(step[None])
    return Row(case, *key, _ratio(step[key], step[None]), ours, dense, forward, forward_bsr)


def _checked_bsr_product(provider: Provider, shape: cases.Shape, tokens: int, size: int) -> Run:
    """torch's product with the same blocks, after our layer's output was compared with a dense product in float64."""
    layer: Any = modes.settled(provider.layer(modes.base_linear(shape, torch.float32, "cpu")))
    x = torch.randn(tokens, shape.columns, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, weight = layer(x), layer.masked_weight()
    error = relative_error(y, nn.functional.linear(x.double(), weight.double(), layer.bias.double()))
    if not error <= 1e-5:
        raise ValueError(f"the output of {provider.name} is off by {error:.1e} of its size; nothing was timed")
    sparse = weight.to_sparse_bsr((size, size))
    return lambda: sparse @ x.t()  # several times faster than nn.functional.linear with a BSR weight


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
