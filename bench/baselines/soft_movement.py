"""Soft movement pruning: a threshold instead of a target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .sparse import SparseLayer
from .takeover import with_parameters_of

FINAL_THRESHOLD = 0.1


class SoftMovement(SparseLayer):
    """y = x (M * W)^T + bias, M = [sigmoid(S) > tau], S initially 0, tau from 0 to 0.1.

    Straight-through: dS = G * W, dW = G * M, and the penalty's part of dS, lambda * sigmoid'(S) / numel. How sparse the
    layer gets follows from lambda, not from a target.

    Source: Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020 (arXiv 2005.07683),
    without the floor of 0.5 % kept weights that their code sets.
    """

    mask_scores: nn.Parameter
    threshold: float

    @classmethod
    def from_linear(cls, base: nn.Linear) -> SoftMovement:
        layer: SoftMovement = with_parameters_of(cls, base)
        layer.mask_scores = nn.Parameter(torch.zeros_like(base.weight))
        layer.go_to(1.0)
        return layer

    def go_to(self, progress: float) -> None:
        self.threshold = FINAL_THRESHOLD * progress

    def scores(self) -> Tensor:
        return self.mask_scores

    def penalty(self) -> Tensor:
        return torch.sigmoid(self.mask_scores).mean()

    @torch.no_grad()
    def mask(self) -> Tensor:
        return torch.sigmoid(self.mask_scores) > self.threshold

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, _StraightThroughThreshold.apply(self.mask_scores, self.threshold) * self.weight, self.bias)


class _StraightThroughThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float) -> Tensor:
        return (torch.sigmoid(scores) > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
