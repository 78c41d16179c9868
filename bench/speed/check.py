"""Is a provider right? Its output, gradients and mask against the method's formula in float64, before it is timed.

Weights and factors are small multiples of 1/64, so that scores are exact in fp32 and full of ties: the mask must then
equal that of a stable argsort bit for bit, where the provider promises so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pst_kernels import reference
from pst_kernels.masks import patterns

from .cases import Shape
from .providers import SPARSITY, Provider

OK = "ok"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # RMS(error) / RMS
# of a larger matrix the first rows are checked: all of it in float64 would take longer than the runs
MOST_WEIGHTS = 1 << 20
WHOLE_ROWS = 64  # as many as whole blocks have: torch's BSR product takes no others
TOKENS = 48


class _Expected(nn.Module):
    """A layer's formula in place of the layer."""

    def __init__(self, layer: nn.Module, provider: Provider, mask: Tensor | None):
        super().__init__()
        self.layer, self.provider, self.mask = layer, provider, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.provider.expected(self.layer, x, self.mask)


def fill(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter of the layer, W among them, values on a grid of 1/64 that keeps scores exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            grid = 64 if name == "weight" else 8
            values = torch.randint(-grid // 2, grid // 2 + 1, parameter.shape, generator=generator) / grid
            parameter.copy_(values)


def check_layer(provider: Provider, shape: Shape, dtype: torch.dtype, device: str) -> str:
    """ "ok", or what is wrong with the provider's layer of this shape and dtype."""
    rows = max(1, MOST_WEIGHTS // shape.columns)
    rows = min(shape.out, rows if rows < WHOLE_ROWS else rows // WHOLE_ROWS * WHOLE_ROWS)
    try:
        with provider.active():
            layer = provider.layer(nn.Linear(shape.columns, rows, device=device, dtype=dtype))
            fill(layer)
            wrong = _check_mask(provider, layer, dtype)
            x = _normal((TOKENS, shape.columns), 1).to(device, dtype)
            return wrong or check_module(provider, layer, lambda module, x: module(x), x)
    except Exception as error:  # whatever a provider does wrong is its result here, and the others' runs go on
        return f"raised {type(error).__name__}: {error}"


def check_steps(provider: Provider, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], device: str) -> str:
    """After steps of the optimizer that is timed, does a forward pass use the mask of the new factors?

    Otherwise the timed step would leave out the refresh. Learning rates here are large, so that a mask must change.
    """
    if provider.mask is None or provider.recomputed_mask is None:
        return OK
    with provider.active():
        blocks = 8 if isinstance(patterns.parse(provider.pattern), patterns.Blocks) else 1  # enough of them to change
        layer = provider.layer(nn.Linear(96 * blocks, 64 * blocks, device=device))
        optimizer = optimizer_of(layer)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        x = _normal((TOKENS, 96 * blocks), 1).to(device)
        layer(x)
        first = provider.mask(layer).clone()
        for _ in range(3 * provider.steps):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        used = provider.mask(layer).clone()
        expected = provider.recomputed_mask(layer)
    if torch.equal(expected, first):
        return f"{3 * provider.steps} large optimizer steps left the mask as it was"
    stale = int((used != expected).sum())
    name = f"{type(optimizer).__name__} (fused={optimizer.defaults.get('fused')})"
    return f"after steps of {name} the mask is stale at {stale} of {used.numel()} weights" if stale else OK


def check_module(provider: Provider, module: nn.Module, call: Callable[[Any, Any], Tensor], inputs: Any) -> str:
    """Compare `call(module, inputs)` and all gradients with the same module in float64 made of the formulas."""
    exact, parameters = _in_float64(provider, module)
    module.zero_grad()
    exact_inputs = inputs
    if inputs.is_floating_point():
        inputs = inputs.detach().requires_grad_()
        exact_inputs = inputs.detach().double().requires_grad_()
    y, expected = call(module, inputs), call(exact, exact_inputs)
    gradient = _normal(y.shape, 2).to(y.device, y.dtype)
    tolerance = TOLERANCE[y.dtype]
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {"y": (y, expected)}
    if provider.trains:
        y.backward(gradient)
        expected.backward(gradient.double())
        if inputs.is_floating_point():
            pairs["the gradient of x"] = inputs.grad, exact_inputs.grad
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                pairs[f"the gradient of {name}"] = parameter.grad, parameters[name].grad
    # some gradients are zero by nature, such as that of an attention's key bias: rounding is no error there
    floor = 1e-3 * max(exact_value.norm().item() for _, exact_value in pairs.values() if exact_value is not None)
    for what, (value, exact_value) in pairs.items():
        if value is None or exact_value is None:
            return f"{what} is missing"
        error = relative_error(value, exact_value, floor)
        allowed = max(tolerance, 4.0 * torch.finfo(value.dtype).eps)  # fp32 factors beside a float64 weight, say
        if not error <= allowed:  # a NaN fails too
            return f"{what} is off by {error:.1e} of its size, more than {allowed:.0e}"
    module.zero_grad()
    return OK


def relative_error(value: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """RMS of the error over that of the exact values, or over `floor` (a norm) if they are smaller."""
    value, exact = value.detach().double(), exact.detach().double()
    return (value - exact).norm().item() / max(exact.norm().item(), floor, 1e-300)


def _in_float64(provider: Provider, module: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    exact = copy.deepcopy(module).double()
    parameters = dict(exact.named_parameters())
    for name, layer in list(module.named_modules()):
        if isinstance(layer, provider.layer_type):
            mask = None if provider.mask is None else provider.mask(layer)
            formula = _Expected(exact.get_submodule(name), provider, mask)
            if not name:
                return formula, parameters
            parent, _, child = name.rpartition(".")
            setattr(exact.get_submodule(parent), child, formula)
    return exact, parameters


def _check_mask(provider: Provider, layer: nn.Module, dtype: torch.dtype) -> str:
    if provider.mask is None or provider.exact_scores is None:
        return ""
    mask = provider.mask(layer)
    scores = provider.exact_scores(copy.deepcopy(layer).double()).detach()
    pattern = patterns.parse(provider.pattern)
    shape = (scores.shape[0], scores.shape[1])
    num_pruned = pattern.num_pruned_at(shape, SPARSITY if pattern.sparsity is None else pattern.sparsity)
    if not pattern.fits(mask, num_pruned):
        wanted = pattern.weights_pruned(shape, num_pruned)
        wanted_text = f"{num_pruned} blocks" if wanted is None else str(wanted)
        return f"the mask prunes {int((~mask).sum())} weights instead of {wanted_text}"
    if provider.exact_ties:
        if type(pattern) is patterns.Unstructured:
            kept = reference.prune_mask(scores, num_pruned)
        else:  # compared with sorts in tests/test_patterns.py
            kept = pattern.keep(scores.float(), num_pruned)
        wrong = int((mask != kept).sum())
        return f"the mask differs from that of a stable sort at {wrong} weights" if wrong else ""
    excess = (scores[~mask].max() - scores[mask].min()).item()
    return "" if excess <= TOLERANCE[dtype] * scores.abs().max() else f"a pruned score is {excess:.1e} above a kept one"


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
