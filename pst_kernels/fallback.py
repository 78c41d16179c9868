"""The ops in PyTorch and NumPy: for CPUs, and for any device that has no Triton.

Everything of W's size is made a block of rows at a time, small enough to stay in a core's cache, and used up there. The
one exception is the masked weight, written once into a scratch buffer for the library's GEMM. W' and S are computed in
fp32 (in float64 for a float64 weight); a mask is decided by fp32 scores everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .packing import PAIRS, pack_mask, packed_width, unpack_flags
from .selection import SAMPLE, Bracket, Guess, sample_bracket, select

BLOCK = 1 << 18  # weights in a row block: 1 MiB of fp32; smaller ones pay more for calls than they save in cache misses
GEMM_ROWS = 256  # rows of G made at once, at least: a library GEMM of 42 rows costs a quarter more than one of 256


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_rows(columns: int) -> int:
    return max(1, BLOCK // max(1, columns))


def row_blocks(first: int, last: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, last)) for start in range(first, last, step))


class _Scratch(threading.local):
    """One flat buffer a thread and dtype, as large as the largest weight so far: fresh pages cost half a pass."""

    def __init__(self) -> None:
        self.flat: dict[torch.dtype, Tensor] = {}

    def like(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.device.type != "cpu":  # other devices have caching allocators
            return torch.empty(weight.shape, dtype=dtype, device=weight.device)
        flat = self.flat.get(dtype)
        if flat is None or flat.numel() < weight.numel():
            flat = self.flat[dtype] = torch.empty(weight.numel(), dtype=dtype)
        return flat[: weight.numel()].view(weight.shape)


_scratch = _Scratch()


class _UpdatedRows:
    """W' = W + beta U V, and M * W', a block of rows at a time in buffers that are used again."""

    def __init__(self, weight: Tensor, U: Tensor, V: Tensor, beta: float):
        self.dtype = compute_dtype(weight.dtype)
        self.weight, self.U, self.V, self.beta = weight, U.to(self.dtype), V.to(self.dtype), beta
        self.out, self.columns = weight.shape
        self.step = block_rows(self.columns)
        self._updated, self._flags = self.buffer(), self.buffer()
        pairs = (len(self._flags), packed_width(self.columns), PAIRS)
        self._pairs = torch.empty(pairs, dtype=torch.int32, device=weight.device)

    def buffer(self) -> Tensor:
        return torch.empty((min(self.step, self.out), self.columns), dtype=self.dtype, device=self.weight.device)

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[slice]:
        return row_blocks(first, self.out if last is None else last, self.step)

    def updated(self, rows: slice) -> Tensor:
        """W' of some rows; overwritten by the next call."""
        block, weight = self._updated[: rows.stop - rows.start], self.weight[rows]
        if weight.dtype != self.dtype:
            return block.copy_(weight).addmm_(self.U[rows], self.V, alpha=self.beta)
        return torch.addmm(weight, self.U[rows], self.V, alpha=self.beta, out=block)

    def flags(self, mask: Tensor, rows: slice) -> Tensor:
        """The mask of some rows as 0 and 1; overwritten by the next call."""
        count = rows.stop - rows.start
        return self._flags[:count].copy_(unpack_flags(mask[rows], out=self._pairs[:count])[:, : self.columns])

    def masked_into(self, out: Tensor, mask: Tensor) -> Tensor:
        """Fill `out` with M * W' in its dtype."""
        for rows in self.blocks():
            multiply_into(out[rows], self.updated(rows), self.flags(mask, rows))
        return out


def multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mul(left, right, out=out)
    else:
        out.copy_(left * right)


def widened(columns: Tensor) -> Tensor:
    """(n, r) with r padded by zeros to a multiple of 16: the library multiplies by 16 columns faster than by 8 or 9."""
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % 16))


class _ScoreRows:
    """S = |W'| + alpha1 A B + alpha2 (R + C), a block of rows at a time.

    R and C join A and B as two more ranks, [alpha1 A, alpha2 R, 1] @ [B; 1; alpha2 C], so that one addmm does it.
    """

    def __init__(self, weight, U, V, A, B, R, C, beta: float, alpha1: float, alpha2: float):
        self.rows = _UpdatedRows(weight, U, V, beta)
        dtype = self.rows.dtype
        one = torch.ones((), dtype=dtype, device=weight.device)
        self.left = torch.cat([alpha1 * A.to(dtype), alpha2 * R.to(dtype)[:, None], one.expand(len(A), 1)], 1)
        self.right = torch.cat([B.to(dtype), one.expand(1, B.shape[1]), alpha2 * C.to(dtype)[None]], 0)

    def __getitem__(self, rows: slice) -> Tensor:
        """fp32 scores of some rows; overwritten by the next call."""
        return self.rows.updated(rows).abs_().addmm_(self.left[rows], self.right).to(torch.float32)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for rows in self.rows.blocks():
            yield rows.start * self.rows.columns, self[rows].view(-1).numpy()

    def sample(self, size: int) -> np.ndarray:
        """Scores at random places (to rounding: only a bracket is made of them), the same places every time."""
        generator = torch.Generator().manual_seed(0)
        weight, U, V = self.rows.weight, self.rows.U, self.rows.V
        index = torch.randint(weight.numel(), (size,), generator=generator)
        row, column = index // self.rows.columns, index % self.rows.columns
        updated = weight[row, column] + self.rows.beta * (U[row] * V[:, column].T).sum(1)
        score = updated.abs() + (self.left[row] * self.right[:, column].T).sum(1)
        return score.to(torch.float32).numpy()


