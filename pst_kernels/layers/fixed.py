"""FixedMask: what a layer holds from the freeze on: where its kept weights lie, and what they were before training.

M * W' is then made at the kept places alone, with the trained kept weights added to it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..cpu import low_rank
from ..cpu.sparse_rows import SparseRows
from ..operands import Factors


class FixedMask:
    """The kept weights of a mask that stays as it is, in the order of lists (cpu/sparse_rows.py), on every device."""

    def __init__(self, weight: Tensor, mask: Tensor):
        self.lists = SparseRows.from_mask(weight, mask)  # the values: W itself
        self.shape = weight.shape

    @functools.cached_property
    def places(self) -> Tensor:
        """Flat indices in (out, in), (kept,). Made once: on a GPU that waits for the device."""
        row, column = self.lists.places()
        places = row * self.shape[1] + column
        return places.to(torch.int32) if self.shape.numel() < 1 << 31 else places

    def values(self, factors: Factors, beta: float, added: Tensor | None) -> Tensor:
        """W' at the kept places, and `added` to it, in fp32 (float64 for a float64 weight)."""
        return low_rank.kept_values(self.lists, factors.U, factors.V, beta, added)


def add_at(masked: Tensor, places: Tensor, added: Tensor) -> Tensor:
    flat = masked.view(-1)
    flat.index_put_((places,), flat[places] + added.to(flat.dtype))
    return masked
