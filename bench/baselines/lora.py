"""Low-rank adaptation of a dense layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .takeover import frozen, with_parameters_of


def add_lora(layer: Any, rank: int, alpha: float) -> None:
    """Give a linear layer its factors, in the weight's dtype: A random, B = 0, and the scale alpha / rank."""
    layer.scale = alpha / rank
    new: Any = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    layer.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, **new))
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, **new))
    nn.init.kaiming_uniform_(layer.lora_A, a=5**0.5)


class LoRA(nn.Linear):
    """y = x W^T + (alpha / r) x A^T B^T + bias, W and the bias frozen.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685); no dropout,
    initialised as there: B = 0, A random.
    """

    scale: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @classmethod
    def from_linear(cls, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> LoRA:
        layer: LoRA = frozen(with_parameters_of(cls, base))
        add_lora(layer, rank, alpha)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) + linear(linear(x, self.lora_A), self.lora_B) * self.scale

    def expected(self, x: Tensor) -> Tensor:
        merged = self.weight + self.scale * self.lora_B @ self.lora_A
        return x @ merged.T + (0.0 if self.bias is None else self.bias)