def scores(weight, U, V, A, B, R, C, beta: float, alpha1: float, alpha2: float) -> Tensor:
    by_rows = _ScoreRows(weight, U, V, A, B, R, C, beta, alpha1, alpha2)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows in by_rows.rows.blocks():
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
    if k == 0:
        return pack_mask(torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
    kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    if weight.device.type != "cpu":
        everything = scores(weight, U, V, A, B, R, C, beta, alpha1, alpha2).view(-1)
        kept.view(-1).fill_(True)[torch.sort(everything, stable=True).indices[:k]] = False
        return pack_mask(kept)
    by_rows = _ScoreRows(weight, U, V, A, B, R, C, beta, alpha1, alpha2)
    last = Guess.load(guess)

    def brackets() -> Iterator[Bracket | None]:
        yield last.bracket(k / numel)
        if numel > 4 * SAMPLE:
            yield sample_bracket(by_rows.sample(SAMPLE), k / numel)

    chosen = select(by_rows.blocks, numel, k, brackets(), kept.view(-1).numpy())
    last.update(guess, chosen, k / numel)
    return pack_mask(kept)


def masked_weight(weight: Tensor, U: Tensor, V: Tensor, mask: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return _UpdatedRows(weight, U, V, beta).masked_into(out, mask)


def linear_forward(x: Tensor, weight, U, V, bias: Tensor | None, mask: Tensor, beta: float) -> Tensor:
    masked = _UpdatedRows(weight, U, V, beta).masked_into(_scratch.like(weight, x.dtype), mask)
    return torch.nn.functional.linear(x, masked, None if bias is None else bias.to(x.dtype))


def linear_backward(
    gy: Tensor, x: Tensor, weight, U, V, A, B, mask: Tensor, beta: float, alpha1: float, alpha2: float,
    through_magnitude: bool, needs_input: bool, needs_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx and the six factor gradients from one pass over row blocks of G = gy^T x, which never exists as a whole.

    With D = G * W' and Q = G * (M + |W'|), every factor gradient is a low-rank reduction of D or Q.
    """
    by_rows = _UpdatedRows(weight, U, V, beta)
    masked = _scratch.like(weight, gy.dtype) if needs_input else None
    if not needs_factors:
        dx = gy @ by_rows.masked_into(masked, mask) if masked is not None else gy.new_empty(0)
        none = by_rows.U.new_empty(0)
        return dx, none, none.clone(), none.clone(), none.clone(), none.clone(), none.clone()
    U, V, A, B = by_rows.U, by_rows.V, A.to(by_rows.dtype), B.to(by_rows.dtype)
    # A column of ones beside B gives dR with dA, one beside A gives dC with dB.
    one = torch.ones((), dtype=by_rows.dtype, device=weight.device)
    AR, BC = torch.cat([A, one.expand(len(A), 1)], 1), torch.cat([B, one.expand(1, B.shape[1])], 0)
    right_of_D, right_of_Q = widened(BC.T), widened(V.T)
    dAR, dU = A.new_empty(len(A), right_of_D.shape[1]), U.new_empty(len(U), right_of_Q.shape[1])
    dBC, dV = torch.zeros_like(BC), torch.zeros_like(V)
    product = by_rows.buffer()
    for group in row_blocks(0, by_rows.out, -(-GEMM_ROWS // by_rows.step) * by_rows.step):
        gradient = gy[:, group].T @ x
        for rows in by_rows.blocks(group.start, group.stop):
            updated, flags = by_rows.updated(rows), by_rows.flags(mask, rows)
            if masked is not None:
                multiply_into(masked[rows], updated, flags)
            G = gradient[rows.start - group.start : rows.stop - group.start].to(by_rows.dtype)
            D = torch.mul(G, updated, out=product[: len(G)])
            torch.mm(D, right_of_D, out=dAR[rows])
            dBC.addmm_(AR[rows].T, D)
            Q = torch.mul(G, flags.add_(updated.abs_()) if through_magnitude else flags, out=D)
            torch.mm(Q, right_of_Q, out=dU[rows])
            dV.addmm_(U[rows].T, Q)
    dx = gy @ masked if masked is not None else gy.new_empty(0)
    rank = len(B)
    dA, dR, dB, dC = dAR[:, :rank] * alpha1, dAR[:, rank] * alpha2, dBC[:rank] * alpha1, dBC[rank] * alpha2
    return dx, dU[:, : len(V)] * beta, dV.mul_(beta), dA, dB, dR, dC
