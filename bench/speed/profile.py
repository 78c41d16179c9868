"""`python -m bench profile`: where the time of one training step goes, pass by pass.

The four passes (mask refresh, forward, backward, optimizer) are timed without a profiler. What is inside them is told
from the operators that PyTorch's profiler sees, by their name and the sizes of their inputs: its shares are scaled to
the measured time. What no operator accounts for is Python and NumPy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..console import Table, console
from ..tables import rows as results
from . import cases, modes
from .cases import Case
from .providers import DENSE, Provider, all_providers

PASSES = ("mask refresh", "forward", "backward", "optimizer")
RANK_PRODUCTS = "W' and scores (rank-r products)"
G_GEMM, OTHER_GEMM = "GEMM of G or dW", "GEMM of y or dx"
COMPILED = "compiled pass over W"
REDUCTIONS, ELEMENTWISE = "reductions to factor gradients", "masking, comparing, casting, other elementwise"
OUTSIDE = "Python, NumPy (selection) and what no operator shows"
RANK_AT_MOST = 64  # of all factors together; the sides of W and of its row blocks are larger
_OPERANDS = {"aten::mm": (0, 1), "aten::addmm": (1, 2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(cases.BY_NAME), default="BERT-base up", metavar="NAME")
    parser.add_argument("--tokens", type=int, default=1024, metavar="T")
    parser.add_argument("--dtype", choices=[cases.short(d) for d in cases.DTYPES], default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7, help="steps, of which the medians are shown")
    parser.add_argument("--adamw", choices=("fused", "default"), default="fused")


def main(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    case = Case("step", cases.BY_NAME[options.shape], options.tokens, getattr(torch, options.dtype))
    chosen = [p for p in all_providers(options.device) if p.name == DENSE or p.ours]
    profiles = {p.name: profile(p, case, options.device, options.adamw, options.rounds) for p in chosen}
    out = console()
    out.print(f"{results.machine()}, {torch.get_num_threads()} threads, {results.versions()}, {results.today()}")
    out.print(_table(case, profiles))
    return 0


def profile(provider: Provider, case: Case, device: str, adamw: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by pass, and in each by kind of operator."""
    with provider.active():
        steps = _steps(provider, case, device, adamw)
        times: dict[str, list[float]] = {name: [] for name in steps}
        shares: dict[str, dict[str, float]] = {}
        for number in range(rounds + 1):
            for name, step in steps.items():
                seconds = _timed(step, device)
                if number:  # the first round warms up
                    times[name].append(seconds)
        for name, step in steps.items():
            inside = _shares(step, case, device)
            shares[name] = {"": 1.0} if name == "optimizer" else inside
    return {
        name: {kind: 1e3 * statistics.median(times[name]) * share for kind, share in shares[name].items()}
        for name in steps
    }


def _steps(provider: Provider, case: Case, device: str, adamw: str) -> dict[str, Callable[[], Any]]:
    """The passes of one step, to be called in order."""
    layer: Any = modes.settled(provider.layer(modes.base_linear(case.shape, case.dtype, device)))
    x = torch.randn(case.tokens, case.shape.columns).to(layer.weight).requires_grad_()
    gy = torch.randn(case.tokens, case.shape.out).to(layer.weight) / case.tokens
    optimizer, kept = modes.adamw(layer, adamw), list[Tensor]()

    def forward() -> None:
        x.grad = None
        optimizer.zero_grad()
        kept.append(layer(x))

    refresh = {"mask refresh": layer.refresh_mask} if provider.mask is not None else {}
    return {**refresh, "forward": forward, "backward": lambda: kept.pop().backward(gy), "optimizer": optimizer.step}


def _timed(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _shares(step: Callable[[], Any], case: Case, device: str) -> dict[str, float]:
    """Part of a pass by kind, adding up to one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        seconds = _timed(step, device)
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        micro = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if micro > 0 and not event.key.startswith("ProfilerStep"):
            found[kind_of(event.key, event.input_shapes, case)] += micro / 1e6
    inside = sum(seconds for kind, seconds in found.items() if kind != OUTSIDE)
    total = max(seconds, inside)
    found[OUTSIDE] = total - inside
    return {kind: seconds / total for kind, seconds in found.items()}


def kind_of(name: str, shapes: list, case: Case) -> str:
    """What an operator does in the method, by its name and the sizes of its inputs."""
    if name.startswith("pst_kernels.cpu: "):
        return COMPILED
    if name.startswith("pst_kernels::") or "Backward" in name or name.startswith("autograd::"):
        return OUTSIDE  # our ops and autograd's nodes: their own time is Python and NumPy
    product = name.removesuffix("_")
    if product not in _OPERANDS:
        return ELEMENTWISE
    left, right = (shapes[place] for place in _OPERANDS[product])
    rows, depth, columns = left[0], left[1], right[1]
    if depth == case.tokens and min(rows, columns) > RANK_AT_MOST and columns == case.shape.columns:
        return G_GEMM
    if rows == case.tokens and max(depth, columns) > RANK_AT_MOST:
        return OTHER_GEMM
    if min(rows, columns) > RANK_AT_MOST:
        return G_GEMM if depth == case.tokens else RANK_PRODUCTS
    return REDUCTIONS


def _table(case: Case, profiles: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table(title=f"one step, ms: {case}")
    for name in ("pass", "of it", *profiles):
        table.add_column(name, justify="left" if name in ("pass", "of it") else "right")
    sums = dict.fromkeys(profiles, 0.0)
    for step in PASSES:
        kinds = {kind for passes in profiles.values() for kind in passes.get(step, {})} - {""}
        totals = [sum(passes.get(step, {}).values()) for passes in profiles.values()]
        for name, total in zip(profiles, totals, strict=True):
            sums[name] += total
        table.add_row(f"[bold]{step}[/bold]", "", *(f"[bold]{total:.2f}[/bold]" if total else "-" for total in totals))
        largest = sorted(kinds, key=lambda kind: -max(p.get(step, {}).get(kind, 0.0) for p in profiles.values()))
        for kind in largest:
            values = [passes.get(step, {}).get(kind, 0.0) for passes in profiles.values()]
            if max(values) >= 0.01 * max(totals):
                table.add_row("", kind, *(f"{value:.2f}" if value else "-" for value in values))
        table.add_section()
    table.add_row("[bold]step[/bold]", "", *(f"[bold]{total:.2f}[/bold]" for total in sums.values()))
    return table
