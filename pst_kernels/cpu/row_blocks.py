"""W' and the scores S in PyTorch and NumPy, a block of rows at a time: small enough to stay in cache.

A block lies in a scratch buffer, and is overwritten by the next.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..masks.packing import PAIRS, packed_width, unpack_flags
from ..operands import Factors, Scales, compute_dtype
from . import scratch

# Weights of a row block, and rows: the library shares a rank-r product of fewer rows badly between threads.
BLOCK, BLOCK_ROWS, BLOCK_AT_MOST = 1 << 19, 512, 1 << 20
GEMM_ROWS = 1024  # about so many rows of G are made at once: a library GEMM of fewer costs more a row


def rows_per_block(rows: int, columns: int) -> int:
    """Such that no block is much smaller than the others."""
    columns = max(1, columns)
    wanted = max(1, min(max(BLOCK // columns, BLOCK_ROWS), BLOCK_AT_MOST // columns))
    return max(1, -(-rows // max(1, rows // wanted)))


def row_blocks(first: int, last: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, last)) for start in range(first, last, step))


class UpdatedRows:
    """W' = W + beta U V, and M * W', in fp32 (float64 for a float64 weight)."""

    def __init__(self, weight: Tensor, factors: Factors, scales: Scales):
        self.dtype = compute_dtype(weight.dtype)
        self.U, self.V = factors.U.to(self.dtype), factors.V.to(self.dtype)
        self.weight, self.beta = weight, scales.beta
        self.out, self.columns = weight.shape
        # elsewhere a block need not fit into a cache, and each operator is a launch
        self.step = rows_per_block(self.out, self.columns) if weight.is_cpu else max(1, min(self.out, GEMM_ROWS))
        self._updated = self.buffer("updated")

    def buffer(self, name: str) -> Tensor:
        """Room for one block."""
        return scratch.get(name, (self.step, self.columns), self.dtype, self.weight.device)

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
        pairs = scratch.get("pairs", (count, packed_width(self.columns), PAIRS), torch.int32, self.weight.device)
        return self.buffer("flags")[:count].copy_(unpack_flags(mask[rows], out=pairs)[:, : self.columns])

    def masked_into(self, out: Tensor, mask: Tensor) -> Tensor:
        """Fill `out` with M * W' in its dtype."""
        for rows in self.blocks():
            updated, flags = self.updated(rows), self.flags(mask, rows)
            multiply_into(out[rows], updated, flags, work=updated)
        return out


def scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale


def multiply_into(out: Tensor, left: Tensor, right: Tensor, work: Tensor) -> None:
    """out = left * right, by way of `work` where the dtypes differ: it saves a fresh buffer."""
    if out.dtype == left.dtype:
        torch.mul(left, right, out=out)
    else:
        out.copy_(torch.mul(left, right, out=work[: len(left)]))


class ScoreRows:
    """S = |W'| + alpha1 A B + alpha2 (R + C).

    R and C join A and B as two more ranks, [alpha1 A, alpha2 R, 1] @ [B; 1; alpha2 C], so that one addmm does it.
    """

    def __init__(self, weight: Tensor, factors: Factors, scales: Scales):
        self.rows = UpdatedRows(weight, factors, scales)
        _, _, A, B, R, C = factors.map(lambda factor: factor.to(self.rows.dtype))
        A, R, C = scaled(A, scales.alpha1), scaled(R, scales.alpha2), scaled(C, scales.alpha2)
        self.left = torch.cat([A, R[:, None], A.new_ones((len(A), 1))], 1)
        self.right = torch.cat([B, A.new_ones((1, B.shape[1])), C[None]], 0)

    def of(self, updated: Tensor, rows: slice, out: Tensor) -> Tensor:
        """fp32 scores of some rows from their W'; made in `out`, which may be `updated`."""
        return torch.abs(updated, out=out).addmm_(self.left[rows], self.right).to(torch.float32)

    def blocks(self, kept: Tensor | None = None, masked: Tensor | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(first flat index, flat fp32 scores) of each block.

        With `masked` (out, in), it gets kept * W', from the flags that stand in `kept`, bool (out, in), by the time the
        next block is asked for.
        """
        work = None if masked is None else self.rows.buffer("flags")
        for rows in self.rows.blocks():
            updated = self.rows.updated(rows)
            score = updated if work is None else work[: len(updated)]
            yield rows.start * self.rows.columns, self.of(updated, rows, out=score).view(-1).numpy()
            if kept is not None and masked is not None:
                flags = score.copy_(kept[rows].view(torch.uint8))
                multiply_into(masked[rows], updated, flags, work=updated)

    def sample(self, size: int) -> np.ndarray:
        """Scores at random places (to rounding: only a bracket is made of them), the same places every time."""
        generator = torch.Generator().manual_seed(0)
        weight, U, V = self.rows.weight, self.rows.U, self.rows.V
        index = torch.randint(weight.numel(), (size,), generator=generator)
        row, column = index // self.rows.columns, index % self.rows.columns
        updated = weight[row, column] + self.rows.beta * (U[row] * V[:, column].T).sum(1)
        score = updated.abs() + (self.left[row] * self.right[:, column].T).sum(1)
        return score.to(torch.float32).numpy()
