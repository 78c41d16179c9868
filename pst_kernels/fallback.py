"""The ops in PyTorch and NumPy: for CPUs, and for any device that has no Triton.

Everything of W's size is made a block of rows at a time, small enough to stay in a core's cache, and used up there. The
one exception is the masked weight, written once into a scratch buffer for the library's GEMM. W' and S are computed in
fp32 (in float64 for a float64 weight); a mask is decided by fp32 scores everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .packing import pack_mask, unpack_flags
from .selection import SAMPLE, Bracket, Guess, sample_bracket, select

BLOCK = 1 << 17  # weights in a row block: 512 KiB of fp32, half of a core's second-level cache


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(weight: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, weight.shape[1]))
    return (slice(first, min(first + step, len(weight))) for first in range(0, len(weight), step))


def updated_rows(weight: Tensor, U: Tensor, V: Tensor, rows: slice, beta: float) -> Tensor:
    """W' = W + beta U V of some rows; U and V in the compute dtype."""
    return torch.addmm(weight[rows].to(U.dtype), U[rows], V, alpha=beta)


class _ScoreRows:
    """S = |W'| + alpha1 A B + alpha2 (R + C), a block of rows at a time.

    R and C join A and B as two more ranks, [alpha1 A, alpha2 R, 1] @ [B; 1; alpha2 C], so that one addmm does it.
    """

    def __init__(self, weight, U, V, A, B, R, C, beta: float, alpha1: float, alpha2: float):
        dtype = compute_dtype(weight.dtype)
        self.weight, self.beta = weight, beta
        self.U, self.V = U.to(dtype), V.to(dtype)
        one = torch.ones((), dtype=dtype, device=weight.device)
        self.left = torch.cat([alpha1 * A.to(dtype), alpha2 * R.to(dtype)[:, None], one.expand(len(A), 1)], 1)
        self.right = torch.cat([B.to(dtype), one.expand(1, B.shape[1]), alpha2 * C.to(dtype)[None]], 0)

    def __getitem__(self, rows: slice) -> Tensor:
        magnitude = updated_rows(self.weight, self.U, self.V, rows, self.beta).abs_()
        return magnitude.addmm_(self.left[rows], self.right).to(torch.float32)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for rows in row_blocks(self.weight):
            yield rows.start * self.weight.shape[1], self[rows].view(-1).numpy()

    def sample(self, size: int) -> np.ndarray:
        """Scores at random places (to rounding: only a bracket is made of them), the same places every time."""
        generator = torch.Generator().manual_seed(0)
        index = torch.randint(self.weight.numel(), (size,), generator=generator)
        row, column = index // self.weight.shape[1], index % self.weight.shape[1]
        updated = self.weight[row, column] + self.beta * (self.U[row] * self.V[:, column].T).sum(1)
        score = updated.abs() + (self.left[row] * self.right[:, column].T).sum(1)
        return score.to(torch.float32).numpy()


def scores(weight, U, V, A, B, R, C, beta: float, alpha1: float, alpha2: float) -> Tensor:
    by_rows = _ScoreRows(weight, U, V, A, B, R, C, beta, alpha1, alpha2)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows in row_blocks(weight):
        out[rows] = by_rows[rows]
    return out


