"""SparseRows: a weight (out, in) as lists of its kept weights, in the order in which a CPU's products read them."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks.chunks import CHUNK, chunks_of, fill_pointers
from ..masks.packing import pack_mask, packed_width, unpack_mask
from ..operands import FLOATING
from . import compiled

DTYPES = (torch.float32, torch.bfloat16)


class SparseRows(NamedTuple):
    """The kept weights by chunks of CHUNK columns; in a chunk row by row, in a row by column.

    Row i's part of chunk c is entries pointers[c * rows + i] to pointers[c * rows + i + 1]; the column of an entry is
    c * CHUNK + offsets[entry]. So 5 bytes a kept fp32 weight, 3 in bf16, and 4 a row and chunk.
    """

    values: Tensor  # (kept,); products take fp32 and bf16
    offsets: Tensor  # uint8 (kept,)
    pointers: Tensor  # int32 (chunks * rows + 1,)
    rows: int  # out
    columns: int  # in

    @classmethod
    def from_mask(cls, weight: Tensor, mask: Tensor) -> SparseRows:
        """Of a weight (out, in), of any strides, and a packed mask (see masks/packing.py).

        What the weight holds where the mask has no bit is never looked at: W' serves as well as M * W'. Raises
        TypeError or ValueError for a dtype, device or shape that does not fit.
        """
        _check_weight(weight)
        rows, columns = weight.shape
        if mask.dtype != torch.int32 or mask.shape != (rows, packed_width(columns)):
            raise ValueError(
                f"mask must be int32 of shape {(rows, packed_width(columns))} for weight {(rows, columns)}, as"
                f" pack_mask makes it, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        weight = weight.detach()
        passes = compiled_passes(weight) if weight.numel() else None
        if passes is None:
            return _in_plain_torch(weight, unpack_mask(mask, columns))
        return cls(*passes.lists(weight, mask.contiguous()))

    @classmethod
    def from_dense(cls, weight: Tensor, kept: Tensor | None = None) -> SparseRows:
        """The weights (out, in) that `kept` says, bool (out, in), or that are not zero; NaN is not zero."""
        return cls.from_mask(weight, pack_mask(weight.detach() != 0 if kept is None else kept))

    def transpose(self) -> SparseRows:
        """The lists of W^T: what dx = gy W is computed from. Costs one pass over the lists."""
        passes = compiled_passes(self.values) if len(self.values) else None
        if passes is not None:
            return SparseRows(*passes.transposed(self))
        row, column = self.places()
        order = torch.argsort(torch.div(row, CHUNK, rounding_mode="floor") * self.columns + column, stable=True)
        return _of_sorted(self.values[order], column[order], row[order], self.columns, self.rows)

    def with_values(self, values: Tensor) -> SparseRows:
        """The same places with other values."""
        return self._replace(values=values)

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of every entry, int64 (kept,) each."""
        counts = self.pointers.diff().to(torch.int64)
        run = torch.repeat_interleave(counts, output_size=len(self.values))  # told of it, a GPU is not waited for
        chunk = torch.div(run, max(1, self.rows), rounding_mode="floor")
        return run - chunk * self.rows, chunk * CHUNK + self.offsets.to(torch.int64)

    def to_dense(self) -> Tensor:
        """The weight (out, in), zero where it is not kept."""
        dense = self.values.new_zeros((self.rows, self.columns))
        dense[self.places()] = self.values
        return dense


def compiled_passes(*tensors: Tensor) -> ModuleType | None:
    """The compiled passes where they take tensors of these devices and dtypes, or None.

    Raises ImportError where PST_KERNELS_CPU=numba and Numba cannot be had.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPES or not tensor.is_cpu:
            return None
    return compiled.module("sparse_launch", "multiplies unstructured zeros as dense on the CPU")


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.dtype not in FLOATING:
        raise TypeError(
            "weight must be 2-d (out, in) of float32, float16, bfloat16 or float64, got"
            f" {weight.dtype} of shape {tuple(weight.shape)}"
        )


def _in_plain_torch(weight: Tensor, kept: Tensor) -> SparseRows:
    rows, columns = weight.shape
    row, column = kept.nonzero(as_tuple=True)
    order = torch.argsort(torch.div(column, CHUNK, rounding_mode="floor"), stable=True)
    row, column = row[order], column[order]
    return _of_sorted(weight[row, column], row, column, rows, columns)


def _of_sorted(values: Tensor, row: Tensor, column: Tensor, rows: int, columns: int) -> SparseRows:
    chunk = torch.div(column, CHUNK, rounding_mode="floor")
    counts = torch.bincount(chunk * rows + row, minlength=chunks_of(columns) * rows)
    pointers = torch.empty(len(counts) + 1, dtype=torch.int32)
    fill_pointers(counts.cpu().numpy(), pointers.numpy())
    return SparseRows(values, (column - chunk * CHUNK).to(torch.uint8), pointers.to(values.device), rows, columns)
