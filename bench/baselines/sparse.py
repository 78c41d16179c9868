"""What layers with a mask share: the schedule's progress, the exact top-v mask, and its straight-through form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pst_kernels import functional
from pst_kernels.masks.patterns import num_pruned_at


class SparseLayer(nn.Linear):
    """A linear layer whose mask follows from `scores()`; the `num_pruned` smallest are pruned.

    `go_to(progress)` with progress from 0 to 1 along the cubic schedule of `pst_kernels.schedule` says how far pruning
    has come. `penalty()` is what a method adds to the loss, per layer, before its factor and the progress; None for one
    that prunes to a given sparsity.
    """

    final_sparsity: float
    num_pruned: int

    def go_to(self, progress: float) -> None:
        self.num_pruned = num_pruned_at(self.weight.numel(), self.final_sparsity * progress)

    def scores(self) -> Tensor:
        """(out, in), differentiable where the method learns from the mask."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        return None

    @torch.no_grad()
    def mask(self) -> Tensor:
        """bool (out, in), True for kept weights."""
        return keep_largest(self.scores().detach(), self.num_pruned)


class StraightThroughTop(torch.autograd.Function):
    """1 for all but the num_pruned smallest scores, which are 0; the gradient of the mask is that of the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, num_pruned: int) -> Tensor:
        return keep_largest(scores, num_pruned).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def keep_largest(scores: Tensor, num_pruned: int) -> Tensor:
    """bool, like `scores`; False for exactly the `num_pruned` smallest, of equal scores those of lower flat index."""
    flat = scores.flatten()
    if num_pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.dtype == torch.float32:  # selection is some twenty times faster than a sort
        value, index = functional.kth_value(flat, num_pruned)
        keep = flat > value
        if flat.is_cuda:  # without waiting for the device to say how many are equal
            return (keep | (flat == value) & (torch.arange(flat.numel(), device=flat.device) > index)).view(
                scores.shape
            )
        ties = (flat == value).nonzero().squeeze(1)
        keep[ties[ties > index]] = True
    else:
        keep = torch.ones_like(flat, dtype=torch.bool)
        keep[torch.argsort(flat, stable=True)[:num_pruned]] = False
    return keep.view(scores.shape)
