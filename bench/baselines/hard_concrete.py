"""L0 regularisation by hard concrete gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .sparse import SparseLayer
from .takeover import with_parameters_of

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2.0 / 3.0
INITIAL = 2.197  # sigmoid = 0.9


class HardConcrete(SparseLayer):
    """y = x (z * W)^T + bias, z = clamp(s (HIGH - LOW) + LOW, 0, 1), s = sigmoid((logit(u) + S) / TEMPERATURE).

    u is uniform noise, drawn at every training forward; in evaluation s = sigmoid(S). With D = G * W and Z for
    0 < z < 1: dS = D * Z (HIGH - LOW) s (1 - s) / TEMPERATURE, dW = G * z. The penalty is the expected share of gates
    that are not 0, mean sigmoid(S - TEMPERATURE log(-LOW / HIGH)).

    Source: Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018 (arXiv
    1712.01312); a gate a weight, and the initial value, as the baseline of Sanh et al., NeurIPS 2020.
    """

    gate_scores: nn.Parameter

    @classmethod
    def from_linear(cls, base: nn.Linear) -> HardConcrete:
        layer: HardConcrete = with_parameters_of(cls, base)
        layer.gate_scores = nn.Parameter(torch.full_like(base.weight, INITIAL))
        return layer

    def go_to(self, progress: float) -> None:
        """Nothing moves but the penalty's factor, which is the caller's."""

    def scores(self) -> Tensor:
        return self.gate_scores

    def penalty(self) -> Tensor:
        return torch.sigmoid(self.gate_scores - TEMPERATURE * math.log(-LOW / HIGH)).mean()

    def gates(self, noise: Tensor | None = None) -> Tensor:
        """z (out, in) for `noise` u, or those of evaluation."""
        if noise is None:
            s = torch.sigmoid(self.gate_scores)
        else:
            s = torch.sigmoid((torch.logit(noise) + self.gate_scores) / TEMPERATURE)
        return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

    @torch.no_grad()
    def mask(self) -> Tensor:
        return self.gates() > 0.0

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.empty_like(self.gate_scores).uniform_(1e-6, 1.0 - 1e-6) if self.training else None
        return linear(x, self.gates(noise) * self.weight, self.bias)
