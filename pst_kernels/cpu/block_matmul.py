"""Products with a block mask in PyTorch: forward, dx, dU and dV that visit kept blocks only.

W' is made for the kept blocks alone, those of one row of blocks side by side, in a compiled pass where that serves. A
product is one GEMM a block, straight on columns of x, gy and the result: a batched product of gathered blocks would
first write a result (T, size) for each block, to be added up afterwards. For few tokens blocks of 16 and 32 are too
thin for that, and 16-bit sums would be rounded after each block: the columns of x that a row of blocks needs are
gathered for one GEMM.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..masks.packing import WORD
from ..operands import MaskedWeight, Needs, compute_dtype
from . import scratch
from .compiled import passes_for

THICK = 64  # blocks of at least this size are multiplied one by one
MANY_TOKENS = 512  # from so many on, thinner ones are too


class BlockRow(NamedTuple):
    """The kept blocks of one row of blocks, gathered: side by side."""

    number: int  # of the row of blocks
    rows: slice  # of W
    columns: list[slice]  # of W, one a block
    gathered: list[slice]  # the same blocks among this row's gathered columns
    span: slice  # of these among the gathered columns of all rows of blocks


class BlockRows(NamedTuple):
    rows: list[BlockRow]
    columns: Tensor  # int64: the column of W of each gathered column


def block_rows(mask: Tensor, shape: tuple[int, int], size: int) -> BlockRows:
    """Where the kept blocks of a packed mask lie; the mask must consist of blocks of this size.

    Listed once for as long as nothing writes the mask: its loop over blocks costs as much as small products.
    """
    if mask.is_inference():  # which has no version
        return _block_rows(mask, shape, size)
    key = mask.data_ptr(), mask._version, shape, size
    made_of, found = _listed.get(mask, (None, None))
    if made_of != key:
        with torch.inference_mode(False):  # they outlive this call
            made_of, found = _listed[mask] = key, _block_rows(mask, shape, size)
    return found


_listed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of a mask: what its last lists were made of, and these


def _block_rows(mask: Tensor, shape: tuple[int, int], size: int) -> BlockRows:
    out, columns = shape
    first = torch.arange(0, columns, size, device=mask.device)
    flags = (mask[::size].index_select(1, first // WORD) >> (first % WORD // 2).to(torch.int32)) & 1
    rows, start = [], 0
    for i, row in enumerate(flags.tolist()):
        kept = [slice(j * size, min((j + 1) * size, columns)) for j, flag in enumerate(row) if flag]
        gathered, end = [], 0
        for one in kept:
            gathered.append(slice(end, end + one.stop - one.start))
            end = gathered[-1].stop
        rows.append(BlockRow(i, slice(i * size, min((i + 1) * size, out)), kept, gathered, slice(start, start + end)))
        start += end
    index = torch.arange(columns, device=mask.device).expand(len(rows), -1)
    return BlockRows(rows, index[flags.bool().repeat_interleave(size, 1)[:, :columns]])


class BlockRowWeights:
    """W' = W + beta U V of the kept blocks, a row of blocks at a time, in fp32 (float64 for a float64 weight)."""

    def __init__(self, operands: MaskedWeight, size: int):
        weight, U, V, beta = operands.weight, operands.factors.U, operands.factors.V, operands.scales.beta
        self.dtype = compute_dtype(weight.dtype)
        self.rows, self.columns = block_rows(operands.mask, (weight.shape[0], weight.shape[1]), size)
        self.U = U.to(self.dtype)
        self.V = V.to(self.dtype).index_select(1, self.columns)  # (r, gathered columns)
        self.weight, self.beta, self.size = weight, beta, size

    @functools.cached_property
    def parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """W, U and V of each row of blocks, split at once: slices one by one cost time beside small products."""
        widths = [row.span.stop - row.span.start for row in self.rows]
        return list(zip(self.weight.split(self.size), self.U.split(self.size), self.V.split(widths, 1), strict=True))

    def buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        """Flat, for all kept blocks."""
        return scratch.get(name, (self.size * self.columns.numel(),), dtype, self.weight.device)

    def of(self, row: BlockRow, flat: Tensor) -> Tensor:
        """A row of blocks (rows, gathered columns) in such a buffer."""
        height, width = row.rows.stop - row.rows.start, row.span.stop - row.span.start
        start = self.size * row.span.start
        return flat[start : start + height * width].view(height, width)

    def updated(self, flat: Tensor) -> list[Tensor]:
        """W' of each row of blocks, made in its part of `flat`: all of it before the first product, as small products
        between large ones would make the library's threads wait and wake up.
        """
        found = [self.of(row, flat) for row in self.rows]
        if (passes := passes_for(self.weight)) is not None:
            starts = torch.tensor([0, *(row.span.stop for row in self.rows)])
            passes.updated_blocks(self.weight, self.U, self.V, self.beta, starts, self.columns, flat)
            return found
        for row, out in zip(self.rows, found, strict=True):
            if row.columns:
                weight, U, V = self.parts[row.number]
                torch.addmm(side_by_side(weight, row.columns).to(self.dtype), U, V, alpha=self.beta, out=out)
        return found


