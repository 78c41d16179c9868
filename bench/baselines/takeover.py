"""A layer of another class around the very Parameters of an nn.Linear."""

from __future__ import annotations

from typing import Any

from torch import nn


def with_parameters_of(cls: Any, base: nn.Linear) -> Any:
    layer = cls(base.in_features, base.out_features, base.bias is not None, device="meta")
    layer.weight, layer.bias = base.weight, base.bias
    return layer.train(base.training)


def frozen(layer: Any) -> Any:
    return layer.requires_grad_(False)
