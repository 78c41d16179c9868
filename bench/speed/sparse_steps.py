"""Training steps of `python -m bench sparse`: dense, LoRA, and PST while its scores learn, rest, and after the freeze.

A step is forward, backward and AdamW over what trains. Mask and lists are made anew in every step, up to the freeze.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pst_kernels as pst
from pst_kernels.cpu.lists import LEAST_PRUNED

from ..baselines.lora import LoRA
from .modes import LEARNING_RATE, minilm, settled
from .sparse_row import DENSE, LORA, SHAPES, SPARSITIES, TOKENS, Budget, Row, Run, rows

INTERVAL = 4
BATCH, LENGTH = 16, 128
MODEL_CASE = f"MiniLM-L6, {BATCH} x {LENGTH}"
OF_MODEL = 0.9
LORA_STEP = "LoRA's training step"
EXACT, RESTED = "training step", f"training step, score_interval={INTERVAL}"
FROZEN, KEPT = "training step, mask fixed", "training step, mask fixed, kept weights trained"
SETTINGS: dict[str, dict[str, Any]] = {
    EXACT: {}, RESTED: {"score_interval": INTERVAL}, FROZEN: {"freeze": 0.2}, KEPT: {"train_kept": True},
}  # fmt: skip


# Of a layer with lists, and with M * W': where the former begin to pay, and in bf16, over a dense one in bf16
WAYS: dict[str, dict[str, Any]] = {
    "training step, lists": {"products": "sparse"}, "training step, M * W'": {"products": "dense"},
}  # fmt: skip
HALF_SPARSITIES = (0.5, 0.8, 0.9)
HALF_WAYS = {name.replace("step,", "step, bf16,"): settings for name, settings in WAYS.items()}

# A round of all contestants takes half a second for a layer and seven for a model: medians of three would be noise.
LAYER_SHARE, MODEL_SHARE = 2, 12


def layer_rows(budget: Budget) -> Iterator[Row]:
    for columns, out in SHAPES:
        for sparsity in SPARSITIES:
            runs = {name: _layer_run(name, (out, columns), sparsity) for name in (DENSE, LORA, *SETTINGS)}
            case = f"{columns} -> {out}, T = {TOKENS}"
            # LoRA has no zeros: one row of it is enough
            what = {LORA: LORA_STEP} if sparsity == SPARSITIES[0] else {}
            yield from rows(case, what | {name: name for name in SETTINGS}, sparsity, runs, budget.times(LAYER_SHARE))


def least_rows(budget: Budget) -> Iterator[Row]:
    yield from _way_rows(WAYS, (LEAST_PRUNED,), torch.float32, budget)


def half_rows(budget: Budget) -> Iterator[Row]:
    yield from _way_rows(HALF_WAYS, HALF_SPARSITIES, torch.bfloat16, budget)


def _way_rows(ways: Iterable[str], sparsities: Sequence[float], dtype: torch.dtype, budget: Budget) -> Iterator[Row]:
    for columns, out in SHAPES:
        for sparsity in sparsities:
            runs = {name: _layer_run(name, (out, columns), sparsity, dtype) for name in (DENSE, *ways)}
            yield from rows(f"{columns} -> {out}, T = {TOKENS}", {name: name for name in ways}, sparsity, runs, budget)


def _layer_run(name: str, shape: tuple[int, int], sparsity: float, dtype: torch.dtype = torch.float32) -> Run:
    out, columns = shape
    torch.manual_seed(0)
    base = nn.Linear(columns, out, dtype=dtype)
    layer: Any = base
    if name == LORA:
        layer = settled(LoRA.from_linear(base))
    elif name != DENSE:
        settings = (SETTINGS | WAYS | HALF_WAYS)[name]
        layer = settled(pst.PSTLinear.from_linear(base, pst.PSTConfig(sparsity=sparsity, **settings)))
        if layer.config.freeze:
            layer.freeze_mask()
    x = torch.randn(TOKENS, columns, dtype=dtype, requires_grad=True)  # as in the middle of a model
    gy = torch.randn(TOKENS, out, dtype=dtype) / TOKENS
    return _steps(layer, lambda: layer(x).backward(gy), name)


def minilm_and_loss() -> tuple[Any, Callable[[Any], Tensor]]:
    """The dense model in training mode, and the loss of any form of it on one batch."""
    dense: Any = minilm("cpu").train()
    tokens = torch.randint(1000, 30000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(BATCH) % dense.config.num_labels
    return dense, lambda model: model(input_ids=tokens, labels=labels).loss


def model_rows(budget: Budget) -> Iterator[Row]:
    """The whole of MiniLM, with its embeddings and head."""
    dense, loss = minilm_and_loss()
    runs = {DENSE: _model_run(DENSE, dense, loss)}
    for name in SETTINGS:
        runs[name] = _model_run(name, copy.deepcopy(dense), loss)
    what = {name: f"whole {name}" for name in SETTINGS}
    yield from rows(MODEL_CASE, what, OF_MODEL, runs, budget.times(MODEL_SHARE))


def _model_run(name: str, model: Any, loss: Callable[[Any], Tensor]) -> Run:
    if name != DENSE:
        pst.replace_linear(model, pst.PSTConfig(sparsity=OF_MODEL, **SETTINGS[name]))
        for layer in model.modules():
            if isinstance(layer, pst.PSTLinear):
                settled(layer)
                if layer.config.freeze:
                    layer.freeze_mask()
    return _steps(model, lambda: loss(model).backward(), name)


def _steps(module: nn.Module, run: Callable[[], Any], name: str) -> Run:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE)
    steps = INTERVAL if name == RESTED else 1

    def call() -> None:
        for _ in range(steps):
            run()
            optimizer.step()
            optimizer.zero_grad()

    return Run(call, steps)
