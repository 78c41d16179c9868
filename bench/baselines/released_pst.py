"""PST as its authors released it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pst_kernels import reference

from .takeover import frozen, with_parameters_of


class ReleasedPST(nn.Linear):
    """PST as its authors released it: an argsort of the whole score matrix on every forward, autograd for the rest.

    Source: Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", IJCAI 2022 (arXiv
    2205.11005), written anew from the formulas. Two things are kinder than the release: factors have the weight's dtype
    and device, and nothing but the factors (and, in a whole model, the head) gets a gradient.
    """

    num_pruned: int
    beta: float
    alpha1: float
    alpha2: float
    weight_U: nn.Parameter
    weight_V: nn.Parameter
    mask_scores_A: nn.Parameter
    mask_scores_B: nn.Parameter
    mask_scores_R: nn.Parameter
    mask_scores_C: nn.Parameter

    @classmethod
    def from_linear(
        cls, base: nn.Linear, sparsity: float = 0.9, weight_rank: int = 8, score_rank: int = 8,
        beta: float = 1.0, alpha1: float = 1.0, alpha2: float = 1.0,
    ) -> ReleasedPST:  # fmt: skip
        layer: ReleasedPST = frozen(with_parameters_of(cls, base))
        layer.num_pruned = int(base.weight.numel() * sparsity)
        layer.beta, layer.alpha1, layer.alpha2 = beta, alpha1, alpha2
        new: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        layer.weight_U = nn.Parameter(torch.randn(base.out_features, weight_rank, **new))
        layer.weight_V = nn.Parameter(torch.zeros(weight_rank, base.in_features, **new))
        layer.mask_scores_A = nn.Parameter(torch.randn(base.out_features, score_rank, **new))
        layer.mask_scores_B = nn.Parameter(torch.zeros(score_rank, base.in_features, **new))
        layer.mask_scores_R = nn.Parameter(torch.zeros(base.out_features, 1, **new))
        layer.mask_scores_C = nn.Parameter(torch.zeros(1, base.in_features, **new))
        return layer

    def updated_weight(self) -> Tensor:
        return self.weight + self.beta * self.weight_U @ self.weight_V

    def scores(self, updated: Tensor) -> Tensor:
        learned = self.alpha1 * self.mask_scores_A @ self.mask_scores_B
        return updated.abs() + learned + self.alpha2 * (self.mask_scores_R + self.mask_scores_C)

    def forward(self, x: Tensor) -> Tensor:
        updated = self.updated_weight()
        mask = _TopMask.apply(self.scores(updated), self.num_pruned)
        return linear(x, mask * updated, self.bias)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """bool (out, in), True for kept weights: that of the next forward."""
        return _top_mask(self.scores(self.updated_weight()), self.num_pruned).bool()

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """U, V, A, B, R, C in the shapes of `pst_kernels.reference`."""
        R, C = self.mask_scores_R.squeeze(1), self.mask_scores_C.squeeze(0)
        return self.weight_U, self.weight_V, self.mask_scores_A, self.mask_scores_B, R, C

    @property
    def scales(self) -> dict[str, Any]:
        return {"beta": self.beta, "alpha1": self.alpha1, "alpha2": self.alpha2}

    def exact_scores(self) -> Tensor:
        return reference.scores(self.weight, *self.factors, **self.scales)

    def expected(self, x: Tensor, mask: Tensor) -> Tensor:
        U, V, A, B, R, C = self.factors
        return reference.pst_linear(x, self.weight, self.bias, U, V, A, B, R, C, mask, **self.scales)


class _TopMask(torch.autograd.Function):
    """0 for the num_pruned smallest scores, else 1; straight through backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, num_pruned: int) -> Tensor:
        return _top_mask(scores, num_pruned)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _top_mask(scores: Tensor, num_pruned: int) -> Tensor:
    mask = torch.ones_like(scores)
    order = torch.argsort(scores.flatten())
    mask.view(-1)[order[:num_pruned]] = 0.0
    return mask
