"""Movement pruning (MvP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .sparse import SparseLayer, StraightThroughTop
from .takeover import with_parameters_of


class Movement(SparseLayer):
    """y = x (M * W)^T + bias, M keeps the largest entries of a free score matrix S, initially 0.

    Straight-through: dS = G * W, dW = G * M.

    Source: Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020 (arXiv 2005.07683).
    """

    mask_scores: nn.Parameter

    @classmethod
    def from_linear(cls, base: nn.Linear, sparsity: float = 0.9) -> Movement:
        layer: Movement = with_parameters_of(cls, base)
        layer.mask_scores = nn.Parameter(torch.zeros_like(base.weight))
        layer.final_sparsity = sparsity
        layer.go_to(1.0)
        return layer

    def scores(self) -> Tensor:
        return self.mask_scores

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, StraightThroughTop.apply(self.mask_scores, self.num_pruned) * self.weight, self.bias)
