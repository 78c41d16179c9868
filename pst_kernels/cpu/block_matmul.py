"""Products with a block mask in PyTorch: forward, dx, dU and dV that visit kept blocks only.

The kept blocks of one row of blocks lie side by side in a strip. W' is made for the strips alone, and every product is
one GEMM a block, straight on columns of x, gy and the result: a batched product of gathered blocks would write a result
of x's size for every column of blocks. For few tokens blocks of 16 and 32 are too thin for that: the columns of x that
a strip needs are gathered for one GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks.packing import WORD
from ..operands import MaskedWeight, Needs, compute_dtype
from .row_blocks import buffers

THICK = 64  # blocks of at least this size are multiplied one by one
# Thinner ones too from so many tokens on, where a step with gathering is no longer the faster one on a CPU.
MANY_TOKENS = 512


class Strip(NamedTuple):
    """The kept blocks of one row of blocks."""

    number: int  # of the row of blocks
    rows: slice  # of W
    columns: list[slice]  # of W, one a block
    places: list[slice]  # the same blocks in the strip
    place: slice  # of the strip among the columns of all strips


class Layout(NamedTuple):
    strips: list[Strip]
    gather: Tensor  # int64: the column of W of each column of all strips


def layout(mask: Tensor, shape: tuple[int, int], size: int) -> Layout:
    """Where the kept blocks of a packed mask lie; the mask must consist of blocks of this size."""
    out, columns = shape
    first = torch.arange(0, columns, size, device=mask.device)
    flags = (mask[::size].index_select(1, first // WORD) >> (first % WORD // 2).to(torch.int32)) & 1
    strips, start = [], 0
    for i, row in enumerate(flags.tolist()):
        kept = [slice(j * size, min((j + 1) * size, columns)) for j, flag in enumerate(row) if flag]
        places, end = [], 0
        for one in kept:
            places.append(slice(end, end + one.stop - one.start))
            end = places[-1].stop
        strips.append(Strip(i, slice(i * size, min((i + 1) * size, out)), kept, places, slice(start, start + end)))
        start += end
    index = torch.arange(columns, device=mask.device).expand(len(strips), -1)
    return Layout(strips, index[flags.bool().repeat_interleave(size, 1)[:, :columns]])


class StripWeights:
    """W' = W + beta U V of the kept blocks, strip by strip, in fp32 (float64 for a float64 weight)."""

    def __init__(self, operands: MaskedWeight, size: int):
        weight, U, V, beta = operands.weight, operands.factors.U, operands.factors.V, operands.scales.beta
        self.dtype = compute_dtype(weight.dtype)
        self.layout = layout(operands.mask, (weight.shape[0], weight.shape[1]), size)
        self.U = U.to(self.dtype)
        self.V = V.to(self.dtype).index_select(1, self.layout.gather)  # (r, columns of all strips)
        self.weight, self.beta, self.size = weight, beta, size
        widths = [strip.place.stop - strip.place.start for strip in self.layout.strips]
        # split at once: slices one by one cost as much as the small products that they are for
        self.parts = list(zip(weight.split(size), self.U.split(size), self.V.split(widths, 1), strict=True))

    def buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        """Room for all strips."""
        return buffers.get(name, (self.size * self.layout.gather.numel(),), dtype, self.weight.device)

    def of(self, strip: Strip, flat: Tensor) -> Tensor:
        """The place of a strip (rows, columns) in such a buffer."""
        height, width = strip.rows.stop - strip.rows.start, strip.place.stop - strip.place.start
        start = self.size * strip.place.start
        return flat[start : start + height * width].view(height, width)

    def updated(self, strip: Strip, flat: Tensor) -> Tensor:
        """W' of a strip, made in its place in `flat`."""
        rows, U, V = self.parts[strip.number]
        weight = side_by_side(rows, strip.columns).to(self.dtype)
        return torch.addmm(weight, U, V, alpha=self.beta, out=self.of(strip, flat))


def side_by_side(matrix: Tensor, columns: Sequence[slice]) -> Tensor:
    """Some columns of a matrix; a view where they are one run."""
    if len(columns) == 1 or columns[-1].stop - columns[0].start == sum(one.stop - one.start for one in columns):
        return matrix[:, columns[0].start : columns[-1].stop]
    return torch.cat([matrix[:, one] for one in columns], 1)


def block_forward(x: Tensor, operands: MaskedWeight, bias: Tensor | None, size: int) -> Tensor:
    """y = x (M * W')^T + bias for a mask of blocks."""
    weight = operands.weight
    by_strip = StripWeights(operands, size)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    # One pass for the bias, or for zeros where nothing is kept, costs less than a small one in front of every product.
    y.zero_() if bias is None else y.copy_(bias)
    flat, x_columns = by_strip.buffer("strips", by_strip.dtype), x.split(size, 1)
    for strip, out in zip(by_strip.layout.strips, y.split(size, 1), strict=True):
        if not strip.columns:
            continue
        right = by_strip.updated(strip, flat).to(x.dtype).t()
        if one_by_one(x, size):
            for columns, place in zip(strip.columns, strip.places, strict=True):
                out.addmm_(x_columns[columns.start // size], right[place])
        else:
            out.addmm_(side_by_side(x, strip.columns), right)
    return y


def kept_block_gradients(
    gy: Tensor, x: Tensor, operands: MaskedWeight, size: int, through_magnitude: bool, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dU and dV, with Q = G * M * (1 + |W'|), or G * M without `through_magnitude`, from kept blocks of G."""
    U, V, beta = operands.factors.U, operands.factors.V, operands.scales.beta
    by_strip = StripWeights(operands, size)
    flat = by_strip.buffer("strips", by_strip.dtype)
    gradients = by_strip.buffer("strips of G", gy.dtype)
    by_column: dict[int, list[tuple[slice, Tensor]]] = {}
    dU = by_strip.U.new_zeros(U.shape if needs.factors else 0)
    dV_strips = by_strip.V.new_empty(by_strip.V.shape if needs.factors else 0)
    for strip in by_strip.layout.strips:
        if not strip.columns:
            continue
        updated = by_strip.updated(strip, flat)
        if needs.input:
            cast = updated.to(gy.dtype)
            for columns, place in zip(strip.columns, strip.places, strict=True):
                by_column.setdefault(columns.start, []).append((strip.rows, cast[:, place]))
        if needs.factors:
            G = by_strip.of(strip, gradients)
            if one_by_one(x, size):
                for columns, place in zip(strip.columns, strip.places, strict=True):
                    torch.mm(gy[:, strip.rows].t(), x[:, columns], out=G[:, place])
            else:
                torch.mm(gy[:, strip.rows].t(), side_by_side(x, strip.columns), out=G)
            Q = G.to(by_strip.dtype)
            Q = torch.addcmul(Q, Q, updated.abs()) if through_magnitude else Q
            _, U_rows, V_columns = by_strip.parts[strip.number]
            torch.mm(Q, V_columns.t(), out=dU[strip.rows])
            torch.mm(U_rows.t(), Q, out=dV_strips[:, strip.place])
    dx = _dx(gy, x, by_column, size) if needs.input else gy.new_empty(0)
    if not needs.factors:
        return dx, dU, dV_strips
    dV = by_strip.V.new_zeros(V.shape).index_add_(1, by_strip.layout.gather, dV_strips)
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
