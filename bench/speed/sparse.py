"""`python -m bench sparse`: products that skip unstructured zeros, beside dense ones and other sparse loops, on a CPU.

Every product is checked against the dense one before it is timed. Runs are interleaved; ratios are medians over rounds
of this contestant's time over the dense one's in the same round, and the lowest time over the lowest dense time beside
them. On a machine that others use, `--own-time` measures with one thread what it computed itself, not how long it
waited.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pst_kernels.cpu.compiled.vectors import LANES
from pst_kernels.cpu.sparse_products import multiply, sampled
from pst_kernels.cpu.sparse_rows import SparseRows
from pst_kernels.layers.sparse_linear import SparseLinear
from pst_kernels.masks.packing import pack_mask

from ..baselines import onednn
from ..baselines.sparse_loops import SparseProp, multiply_adds
from ..tables.report import Report, measured_on
from . import sparse_steps
from .modes import minilm
from .sparse_row import (
    CSR,
    DENSE,
    INSTRUCTIONS,
    OURS,
    PROP,
    SHAPES,
    SPARSITIES,
    TOKENS,
    Budget,
    Clock,
    Row,
    Run,
    Runs,
    rows,
    seconds_of,
)

FEW = (1, 8)  # tokens
IN_TURN = 16  # layers of one shape
IN_USE = f"SparseLinear, {IN_TURN} in turn"
MODEL = ((16, 128), (1, 32), (1, 128))  # batch, length
MODEL_SPARSITY = 0.9
# of the kept weight's loop with 64 tokens: the value, and x once a vector; the offset is an integer's load
LOADS = {16: 5 / 4, 8: 9 / 8}[LANES]


def _cells(row: Row) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    peak = "-" if row.of_peak is None else f"{100 * row.of_peak:.0f} %"
    times = [f"{row.ms:.2f}", f"{row.dense_ms:.2f}", f"{row.ratio:.2f}", f"{row.lowest:.2f}"]
    return [row.case, row.what, f"{100 * row.sparsity:g} %", *times, number(row.csr), number(row.prop), peak]


REPORT = Report(
    "sparse", Row, "unstructured zeros: ratios to dense, interleaved",
    ("case", "product", "pruned", "ms", "dense, ms", "ratio", "of lowest", "torch CSR", "SparseProp's loop", "of peak"),
    _cells,
    lambda under: (
        f"{measured_on(under)} fp32 but where it says bf16, {INSTRUCTIONS}. Ratios to dense in the same round, medians;"
        " beside them the lowest time over the lowest dense one. Of peak: kept multiply-adds a second over those of a"
        f" loop in registers; the product's loop loads {LOADS:.2f} vectors a multiply-add and stores none."
    ),
)  # fmt: skip


PARTS = ("products", "steps", "least-steps", "bf16-steps", "model-step", "model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--own-time", action="store_true", help="one thread, and its processor time alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the results")
    REPORT.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    if options.own_time:
        torch.set_num_threads(1)
    budget = Budget(options.seconds, time.thread_time if options.own_time else time.perf_counter)
    parts = {
        "products": _product_rows, "steps": sparse_steps.layer_rows,
        "least-steps": sparse_steps.least_rows, "bf16-steps": sparse_steps.half_rows,
        "model-step": sparse_steps.model_rows, "model": _model_rows,
    }  # fmt: skip
    REPORT.run(options, lambda: [row for name in options.parts for row in parts[name](budget)])
    return 0


def _product_rows(budget: Budget) -> Iterator[Row]:
    peak = _peak_rate(budget.clock)
    for columns, out in SHAPES:
        if onednn.available():
            yield from _dense_rows((columns, out), peak, budget)
        for sparsity in SPARSITIES:
            yield from _of_shape((columns, out), sparsity, peak, budget)


def _dense_rows(shape: tuple[int, int], peak: float, budget: Budget) -> Iterator[Row]:
    """What another library's dense products take: the zeros have to pay beside these too."""
    columns, out = shape
    generator = torch.Generator().manual_seed(0)
    weight, x, gy = (
        torch.randn(*size, generator=generator) for size in ((out, columns), (TOKENS, columns), (TOKENS, out))
    )
    runs: dict[str, dict[str, Callable[[], Any]]] = {
        "y = x W^T": {DENSE: lambda: x @ weight.T, OURS: lambda: onednn.product(x, weight)},
        "dx = gy W": {DENSE: lambda: gy @ weight, OURS: lambda: onednn.product(gy, weight.T)},
        "G": {DENSE: lambda: gy.T @ x, OURS: lambda: onednn.product(gy.T, x.T)},
    }  # fmt: skip
    for what, contestants in runs.items():
        _check(what, contestants)
        work, case = weight.numel() * TOKENS / peak, f"{columns} -> {out}, T = {TOKENS}"
        yield from rows(case, {OURS: f"{what}, dense by oneDNN"}, 0.0, contestants, budget, work)


