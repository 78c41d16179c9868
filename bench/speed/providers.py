"""Who takes part: dense training, LoRA, the released PST and ours, as layers, as whole models, and what each expects.

The one place that benchmark, correctness check and tests import them from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import pst_kernels as pst
from pst_kernels import env, reference
from pst_kernels.model import modules_to_save
from pst_kernels.targets import find_targets

from ..baselines import Dense, LoRA, ReleasedPST

DENSE = "dense"
RELEASED = "PST released"
OURS = "PST"
SPARSITY = 0.9


@dataclass(frozen=True)
class Provider:
    """A way to train a linear layer.

    `layer` makes a trainable layer of an nn.Linear, `model` converts a whole model in place. `expected(layer, x, mask)`
    is y as a differentiable function, `mask` and `exact_scores` are the learned mask (bool) and the scores that decide
    it, None for a method without one. `exact_ties`: equal scores must be pruned by the rule of pst_kernels, not in any
    order. `trains` is False for one that has a forward alone.
    """

    name: str
    layer: Callable[[nn.Linear], nn.Module]
    model: Callable[[nn.Module], nn.Module]
    layer_type: type
    expected: Callable[[Any, Tensor, Any], Tensor]
    mask: Callable[[Any], Tensor] | None = None
    recomputed_mask: Callable[[Any], Tensor] | None = None  # whatever the layer believes of its mask's age
    exact_scores: Callable[[Any], Tensor] | None = None
    exact_ties: bool = False
    backend: str | None = None  # value of PST_KERNELS_BACKEND it runs under
    sort_seconds_per_weight: float = 0.0  # rough, on a CPU: cases where it would take minutes are cut
    pattern: str = "unstructured"  # of the mask
    steps: int = 1  # optimizer steps from one mask to the next
    trains: bool = True

    @property
    def ours(self) -> bool:
        return self.backend is not None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, ours runs on this provider's backend."""
        before = os.environ.get("PST_KERNELS_BACKEND")
        if self.backend is not None:
            os.environ["PST_KERNELS_BACKEND"] = self.backend
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("PST_KERNELS_BACKEND", None)
            else:
                os.environ["PST_KERNELS_BACKEND"] = before


def _replace(convert: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Convert the layers that PST would convert, freeze the rest but the head: the same layers for every provider."""

    def model_of(model: nn.Module) -> nn.Module:
        config = pst.PSTConfig()
        targets, saved = find_targets(model, config), modules_to_save(model, config)
        model.requires_grad_(False)
        for name, linear in targets.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, convert(linear))
        for name in saved:
            model.get_submodule(name).requires_grad_(True)
        return model

    return model_of


def _dense_model(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def _pst_scales(layer: Any) -> dict[str, Any]:
    return {"beta": layer.config.beta, "alpha1": layer.config.alpha1, "alpha2": layer.config.alpha2}


def pst_expected(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    U, V, A, B, R, C = layer.factors
    return reference.pst_linear(
        x, layer.oriented_weight, layer.bias, U, V, A, B, R, C, mask, **_pst_scales(layer),
        through_magnitude=layer.config.through_magnitude,
    )  # fmt: skip


def _pst_exact_scores(layer: Any) -> Tensor:
    return reference.scores(layer.oriented_weight, *layer.factors, **_pst_scales(layer))


def _recomputed_mask(layer: Any) -> Tensor:
    layer.refresh_mask(force=True)
    return layer.mask


def ours(
    name: str, backend: str, config: pst.PSTConfig, expected: Callable[[Any, Tensor, Any], Tensor] = pst_expected
) -> Provider:
    """PST with these settings."""
    return Provider(
        name, lambda linear: pst.PSTLinear.from_linear(linear, config), lambda model: pst.replace_linear(model, config),
        pst.PSTLinear, expected, lambda layer: layer.mask, _recomputed_mask, _pst_exact_scores, exact_ties=True,
        backend=backend, pattern=config.pattern, steps=config.mask_interval,
    )  # fmt: skip


def all_providers(device: str) -> list[Provider]:
    """Those that can run on a device, dense first; sparse_providers.py has more."""
    config = pst.PSTConfig(sparsity=SPARSITY)
    providers = [
        Provider(DENSE, Dense.from_linear, _dense_model, nn.Linear, lambda layer, x, _: Dense.expected(layer, x)),
        Provider("LoRA", LoRA.from_linear, _replace(LoRA.from_linear), LoRA, lambda layer, x, _: layer.expected(x)),
        Provider(
            RELEASED, ReleasedPST.from_linear, _replace(ReleasedPST.from_linear), ReleasedPST,
            lambda layer, x, mask: layer.expected(x, mask), lambda layer: layer.mask(), lambda layer: layer.mask(),
            lambda layer: layer.exact_scores(), sort_seconds_per_weight=2.5e-7,
        ),
        ours(f"{OURS} (torch)", "torch", config),
    ]  # fmt: skip
    if device == "cuda" and env.has_triton():
        providers.append(ours(f"{OURS} (triton)", "triton", config))
    return providers
