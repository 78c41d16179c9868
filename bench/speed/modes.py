"""What a provider does in each mode: the run that is timed, what is made ready before it, and the bytes it holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pst_kernels import functional, ops
from pst_kernels.operands import Scales

from .cases import Case, Shape
from .providers import OURS, RELEASED, SPARSITY, Provider

KTHVALUE = "torch.kthvalue"
PARTITION = "np.partition"
COLD, WARM = f"{OURS} cold", f"{OURS} warm"
THRESHOLD_SPARSITY = 0.5
LEARNING_RATE = 1e-4
LABELS = 5  # of the whole-model case, as many as BBC News has


@dataclass
class Task:
    """`run` is timed, `prepare` comes before each run. The rest is measured once, apart from the timing."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    forward: Callable[[], Any] | None = None  # for the bytes kept for backward
    known: Callable[[], list[Tensor]] = list  # what those do not count: the input and the parameters
    clear: Callable[[], Any] | None = None  # drops gradients, so that the peak counts them as the run's own
    optimizer: torch.optim.Optimizer | None = None
    module: nn.Module | None = None
    steps: int = 1  # optimizer steps that a run takes

    def parameter_bytes(self) -> int | None:
        """Of parameters and buffers, trained or not, each storage once."""
        if self.module is None:
            return None
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def trainable(self) -> int | None:
        return None if self.module is None else sum(p.numel() for p in self.module.parameters() if p.requires_grad)


def adamw(module: nn.Module, kind: str) -> torch.optim.AdamW:
    """AdamW over what trains; "fused" is PyTorch's fastest, and what the Hugging Face Trainer takes by default."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=kind == "fused" or None)


def settled(layer: nn.Module) -> nn.Module:
    """Factors as in the middle of training: none is zero any more, so that no product is trivially skipped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name not in ("weight", "bias"):
                values = torch.randn(parameter.shape, generator=generator)
                scale = 1.0 if name.endswith(("_U", "_A")) else 1e-3
                parameter.copy_(scale * values)
    return layer


def base_linear(shape: Shape, dtype: torch.dtype, device: str) -> nn.Linear:
    linear = nn.Linear(shape.columns, shape.out)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        linear.weight.copy_(0.04 * torch.randn(linear.weight.shape, generator=generator))
    return linear.to(device, dtype)


def layer_task(provider: Provider, case: Case, device: str, adamw_kind: str) -> Task | None:
    """The task of a provider in a layer mode, None where it has no part in it."""
    if not provider.trains and case.mode != "forward":
        return None
    with provider.active():
        layer = settled(provider.layer(base_linear(case.shape, case.dtype, device)))
        if case.mode == "mask":
            task = _mask_task(provider, layer, case.shape)
        else:
            task = _run_task(layer, case, adamw_kind, provider.steps)
    return None if task is None else _under(provider, task)


def _under(provider: Provider, task: Task) -> Task:
    """Every call inside `provider.active()`."""

    def active(call: Callable[[], Any] | None) -> Callable[[], Any] | None:
        def inside() -> Any:
            with provider.active():
                return call() if call is not None else None

        return None if call is None else inside

    if provider.backend is None:
        return task
    return dataclasses.replace(
        task, run=active(task.run) or task.run, prepare=active(task.prepare), forward=active(task.forward)
    )  # fmt: skip


def _run_task(layer: nn.Module, case: Case, adamw_kind: str, steps: int) -> Task:
    like: Tensor = layer.weight  # type: ignore[assignment]
    x = torch.randn(case.tokens, case.shape.columns).to(like).requires_grad_()  # as in the middle of a model
    gy = torch.randn(case.tokens, case.shape.out).to(like) / case.tokens
    optimizer = adamw(layer, adamw_kind) if case.mode == "step" else None
    kept: list[Tensor] = []

    def clear() -> None:
        x.grad = None
        layer.zero_grad()

    def forward() -> Tensor:
        return layer(x)

    def before_backward() -> None:
        clear()
        kept[:] = [layer(x)]

    def backward() -> None:
        kept.pop().backward(gy)

    def step() -> None:
        for _ in range(steps):
            clear()
            layer(x).backward(gy)
            if optimizer is not None:
                optimizer.step()

    runs = {"forward": (forward, None), "backward": (backward, before_backward), "step": (step, None)}
    run, prepare = runs[case.mode]
    forward()  # the first mask, outside of all timing
    task = Task(run, prepare, known=lambda: [x, *layer.parameters()], clear=clear, module=layer)
    if case.mode == "step":
        task.forward, task.optimizer, task.steps = forward, optimizer, steps
    return task


