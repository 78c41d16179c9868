"""Gradual magnitude pruning (MaP)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from .sparse import SparseLayer
from .takeover import with_parameters_of


class Magnitude(SparseLayer):
    """y = x (M * W)^T + bias, M keeps the largest |W| of the trained W; dW = G * M, nothing through the mask.

    A pruned weight gets no gradient but keeps its value, and comes back when others shrink below it.

    Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression" (arXiv
    1710.01878), as the baseline MaP of Li et al., IJCAI 2022.
    """

    @classmethod
    def from_linear(cls, base: nn.Linear, sparsity: float = 0.9) -> Magnitude:
        layer: Magnitude = with_parameters_of(cls, base)
        layer.final_sparsity = sparsity
        layer.go_to(1.0)
        return layer

    def scores(self) -> Tensor:
        return self.weight.abs()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.mask() * self.weight, self.bias)
