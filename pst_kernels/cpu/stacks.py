"""Stacks of weights (experts, out, in), in PyTorch for every device: M * W', and what its gradient G gives the factors.

The products are the model's own, so G is there as a whole; its reductions are batched over a few experts at a time.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..masks.packing import unpack_mask
from ..operands import MaskedWeight, compute_dtype

AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}  # weights whose D and Q exist at a time


def masked_weight(kernels: ModuleType, operands: MaskedWeight, dtype: torch.dtype) -> Tensor:
    """M * W' of a weight (out, in), or of each of a stack, by the functions of a room."""
    weight, factors, mask, scales = operands
    if weight.dim() == 2:
        return kernels.masked_weight(operands, dtype)
    out = room(weight, dtype)
    for i, one in enumerate(out):
        one.copy_(kernels.masked_weight(MaskedWeight(weight[i], factors.of_expert(i), mask[i], scales), dtype))
    return out


def room(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """For M * W'; that of a stack is laid out as the weight is, for the model's products."""
    return weight.new_empty(weight.shape, dtype=dtype) if weight.dim() == 2 else torch.empty_like(weight, dtype=dtype)


def factor_gradients(
    gradient: Tensor, operands: MaskedWeight, learn_scores: bool, kept_alone: bool, through_magnitude: bool
) -> tuple[Tensor, ...]:
    """dU, dV, dA, dB, dR and dC, in fp32 (float64 for a float64 weight), from G (experts, out, in).

    Without `learn_scores` the scores' gradients are zeros; with `kept_alone`, Q is that of kept weights.
    """
    weight, factors, mask, (beta, alpha1, alpha2) = operands
    dtype, (experts, out, columns) = compute_dtype(weight.dtype), weight.shape
    found = [torch.zeros(factor.shape, dtype=dtype, device=weight.device) for factor in factors]
    step = max(1, AT_ONCE.get(weight.device.type, AT_ONCE["cuda"]) // max(1, out * columns))
    for start in range(0, experts, step):
        few = slice(start, start + step)
        dU, dV, dA, dB, dR, dC = (one[few] for one in found)
        U, V, A, B, _, _ = (factor[few].to(dtype) for factor in factors)
        updated, G = torch.baddbmm(weight[few].to(dtype), U, V, alpha=beta), gradient[few].to(dtype)
        kept = unpack_mask(mask[few].flatten(0, 1), columns).view(updated.shape)
        if learn_scores:
            D = G * updated
            dA.copy_(D @ B.mT).mul_(alpha1)
            dB.copy_(A.mT @ D).mul_(alpha1)
            torch.sum(D, 2, out=dR).mul_(alpha2)
            torch.sum(D, 1, out=dC).mul_(alpha2)
        gate = updated.abs_().add_(kept) if through_magnitude else kept
        if kept_alone:
            gate = gate * kept
        Q = G * gate
        dU.copy_(Q @ V.mT).mul_(beta)
        dV.copy_(U.mT @ Q).mul_(beta)
    return tuple(found)
