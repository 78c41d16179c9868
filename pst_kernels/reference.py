"""The method on one page, in plain differentiable PyTorch: the documentation, and the oracle of every test.

Source: "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", Li et al., IJCAI 2022 (arXiv 2205.11005),
and its released code. Computes in the dtype of its inputs; tests give it float64. Nothing here is fast.

    W' = W + beta U V                              updated weight; W (out, in) is frozen, U (out, r1), V (r1, in)
    S  = |W'| + alpha1 A B + alpha2 (R + C)        importance; A (out, r2), B (r2, in), R (out), C (in)
    M  = 0 for the num_pruned smallest S, else 1   ties: the lower flat index is pruned first
    y  = x (M * W')^T + bias                       backward: straight-through, dM/dS = identity

With `magnitude="fisher"` |W'| in S is multiplied by fisher_importance(squares), of a mean of G^2, G = gy^T x.
"""

from __future__ import annotations

import torch
from torch import Tensor


def updated_weight(weight: Tensor, U: Tensor, V: Tensor, *, beta: float = 1.0) -> Tensor:
    return weight + beta * U @ V


def fisher_importance(squares: Tensor) -> Tensor:
    """sqrt(F) over the root of its mean, of the diagonal Fisher matrix F in factored form: r_i c_j / mean for F_ij."""
    rows, columns = squares.mean(1), squares.mean(0)
    return (rows[:, None] * columns).sqrt() / squares.mean()


def scores(
    weight: Tensor, U: Tensor, V: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor,
    *, beta: float = 1.0, alpha1: float = 1.0, alpha2: float = 1.0, through_magnitude: bool = True,
    importance: Tensor | None = None,
) -> Tensor:  # fmt: skip
    magnitude = updated_weight(weight, U, V, beta=beta).abs()
    if importance is not None:
        magnitude = magnitude * importance
    if not through_magnitude:
        magnitude = magnitude.detach()
    return magnitude + alpha1 * A @ B + alpha2 * (R[:, None] + C)


def prune_mask(scores: Tensor, num_pruned: int) -> Tensor:
    """bool (out, in); False for exactly num_pruned entries."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.argsort(scores.flatten(), stable=True)[:num_pruned]] = False
    return mask.view(scores.shape)


def pst_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    U: Tensor, V: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor, mask: Tensor,
    *, beta: float = 1.0, alpha1: float = 1.0, alpha2: float = 1.0, through_magnitude: bool = True,
    anchor: Tensor | None = None, importance: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y (..., out) for x (..., in), given a bool mask (out, in).

    `M = mask + (S - anchor)` with `anchor` = S as a constant makes autograd's gradient the straight-through one.
    A fixed `anchor` turns the surrogate into an ordinary differentiable function, which is what `gradcheck` needs.
    """
    s = scores(
        weight, U, V, A, B, R, C, beta=beta, alpha1=alpha1, alpha2=alpha2, through_magnitude=through_magnitude,
        importance=importance,
    )  # fmt: skip
    straight_through = mask.to(s.dtype) + (s - (s.detach() if anchor is None else anchor))
    y = x @ (straight_through * updated_weight(weight, U, V, beta=beta)).T
    return y if bias is None else y + bias