def kth_value(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    flat = scores.reshape(-1)
    if scores.device.type != "cpu":
        values, index = torch.sort(flat, stable=True)
        return values[k - 1], index[k - 1]
    array = flat.numpy()

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        return ((start, array[start : start + BLOCK]) for start in range(0, array.size, BLOCK))

    def brackets() -> Iterator[Bracket | None]:
        if array.size > 4 * SAMPLE:
            places = np.random.default_rng(0).integers(array.size, size=SAMPLE)
            yield sample_bracket(array[places], k / array.size)

    chosen = select(blocks, array.size, k, brackets(), None)
    return torch.tensor(chosen.value, dtype=scores.dtype), torch.tensor(chosen.index)


def prune_mask(
    weight, U, V, A, B, R, C, num_pruned: Tensor, guess: Tensor, beta: float, alpha1: float, alpha2: float
) -> Tensor:  # fmt: skip
    k, numel = int(num_pruned), weight.numel()
    kept = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    if k == 0:
        return pack_mask(kept)
    by_rows = _ScoreRows(weight, U, V, A, B, R, C, beta, alpha1, alpha2)
    if weight.device.type != "cpu":
        everything = torch.cat([by_rows[rows].view(-1) for rows in row_blocks(weight)])
        kept.view(-1)[torch.sort(everything, stable=True).indices[:k]] = False
        return pack_mask(kept)
    last = Guess.load(guess)

    def brackets() -> Iterator[Bracket | None]:
        yield last.bracket(k / numel)
        if numel > 4 * SAMPLE:
            yield sample_bracket(by_rows.sample(SAMPLE), k / numel)

    chosen = select(by_rows.blocks, numel, k, brackets(), kept.view(-1).numpy())
    last.update(guess, chosen, k / numel)
    return pack_mask(kept)


def masked_weight(weight: Tensor, U: Tensor, V: Tensor, mask: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    compute = compute_dtype(weight.dtype)
    U, V = U.to(compute), V.to(compute)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_blocks(weight):
        updated = updated_rows(weight, U, V, rows, beta)
        out[rows] = updated.mul_(_flags(mask, rows, updated))
    return out


def linear_forward(x: Tensor, weight, U, V, bias: Tensor | None, mask: Tensor, beta: float) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, masked_weight(weight, U, V, mask, beta, x.dtype), bias)


def linear_backward(
    gy: Tensor, x: Tensor, weight, U, V, A, B, mask: Tensor, beta: float, alpha1: float, alpha2: float,
    through_magnitude: bool, needs_input: bool, needs_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx and the six factor gradients from one pass over row blocks of G = gy^T x, which never exists as a whole.

    With D = G * W' and Q = G * (M + |W'|), every factor gradient is a low-rank reduction of D or Q.
    """
    compute = compute_dtype(weight.dtype)
    U, V, A, B = (f.to(compute) for f in (U, V, A, B))
    if not needs_factors:
        dx = gy @ masked_weight(weight, U, V, mask, beta, gy.dtype) if needs_input else gy.new_empty(0)
        return dx, *(U.new_empty(0) for _ in range(6))
    rows_out, columns = weight.shape
    scratch = torch.empty(weight.shape, dtype=gy.dtype, device=gy.device) if needs_input else None
    # A column of ones beside B gives dR with dA, one beside A gives dC with dB.
    one = torch.ones((), dtype=compute, device=weight.device)
    AR, BC = torch.cat([A, one.expand(rows_out, 1)], 1), torch.cat([B, one.expand(1, columns)], 0)
    dU, dV, dAR, dBC = torch.empty_like(U), torch.zeros_like(V), torch.empty_like(AR), torch.zeros_like(BC)
    for rows in row_blocks(weight):
        updated = updated_rows(weight, U, V, rows, beta)
        flags = _flags(mask, rows, updated)
        if scratch is not None:
            scratch[rows] = updated * flags
        G = (gy[:, rows].T @ x).to(compute)
        D = G * updated
        torch.mm(D, BC.T, out=dAR[rows])
        dBC.addmm_(AR[rows].T, D)
        Q = G.mul_(flags.add_(updated.abs_()) if through_magnitude else flags)
        torch.mm(Q, V.T, out=dU[rows])
        dV.addmm_(U[rows].T, Q)
    dx = gy @ scratch if scratch is not None else gy.new_empty(0)
    dA, dR, dB, dC = dAR[:, :-1] * alpha1, dAR[:, -1] * alpha2, dBC[:-1] * alpha1, dBC[-1] * alpha2
    return dx, dU.mul_(beta), dV.mul_(beta), dA, dB, dR, dC


def _flags(mask: Tensor, rows: slice, like: Tensor) -> Tensor:
    """The mask of some rows as 0 and 1 in the dtype of `like`."""
    return unpack_flags(mask[rows])[:, : like.shape[1]].to(like.dtype)
