"""`python -m bench host`: what a GPU step asks of the host, counted and timed without a GPU.

Triton gets a driver whose launches do nothing (tests/triton/silent_driver.py), and the layers that are timed are so
narrow that the library's products, which run on the CPU here, cost next to nothing: what remains is Python, dispatch
and Triton's own launch path. Launches are counted on wider layers, whose masks are searched as those of wide ones are:
those of our kernels, and the operators of the library that compute, of which each is one launch or more. The layer
lists are those of the models; the optimizer is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pst_kernels as pst

from ..baselines import LoRA
from ..tables.report import Report, measured_on

TIMED, COUNTED = 32, 192  # widths
TOKENS, ARCHITECTURE = 16, "sm_90"
# Layers of a block as (out, in) in units of a width, how many blocks
MODELS: dict[str, tuple[tuple[tuple[float, float], ...], int]] = {
    "BERT-base": (((1, 1), (1, 1), (1, 1), (1, 1), (4, 1), (1, 4)), 12),
    "GPT-2 medium": (((3, 1), (1, 1), (4, 1), (1, 4)), 24),
    "Llama-8B": (((1, 1), (0.25, 1), (0.25, 1), (1, 1), (3.5, 1), (3.5, 1), (1, 3.5)), 32),
}
DENSE, LORA, KEEP, REMAKE = "dense", "LoRA", "PST, keep", "PST, remake"
LAUNCH_US = 3.0  # of the driver, which is not in the times: 2 to 4 us


@dataclasses.dataclass
class Row:
    """One way to train one model's linear layers. Times are of one thread's processor, medians over rounds."""

    model: str
    provider: str
    layers: int
    ours: float  # launches of our kernels a layer: forward and backward
    library: float  # operators of the library that compute, a layer
    masks: int  # launches for all masks of a step
    layer_us: float  # forward and backward of one layer
    masks_us: float  # all masks, a layer
    step_ms: float  # of the whole model
    ratio: float  # of layer_us to dense's

    @property
    def with_driver_us(self) -> float:
        """Of one layer in a step, the driver's part of the launches with it."""
        launches = self.ours + self.library + self.masks / self.layers
        return self.layer_us + self.masks_us + LAUNCH_US * launches


REPORT = Report(
    "host", Row, "host side of a GPU step, without the optimizer",
    ("model", "provider", "layers", "our launches a layer", "library operators", "launches, all masks", "layer, us",
     "to dense", "masks a layer, us", "model step, ms"),
    lambda row: [
        row.model, row.provider, str(row.layers), f"{row.ours:.1f}", f"{row.library:.1f}", str(row.masks),
        f"{row.layer_us:.0f}", f"{row.ratio:.2f}", f"{row.masks_us:.1f}", f"{row.step_ms:.1f}",
    ],
    lambda under: (
        f"{measured_on(under)} Triton with a driver that launches nothing, for {ARCHITECTURE}; fp32 layers of width"
        f" {TIMED}, {TOKENS} tokens, one thread's processor time, medians. The driver's 2 to 4 us a launch come on top."
    ),
)  # fmt: skip


def silent(arch: int) -> Any:
    """tests/triton/silent_driver.py's context. Tests are no package; their folders are looked in for its imports."""
    tests = Path(__file__).resolve().parents[2] / "tests"
    if not (tests / "triton" / "silent_driver.py").is_file():
        raise FileNotFoundError(f"{tests}/triton/silent_driver.py is missing; run this in a clone of the repository")
    before = list(sys.path)
    sys.path[:0] = [str(tests), str(tests / "triton")]
    try:
        return importlib.import_module("silent_driver").silent(arch)
    finally:
        sys.path[:] = before


def linears(model: str, width: int, blocks: int | None = None) -> nn.ModuleList:
    """The linear layers of a model, narrow; of so many of its blocks, or all."""
    shapes, count = MODELS[model]
    wide = [(int(width * out), int(width * columns)) for out, columns in shapes]
    return nn.ModuleList(nn.Linear(columns, out) for _ in range(blocks or count) for out, columns in wide)