def side_by_side(matrix: Tensor, columns: Sequence[slice]) -> Tensor:
    """Some columns of a matrix; a view where they are one run."""
    if len(columns) == 1 or columns[-1].stop - columns[0].start == sum(one.stop - one.start for one in columns):
        return matrix[:, columns[0].start : columns[-1].stop]
    return torch.cat([matrix[:, one] for one in columns], 1)


def block_split(x: Tensor, operands: MaskedWeight) -> None:
    """What both products of a step take, made once: nothing here."""


def block_forward(x: Tensor, operands: MaskedWeight, bias: Tensor | None, size: int, split: None = None) -> Tensor:
    """y = x (M * W')^T + bias for a mask of blocks."""
    weight = operands.weight
    weights = BlockRowWeights(operands, size)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    # One pass for the bias, or for zeros, which stay where nothing is kept: every product adds to what is there.
    y.zero_() if bias is None else y.copy_(bias)
    flat, x_columns = weights.buffer("kept blocks", weights.dtype), x.split(size, 1)
    for row, updated, out in zip(weights.rows, weights.updated(flat), y.split(size, 1), strict=True):
        if not row.columns:
            continue
        right = updated.to(x.dtype).t()
        if one_by_one(x, size):
            for columns, part in zip(row.columns, row.gathered, strict=True):
                out.addmm_(x_columns[columns.start // size], right[part])
        else:
            out.addmm_(side_by_side(x, row.columns), right)
    return y


def kept_block_gradients(
    gy: Tensor, x: Tensor, operands: MaskedWeight, size: int, through_magnitude: bool, needs: Needs,
    split: None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dU and dV, with Q = G * M * (1 + |W'|), or G * M without `through_magnitude`, from kept blocks of G."""
    U, V, beta = operands.factors.U, operands.factors.V, operands.scales.beta
    weights = BlockRowWeights(operands, size)
    flat = weights.buffer("kept blocks", weights.dtype)
    gradients = weights.buffer("kept blocks of G", gy.dtype)
    by_column: dict[int, list[tuple[slice, Tensor]]] = {}
    dU = weights.U.new_zeros(U.shape if needs.factors else 0)
    dV_gathered = weights.V.new_empty(weights.V.shape if needs.factors else 0)
    for row, updated in zip(weights.rows, weights.updated(flat), strict=True):
        if not row.columns:
            continue
        if needs.input:
            cast = updated.to(gy.dtype)
            for columns, part in zip(row.columns, row.gathered, strict=True):
                by_column.setdefault(columns.start, []).append((row.rows, cast[:, part]))
        if needs.factors:
            G = weights.of(row, gradients)
            if one_by_one(x, size):
                for columns, part in zip(row.columns, row.gathered, strict=True):
                    torch.mm(gy[:, row.rows].t(), x[:, columns], out=G[:, part])
            else:
                torch.mm(gy[:, row.rows].t(), side_by_side(x, row.columns), out=G)
            Q = G.to(weights.dtype)
            Q = torch.addcmul(Q, Q, updated.abs()) if through_magnitude else Q
            _, U_rows, V_columns = weights.parts[row.number]
            torch.mm(Q, V_columns.t(), out=dU[row.rows])
            torch.mm(U_rows.t(), Q, out=dV_gathered[:, row.span])
    dx = _dx(gy, x, by_column, size) if needs.input else gy.new_empty(0)
    if not needs.factors:
        return dx, dU, dV_gathered
    dV = weights.V.new_zeros(V.shape).index_add_(1, weights.columns, dV_gathered)
    return dx, dU.mul_(beta), dV.mul_(beta)


def _dx(gy: Tensor, x: Tensor, by_column: dict[int, list[tuple[slice, Tensor]]], size: int) -> Tensor:
    dx = torch.zeros_like(x)
    for start, kept in by_column.items():
        out = dx[:, start : start + size]
        if one_by_one(x, size):
            for rows, block in kept:
                out.addmm_(gy[:, rows], block)
        else:
            stacked = torch.cat([block for _, block in kept], 0)
            torch.mm(side_by_side(gy, [rows for rows, _ in kept]), stacked, out=out)
    return dx


def one_by_one(x: Tensor, size: int) -> bool:
    """Whether to add up a product a block; 16-bit sums would be rounded after each."""
    return (size >= THICK or x.shape[0] >= MANY_TOKENS) and x.element_size() > 2
