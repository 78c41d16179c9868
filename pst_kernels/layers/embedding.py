"""Word embeddings that learn through two factors: row i is E[i] + U[i] V, E frozen.

As LoRA has it for embeddings. A pruned body can say less about a word than the word itself can: at 90 % this is worth
more than any other ingredient (docs/accuracy.md), for rank / width of the memory that training E takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from .checks import whole
from .pst_layer import FROZEN

ENTRIES = ("pst_embedding_U", "pst_embedding_V")


class PSTEmbedding(nn.Embedding):
    """An `nn.Embedding` that `attach` made one of these in place: the same object, with the same weight and hooks.

    U starts at zero and V at N(0, 1 / rank), so that a step of Adam moves an entry of a row by about its learning rate.
    The row of padding does not learn.
    """

    pst_embedding_U: nn.Parameter
    pst_embedding_V: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        if hasattr(self.pst_embedding_U, "full_tensor"):
            raise RuntimeError(
                "embedding_rank is not for a model under tensor parallelism; convert it with embedding_rank=0"
            )
        rows = super().forward(input)
        return rows + (embedding(input, self.pst_embedding_U, self.padding_idx) @ self.pst_embedding_V).to(rows.dtype)

    @torch.no_grad()
    def updated_weight(self) -> Tensor:
        """E + U V, in the dtype of E; `forward` gives its rows."""
        return updated(self.weight, self.pst_embedding_U, self.pst_embedding_V)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if f"{prefix}{FROZEN}" in state_dict:  # where `weight` is the updated one (whole_model.py)
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}{FROZEN}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def updated(weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """E + U V of tensors, in the dtype of E."""
    return whole(weight) + (whole(U) @ whole(V)).to(weight.dtype)


def attach(module: nn.Embedding, rank: int, dtype: torch.dtype) -> None:
    shapes = word_shapes(module, rank)
    U, V = (module.weight.new_zeros(shapes[name], dtype=dtype) for name in ENTRIES)
    V.normal_(std=rank**-0.5)
    module.__class__ = PSTEmbedding
    for name, tensor in zip(ENTRIES, (U, V), strict=True):
        module.register_parameter(name, nn.Parameter(tensor))


def detach(module: PSTEmbedding) -> None:
    """A plain `nn.Embedding` again, which holds what was learned."""
    with torch.no_grad():
        module.weight.copy_(module.updated_weight())
    for name in ENTRIES:
        delattr(module, name)
    module.__class__ = nn.Embedding  # type: ignore[assignment]


def word_shapes(module: nn.Embedding, rank: int) -> dict[str, tuple[int, int]]:
    return dict(zip(ENTRIES, ((module.num_embeddings, rank), (rank, module.embedding_dim)), strict=True))
