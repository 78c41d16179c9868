"""Word embeddings that learn through two factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class LowRankEmbedding(nn.Embedding):
    """Row i is E[i] + P[i] Q, E frozen, P of zeros."""

    def __init__(self, base: nn.Embedding, rank: int):
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, _weight=base.weight)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(base.weight.new_zeros(base.num_embeddings, rank))
        self.lora_B = nn.Parameter(torch.randn(rank, base.embedding_dim, device=base.weight.device) / rank**0.5)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + embedding(input, self.lora_A) @ self.lora_B