def _mask_task(provider: Provider, layer: Any, shape: Shape) -> Task | None:
    if provider.mask is None:
        return None
    # force: with a mask interval it would not be due
    refresh = layer.mask if provider.name == RELEASED else functools.partial(layer.refresh_mask, provider.steps > 1)
    refresh()
    return Task(refresh, prepare=_nudge(layer), module=layer)


def _nudge(layer: nn.Module) -> Callable[[], None]:
    """Moves every factor as far as a step of AdamW does: the learning rate, up or down."""
    factors = [p for p in layer.parameters() if p.requires_grad]

    @torch.no_grad()
    def nudge() -> None:
        for factor in factors:
            factor.add_(torch.randint_like(factor, 0, 2).mul_(2.0).sub_(1.0), alpha=LEARNING_RATE)

    return nudge


def threshold_tasks(case: Case, device: str) -> dict[str, Task]:
    """The k-th smallest of as many scores as the shape has weights; warm: a layer's own threshold from its last one.

    The warm selection computes its scores from W and the factors, and writes the packed mask beside the threshold.
    """
    layer: Any = settled(_ours_layer(case, device))
    weight, factors = layer.weight, layer.factors
    scores = functional.scores(weight, *factors).detach()
    k = int(scores.numel() * THRESHOLD_SPARSITY)
    guess, num_pruned = functional.new_guess(weight.device), torch.tensor(k, device=weight.device)

    @torch.no_grad()
    def warm() -> Tensor:
        return ops.prune_mask(weight, *factors, *Scales(), num_pruned, guess, "unstructured")

    tasks = {KTHVALUE: Task(lambda: torch.kthvalue(scores.view(-1), k))}
    if device == "cpu":
        array = scores.view(-1).numpy()
        tasks[PARTITION] = Task(lambda: np.partition(array, k - 1)[k - 1])
    tasks[RELEASED] = Task(lambda: torch.argsort(scores.view(-1))[:k])
    tasks[COLD] = Task(lambda: functional.kth_value(scores, k))
    tasks[WARM] = Task(warm, prepare=_nudge(layer))
    return tasks


def check_threshold(name: str, case: Case, task: Task, device: str) -> str:
    """ "ok" if the threshold task finds the k-th score: its value, and for ours the tie rule and the exact count."""
    scores = torch.randint(-40, 40, (30011,), generator=torch.Generator().manual_seed(0)).float().to(device)
    k = int(scores.numel() * THRESHOLD_SPARSITY)
    order = torch.argsort(scores, stable=True)
    if name == COLD:
        value, index = functional.kth_value(scores, k)
        return "ok" if value == scores[order[k - 1]] and index == order[k - 1] else "not the k-th of a stable sort"
    if name == WARM:
        kept = functional.unpack_mask(task.run(), case.shape.columns)
        pruned = int((~kept).sum())
        return "ok" if pruned == int(kept.numel() * THRESHOLD_SPARSITY) else f"prunes {pruned} weights"
    return "ok"  # PyTorch's and NumPy's own


def _ours_layer(case: Case, device: str) -> nn.Module:
    from pst_kernels import PSTConfig, PSTLinear

    return PSTLinear.from_linear(base_linear(case.shape, case.dtype, device), PSTConfig(sparsity=SPARSITY))


def minilm(device: str, *, layers: int = 6, vocabulary: int = 30522) -> nn.Module:
    """A sequence classifier of MiniLM-L6's architecture, of random weights: their values change no timing."""
    import transformers

    bert: Any = transformers  # its annotations reject keyword arguments that every config takes
    torch.manual_seed(0)
    config = bert.BertConfig(
        vocab_size=vocabulary, hidden_size=384, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=1536, num_labels=LABELS,
    )  # fmt: skip
    return bert.BertForSequenceClassification(config).to(device)


def settle_layers(model: nn.Module, provider: Provider) -> None:
    layers: list[Any] = [m for m in model.modules() if isinstance(m, provider.layer_type)]
    for layer in layers:
        settled(layer)


def model_task(provider: Provider, device: str, adamw_kind: str, batch: int = 16, length: int = 128) -> Task:
    """A training step of the whole model: mask, forward with dropout, backward, AdamW over what trains."""
    with provider.active():
        model: Any = provider.model(minilm(device)).train()
        settle_layers(model, provider)
    optimizer = adamw(model, adamw_kind)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 30000, (batch, length), generator=generator).to(device)
    labels = torch.randint(0, LABELS, (batch,), generator=generator).to(device)

    def forward() -> Tensor:
        return model(input_ids=tokens, labels=labels).loss

    def step() -> None:
        for _ in range(provider.steps):
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

    task = Task(
        step, None, forward, lambda: [tokens, labels, *model.parameters()], optimizer.zero_grad, optimizer, model,
        provider.steps,
    )  # fmt: skip
    return _under(provider, task)
