"""PST with parts of its importance left out or weighted: for ablations, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .sparse import SparseLayer, StraightThroughTop
from .takeover import frozen, with_parameters_of

PARTS = ("W", "AB", "RC")


class PSTVariant(SparseLayer):
    """y = x (M * W')^T + bias, W' = W + beta U V, M by a sum of chosen parts of the importance.

    S = [W] scale_j |W'| + [AB] alpha1 A B + [RC] alpha2 (R + C), `scale` (in,) being 1 unless given. With D = G * W'
    the gradients of A, B, R and C are those of PST, and dU, dV come from Q = G * (M + [W] scale_j |W'|).

    Source: Li et al., IJCAI 2022 (arXiv 2205.11005), whose ablation this repeats; `scale` is the input norm of Wanda
    (Sun et al., ICLR 2024).
    """

    parts: tuple[str, ...]
    scales: tuple[float, float, float]  # beta, alpha1, alpha2
    scale: Tensor
    pst_U: nn.Parameter
    pst_V: nn.Parameter
    pst_A: nn.Parameter
    pst_B: nn.Parameter
    pst_R: nn.Parameter
    pst_C: nn.Parameter

    @classmethod
    def from_linear(
        cls, base: nn.Linear, sparsity: float = 0.9, *, parts: tuple[str, ...] = PARTS, rank: int = 8,
        beta: float = 1.0, alpha1: float = 1.0, alpha2: float = 1.0, scale: Tensor | None = None,
    ) -> PSTVariant:  # fmt: skip
        if not parts or not set(parts) <= set(PARTS):
            raise ValueError(f"parts={parts!r} must name some of {', '.join(PARTS)}")
        layer: PSTVariant = frozen(with_parameters_of(cls, base))
        layer.parts, layer.scales, layer.final_sparsity = parts, (beta, alpha1, alpha2), sparsity
        new: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        layer.register_buffer("scale", torch.ones(base.in_features, **new) if scale is None else scale.to(base.weight))
        out, columns = base.weight.shape
        layer.pst_U = nn.Parameter(torch.randn(out, rank, **new))
        layer.pst_V = nn.Parameter(torch.zeros(rank, columns, **new))
        layer.pst_A = nn.Parameter(torch.randn(out, rank, **new), requires_grad="AB" in parts)
        layer.pst_B = nn.Parameter(torch.zeros(rank, columns, **new), requires_grad="AB" in parts)
        layer.pst_R = nn.Parameter(torch.zeros(out, **new), requires_grad="RC" in parts)
        layer.pst_C = nn.Parameter(torch.zeros(columns, **new), requires_grad="RC" in parts)
        layer.go_to(1.0)
        return layer

    def updated_weight(self) -> Tensor:
        return torch.addmm(self.weight, self.pst_U, self.pst_V, alpha=self.scales[0])

    def scores(self) -> Tensor:
        return self._scores(self.updated_weight())

    def _scores(self, updated: Tensor) -> Tensor:
        _, alpha1, alpha2 = self.scales
        total = torch.zeros_like(updated)
        if "W" in self.parts:
            total = total + updated.abs() * self.scale
        if "AB" in self.parts:
            total = total + alpha1 * self.pst_A @ self.pst_B
        if "RC" in self.parts:
            total = total + alpha2 * (self.pst_R[:, None] + self.pst_C)
        return total

    def forward(self, x: Tensor) -> Tensor:
        updated = self.updated_weight()
        mask = StraightThroughTop.apply(self._scores(updated), self.num_pruned)
        return linear(x, mask * updated, self.bias)