def converted(provider: str, layers: nn.ModuleList) -> nn.ModuleList:
    if provider == DENSE:
        return layers
    if provider == LORA:
        made = nn.ModuleList(LoRA.from_linear(layer) for layer in layers)  # type: ignore[arg-type]
        return made
    way = provider.removeprefix("PST, ")
    return pst.replace_linear(  # type: ignore[return-value]
        layers, pst.PSTConfig(target_modules=r"\d+", modules_to_save=(), masked_weight=way)
    )


class Operators(TorchDispatchMode):
    """Counts what the library computes: no views, no allocations, none of our own ops."""

    ALLOCATE = ("empty", "detach", "_unsafe_view", "set_")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("aten::") and not func.is_view and not name[6:].startswith(self.ALLOCATE):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Training:
    """Forward and backward of all layers, each with an input of its own that wants a gradient."""

    def __init__(self, provider: str, model: str, width: int, blocks: int | None) -> None:
        torch.manual_seed(0)
        self.layers = converted(provider, linears(model, width, blocks))
        self.called: list[Any] = list(self.layers)
        self.ours = provider in (KEEP, REMAKE)
        self.inputs = [torch.randn(TOKENS, layer.in_features, requires_grad=True) for layer in self.called]
        self.ones = {layer.out_features: torch.ones(TOKENS, layer.out_features) for layer in self.called}

    def forget(self) -> None:
        """The gradients, as an optimizer does between two steps."""
        for tensor in (*self.inputs, *self.layers.parameters()):
            tensor.grad = None

    def step(self) -> None:
        outputs: list[Tensor] = [layer(x) for layer, x in zip(self.called, self.inputs, strict=True)]
        torch.autograd.backward(outputs, [self.ones[y.shape[1]] for y in outputs])

    def masks(self) -> None:
        if self.ours:
            pst.refresh_masks(self.layers)

    def launches(self, counter: Counter[str]) -> tuple[float, float, int]:
        """Of a layer's step: ours, and the library's operators; and those of all masks."""
        count = len(self.called)
        self.step()
        self.masks()
        self.forget()
        counter.clear()
        self.step()
        ours = sum(counter.values()) / count
        self.forget()
        with Operators() as operators:
            self.step()
        counter.clear()
        self.masks()
        return ours, operators.count / count, sum(counter.values())


def rows(rounds: int, blocks: int | None = None) -> Iterator[Row]:
    """Of every model and provider, interleaved."""
    with _environment(), silent(int(ARCHITECTURE.removeprefix("sm_"))) as counter:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.autograd.set_multithreading_enabled(False):
                for model in MODELS:
                    yield from _of_model(model, rounds, blocks, counter)
        finally:
            torch.set_num_threads(threads)


def _of_model(model: str, rounds: int, blocks: int | None, counter: Counter[str]) -> Iterator[Row]:
    names = (DENSE, LORA, KEEP, REMAKE)
    counted = {name: Training(name, model, COUNTED, 1).launches(counter) for name in names}
    trainings = {name: Training(name, model, TIMED, blocks) for name in names}
    for training in trainings.values():
        training.step()
        training.masks()
    steps: dict[str, list[float]] = {name: [] for name in trainings}
    masks: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            training.forget()
            steps[name].append(_seconds(training.step))
            masks[name].append(_seconds(training.masks))
    dense = statistics.median(steps[DENSE])
    for name, training in trainings.items():
        count = len(training.called)
        step, refresh = statistics.median(steps[name]), statistics.median(masks[name])
        refresh = refresh if training.ours else 0.0
        yield Row(
            model, name, count, *counted[name], round(1e6 * step / count, 2), round(1e6 * refresh / count, 2),
            round(1e3 * (step + refresh), 3), round(step / dense, 3),
        )  # fmt: skip


def _seconds(run: Callable[[], None]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Triton's kernels for CPU tensors, as for the architecture."""
    wanted = {"PST_KERNELS_BACKEND": "triton", "PST_KERNELS_ARCH": ARCHITECTURE}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def of_shape(folder: Path, shape: str) -> dict[str, float]:
    """Host time of a layer in a step by provider, us, the driver's part with it, of the model that a shape's name
    begins with; empty where nothing was measured.
    """
    path = folder / f"{REPORT.name}.json"
    if not path.is_file():
        return {}
    return {row.provider: row.with_driver_us for row in REPORT.read(path)[0] if shape.startswith(row.model)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="of which the median counts")
    REPORT.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    REPORT.run(options, lambda: list(rows(options.rounds)))
    return 0
