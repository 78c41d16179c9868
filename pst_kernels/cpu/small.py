"""The ops for a weight so small that setting up a pass over it costs more than the pass: each a few operators, whole.

Where weight and factors are contiguous and fp32, and Numba is there, each is one compiled call instead. Scores, masks
and gradients are those of the other ways but for the order in which sums round.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..masks.packing import pack_mask, unpack_flags
from ..operands import Factors, MaskedWeight, Scales, compute_dtype
from .compiled import passes_for

WEIGHTS = 1 << 13  # up to so many


def serves(weight: Tensor) -> bool:
    return weight.numel() <= WEIGHTS and weight.device.type == "cpu"


def compiled(weight: Tensor, factors: Factors, scales: Scales) -> Any:
    """What does it in one call, a compiled/small_launch.Bound; None where that does not serve."""
    passes = passes_for(weight) if all(map(_is_plain, (weight, *factors))) else None
    return None if passes is None else passes.small.Bound(weight, factors, scales)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_contiguous()


def updated_weight(weight: Tensor, U: Tensor, V: Tensor, beta: float) -> Tensor:
    """W' in fp32, float64 for a float64 weight."""
    dtype = compute_dtype(weight.dtype)
    return torch.addmm(weight.to(dtype), U.to(dtype), V.to(dtype), alpha=beta)


def _scores(updated: Tensor, factors: Factors, scales: Scales) -> Tensor:
    _, _, A, B, R, C = factors.map(lambda factor: factor.to(updated.dtype))
    scores = updated.abs().addmm_(A, B, alpha=scales.alpha1)
    return scores.add_(R[:, None], alpha=scales.alpha2).add_(C, alpha=scales.alpha2).to(torch.float32)


def scores(weight: Tensor, factors: Factors, scales: Scales) -> Tensor:
    if (bound := compiled(weight, factors, scales)) is not None:
        return bound.scores()
    return _scores(updated_weight(weight, factors.U, factors.V, scales.beta), factors, scales)


def prune_mask(weight: Tensor, factors: Factors, scales: Scales, count: int, masked: Tensor | None) -> Tensor:
    """The packed mask of the `count` smallest scores, from 1; `masked` (out, in) gets M * W'."""
    if (masked is None or _is_plain(masked)) and (bound := compiled(weight, factors, scales)) is not None:
        return bound.prune(count, masked)
    updated = updated_weight(weight, factors.U, factors.V, scales.beta)
    kept = _kept(_scores(updated, factors, scales).numpy(), count)
    if masked is not None:
        masked.copy_(torch.where(kept, updated, 0.0))
    return pack_mask(kept)


def _kept(scores: np.ndarray, count: int) -> Tensor:
    """bool, False for the `count` smallest: of equal ones the lower index goes first, and NaN last."""
    flat = scores.reshape(-1)
    value = np.partition(flat, count - 1)[count - 1]
    if np.isnan(value):
        pruned = np.zeros(flat.size, bool)
        pruned[np.argsort(flat, kind="stable")[:count]] = True
    else:
        pruned = flat <= value
        surplus = int(np.count_nonzero(pruned)) - count
        if surplus:
            pruned[np.flatnonzero(flat == value)[-surplus:]] = False
    return torch.from_numpy(np.logical_not(pruned, out=pruned).reshape(scores.shape))


def masked_into(out: Tensor, operands: MaskedWeight) -> Tensor:
    """Fill `out` with M * W' in its dtype."""
    weight, factors, mask, scales = operands
    if _is_plain(out) and (bound := compiled(weight, factors, scales)) is not None:
        return bound.masked_into(out, mask.contiguous())
    updated = updated_weight(weight, factors.U, factors.V, scales.beta)
    kept = unpack_flags(mask)[:, : weight.shape[1]] != 0
    return out.copy_(torch.where(kept, updated, 0.0))


def factor_gradients(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dU, dV, dA, dB, dR and dC from all of G."""
    weight, factors, mask, (beta, alpha1, alpha2) = operands
    G = torch.mm(gy.t(), x)
    if G.dtype is torch.float32 and (bound := compiled(weight, factors, operands.scales)) is not None:
        return tuple(bound.factor_gradients(G, mask.contiguous(), through_magnitude))
    updated = updated_weight(weight, factors.U, factors.V, beta)
    U, V, A, B, _, _ = factors.map(lambda factor: factor.to(updated.dtype))
    G = G.to(updated.dtype)
    D = G * updated
    flags = unpack_flags(mask)[:, : weight.shape[1]]
    Q = G.mul_(updated.abs_().add_(flags)) if through_magnitude else torch.where(flags != 0, G, 0.0)
    return (
        _scaled(Q @ V.t(), beta), _scaled(U.t() @ Q, beta), _scaled(D @ B.t(), alpha1), _scaled(A.t() @ D, alpha1),
        _scaled(D.sum(1), alpha2), _scaled(D.sum(0), alpha2),
    )  # fmt: skip


def _scaled(gradient: Tensor, scale: float) -> Tensor:
    return gradient if scale == 1.0 else gradient.mul_(scale)
