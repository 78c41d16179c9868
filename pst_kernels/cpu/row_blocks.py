"""W' and the scores S, a block of rows at a time, in buffers that stay in cache and are used again.

Each thread has one set of buffers, as large as the largest block so far: fresh memory costs half as much as a pass
over it. So every block is overwritten by the next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..masks.packing import PAIRS, packed_width, unpack_flags
from ..operands import compute_dtype

# Weights of a row block, and rows: the library shares a rank-r product of fewer rows badly between threads.
BLOCK, BLOCK_ROWS, BLOCK_AT_MOST = 1 << 19, 512, 1 << 20
GEMM_ROWS = 1024  # rows of G made at once: a library GEMM of fewer costs more a row


def block_rows(rows: int, columns: int) -> int:
    """Rows of a block, such that no block is much smaller than the others."""
    columns = max(1, columns)
    wanted = max(1, min(max(BLOCK // columns, BLOCK_ROWS), BLOCK_AT_MOST // columns))
    return max(1, -(-rows // max(1, rows // wanted)))


def row_blocks(first: int, last: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, last)) for start in range(first, last, step))


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of this shape whose content is whatever the last user of `name` left."""
        if device.type != "cpu":  # other devices have caching allocators
            return torch.empty(shape, dtype=dtype, device=device)
        view = self.views.get((name, dtype, shape))
        return self._made(name, shape, dtype) if view is None else view

    @torch.inference_mode(False)  # a buffer made while evaluating must be writable in training
    def _made(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        flat = self.flat.get((name, dtype))
        if flat is None or flat.numel() < numel:
            flat = self.flat[name, dtype] = torch.empty(numel, dtype=dtype)
            self.views.clear()  # they would keep the smaller buffer
        view = self.views[name, dtype, shape] = flat[:numel].view(shape)
        return view


buffers = _Buffers()


class UpdatedRows:
    """W' = W + beta U V, and M * W', in fp32 (float64 for a float64 weight)."""

    def __init__(self, weight: Tensor, U: Tensor, V: Tensor, beta: float):
        self.dtype = compute_dtype(weight.dtype)
        self.weight, self.U, self.V, self.beta = weight, U.to(self.dtype), V.to(self.dtype), beta
        self.out, self.columns = weight.shape
        self.step = block_rows(self.out, self.columns)
        self._updated = self.buffer("updated")

    def buffer(self, name: str) -> Tensor:
        """Room for one block."""
        return buffers.get(name, (self.step, self.columns), self.dtype, self.weight.device)

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
        pairs = buffers.get("pairs", (count, packed_width(self.columns), PAIRS), torch.int32, self.weight.device)
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
    """out = left * right, by way of `work` where the dtypes differ: a fresh buffer costs as much as the product."""
    if out.dtype == left.dtype:
        torch.mul(left, right, out=out)
    else:
        out.copy_(torch.mul(left, right, out=work[: len(left)]))


class ScoreRows:
    """S = |W'| + alpha1 A B + alpha2 (R + C).

    R and C join A and B as two more ranks, [alpha1 A, alpha2 R, 1] @ [B; 1; alpha2 C], so that one addmm does it.
    """

    def __init__(self, weight, U, V, A, B, R, C, beta: float, alpha1: float, alpha2: float):
        self.rows = UpdatedRows(weight, U, V, beta)
        dtype = self.rows.dtype
        A, R = scaled(A.to(dtype), alpha1), scaled(R.to(dtype), alpha2)
        self.left = torch.cat([A, R[:, None], A.new_ones((len(A), 1))], 1)
        self.right = torch.cat([B.to(dtype), A.new_ones((1, B.shape[1])), scaled(C.to(dtype), alpha2)[None]], 0)

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