def _of_shape(shape: tuple[int, int], sparsity: float, peak: float, budget: Budget) -> Iterator[Row]:
    columns, out = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator)
    kept = torch.rand(out, columns, generator=generator) >= sparsity
    packed, masked = pack_mask(kept), weight * kept
    lists = SparseRows.from_mask(weight, packed)
    transposed, csr = lists.transpose(), masked.to_sparse_csr()
    its_csr, prop, its_prop = masked.T.to_sparse_csr(), SparseProp(csr), SparseProp(masked.T.to_sparse_csr())
    x, gy = (torch.randn(TOKENS, n, generator=generator) for n in (columns, out))
    runs: dict[str, dict[str, Callable[[], Any]]] = {
        "y = x W^T": {
            DENSE: lambda: x @ masked.T, OURS: lambda: multiply(x, lists), CSR: lambda: (csr @ x.T).T,
            PROP: lambda: prop(x),
        },
        "dx = gy W": {
            DENSE: lambda: gy @ masked, OURS: lambda: multiply(gy, transposed), CSR: lambda: (its_csr @ gy.T).T,
            PROP: lambda: its_prop(gy),
        },
        "G where kept": {DENSE: lambda: gy.T @ x, OURS: lambda: sampled(gy, x, lists)},
        "lists, over y": {DENSE: lambda: x @ masked.T, OURS: lambda: SparseRows.from_mask(weight, packed)},
        "lists of W^T, over y": {DENSE: lambda: x @ masked.T, OURS: lists.transpose},
    }  # fmt: skip
    for what, contestants in runs.items():
        if what != "lists, over y" and "W^T, over" not in what:
            _check(what, contestants, lists)
        work = None if "over" in what else len(lists.values) * TOKENS / peak
        yield from rows(f"{columns} -> {out}, T = {TOKENS}", {OURS: what}, sparsity, contestants, budget, work)
    dense_layers = [_of_weight(masked.clone()) for _ in range(IN_TURN)]
    layers = [SparseLinear.from_linear(layer) for layer in dense_layers]
    for tokens in FEW:
        few = x[:tokens].clone()
        _check(IN_USE, {DENSE: partial(dense_layers[0], few), OURS: partial(layers[0], few)}, lists)
        few_runs: Runs = {DENSE: _in_turn(dense_layers, few), OURS: _in_turn(layers, few)}
        yield from rows(f"{columns} -> {out}, T = {tokens}", {OURS: IN_USE}, sparsity, few_runs, budget.times(1 / 4))


def _of_weight(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(torch.zeros(len(weight)))
    return layer


def _in_turn(layers: Sequence[nn.Module], x: Tensor) -> Run:
    """As a model that decodes calls its layers: weights that no cache holds, code that they all hold."""

    @torch.inference_mode()
    def call() -> None:
        for layer in layers:
            layer(x)

    return Run(call, len(layers))


def _check(what: str, contestants: dict[str, Callable[[], Any]], lists: SparseRows | None = None) -> None:
    expected = contestants[DENSE]().detach().double()
    if what == "G where kept" and lists is not None:
        expected = expected[lists.places()]
    for name, run in contestants.items():
        if name == DENSE:
            continue
        error = float((run().detach() - expected).abs().max() / expected.abs().max())
        if not error < 1e-5:
            raise ValueError(f"{name} is off by {error:g} in {what}: nothing is timed for a wrong product")


def _peak_rate(clock: Clock) -> float:
    """Fused multiply-adds a second of as many cores as PyTorch uses, from one core's."""
    count = 20_000_000
    done = multiply_adds(count)
    return torch.get_num_threads() * done / min(seconds_of(lambda: multiply_adds(count), clock) for _ in range(200))


def _model_rows(budget: Budget) -> Iterator[Row]:
    dense: Any = minilm("cpu").eval()
    for layer in dense.bert.encoder.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight[_pruned(layer.weight)] = 0.0
    sparse = copy.deepcopy(dense)
    for name, layer in list(sparse.bert.encoder.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(sparse.bert.encoder.get_submodule(parent), child, SparseLinear.from_linear(layer))
    for batch, length in MODEL:
        tokens = torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(0))

        def forward(model: Any, tokens: Tensor = tokens) -> Tensor:
            with torch.no_grad():
                return model(input_ids=tokens).logits

        torch.testing.assert_close(forward(sparse), forward(dense), rtol=1e-3, atol=1e-4)
        contestants: Runs = {DENSE: partial(forward, dense), OURS: partial(forward, sparse)}
        yield from rows(
            f"MiniLM-L6, {batch} x {length}", {OURS: "forward"}, MODEL_SPARSITY, contestants, budget.times(2)
        )


def _pruned(weight: Tensor) -> Tensor:
    """The smallest by magnitude."""
    return weight.abs() < weight.abs().flatten().kthvalue(int(MODEL_SPARSITY * weight.numel())).values
