"""A one-shot mask by Wanda, then LoRA under that mask, which can be merged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .lora import add_lora
from .sparse import SparseLayer
from .takeover import frozen, with_parameters_of


class MaskedLoRA(SparseLayer):
    """y = x (M * (W + (alpha / r) B A))^T + bias; M is set once, W and the bias are frozen.

    M keeps, in every row, the largest |W_ij| * ||x_j||_2 over calibration data: exactly int(in * sparsity) of a row are
    pruned. With Q = (alpha / r) G * M: dB = Q A^T, dA = B^T Q.

    Source of the mask: Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
    ICLR 2024 (arXiv 2306.11695). Of the masked, mergeable LoRA: Zimmer et al., "PERP: Rethinking the Prune-Retrain
    Paradigm in the Era of LLMs" (arXiv 2312.15230), there called MaskLoRA.
    """

    scale: float
    kept: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @classmethod
    def from_linear(
        cls, base: nn.Linear, norms: Tensor, sparsity: float = 0.9, rank: int = 16, alpha: float = 16.0
    ) -> MaskedLoRA:
        """`norms` (in,): the 2-norm of every input feature over the calibration tokens."""
        layer: MaskedLoRA = frozen(with_parameters_of(cls, base))
        scores = base.weight.detach().abs() * norms.to(base.weight)
        smallest = torch.argsort(scores, dim=1, stable=True)[:, : int(base.in_features * sparsity)]
        layer.register_buffer("kept", torch.ones_like(scores, dtype=torch.bool).scatter(1, smallest, False))
        add_lora(layer, rank, alpha)
        return layer

    def go_to(self, progress: float) -> None:
        """The mask stays: that is the method."""

    def mask(self) -> Tensor:
        return self.kept

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.kept * (self.weight + self.scale * self.lora_B @ self.lora_A), self.bias)
