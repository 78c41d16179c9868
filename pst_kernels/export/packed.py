"""The packed form of a sparse weight, in which files hold it: the kept values and one bit a place.

Of a layer NAME a file holds two tensors. `NAME.weight` are the values as the layer itself holds them: those of a
`SparseLinear`, (kept,), chunk by chunk of 128 columns, in a chunk row by row, in a row column by column; those of a
`BlockSparseLinear`, (kept, B, B). The bits are uint8, a row of W or of its grid of blocks padded to whole bytes, the
lowest bit first: `NAME.weight_bits` (out, ceil(in / 8)), or `NAME.block_bits`. That is 16 + 1 / density bits a kept
16-bit weight. What a product needs beside the values (offsets and pointers, rows and columns of blocks) is made of the
bits when they are loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..layers.block_sparse_linear import BlockSparseLinear
from ..layers.sparse_linear import SparseLinear
from ..masks.chunks import CHUNK, chunks_of, fill_pointers

WEIGHT, WEIGHT_BITS, BLOCK_BITS = "weight", "weight_bits", "block_bits"
BYTES = CHUNK // 8  # of a row's bits in a chunk
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # in each byte
Compact = SparseLinear | BlockSparseLinear


class Shape(NamedTuple):
    """What the two tensors of a layer do not say."""

    out: int
    columns: int
    block: int = 0  # the size of its blocks; 0: single weights
    transposed: bool = False  # whether the dense weight is a Conv1D's, (in, out)

    @classmethod
    def of(cls, layer: Compact, transposed: bool = False) -> Shape:
        size = layer.block_size if isinstance(layer, BlockSparseLinear) else 0
        return cls(layer.out_features, layer.in_features, size, transposed)

    @property
    def bits(self) -> str:
        """The name of the bits."""
        return BLOCK_BITS if self.block else WEIGHT_BITS

    @property
    def grid(self) -> tuple[int, int]:
        """Places that have a bit."""
        size = self.block or 1
        return -(-self.out // size), -(-self.columns // size)

    def count(self, bits: Tensor) -> int:
        """How many weights or blocks the bits keep. Raises ValueError for what are no bits of this shape."""
        rows, width = self.grid
        if bits.dtype != torch.uint8 or bits.shape != (rows, -(-width // 8)):
            raise ValueError(f"bits of {bits.dtype} {tuple(bits.shape)}, not uint8 {(rows, -(-width // 8))}")
        packed = bits.numpy()
        if width % 8 and (packed[:, -1] >> width % 8).any():
            raise ValueError("bits beyond its columns")
        return int(_count(packed).sum())

    def values(self, kept: int) -> tuple[int, ...]:
        """The shape of so many values."""
        return (kept, self.block, self.block) if self.block else (kept,)


def pack(layer: Compact) -> dict[str, Tensor]:
    """The tensors of a layer by their names in it, on the CPU; the values are the layer's own."""
    values = layer.weight.detach().cpu()
    if isinstance(layer, BlockSparseLinear):
        rows, width = Shape.of(layer).grid
        kept = np.zeros((rows, width), bool)
        row = np.repeat(np.arange(rows), np.diff(layer.crow_indices.cpu().numpy()))
        kept[row, layer.col_indices.cpu().numpy()] = True
        return {WEIGHT: values, BLOCK_BITS: torch.from_numpy(np.packbits(kept, axis=1, bitorder="little"))}
    rows, width = layer.out_features, layer.in_features
    offsets, pointers = layer.offsets.cpu().numpy(), layer.pointers.cpu().numpy()
    bits = np.empty((rows, -(-width // 8)), np.uint8)
    for chunk in range(chunks_of(width)):
        runs = pointers[chunk * rows : (chunk + 1) * rows + 1]
        kept = np.zeros((rows, min(CHUNK, width - chunk * CHUNK)), bool)
        kept[np.repeat(np.arange(rows), np.diff(runs)), offsets[runs[0] : runs[-1]]] = True
        bits[:, chunk * BYTES : (chunk + 1) * BYTES] = np.packbits(kept, axis=1, bitorder="little")
    return {WEIGHT: values, WEIGHT_BITS: torch.from_numpy(bits)}


def lists(bits: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Offsets and pointers of a SparseLinear, on the device of its bits."""
    rows, packed = len(bits), bits.cpu().numpy()
    counts = np.empty((chunks_of(columns), rows), np.int64)
    offsets = []
    for chunk in range(len(counts)):
        width = min(CHUNK, columns - chunk * CHUNK)
        part = packed[:, chunk * BYTES : (chunk + 1) * BYTES]
        kept = np.unpackbits(part, axis=1, count=width, bitorder="little").view(bool)  # NumPy is fast on bool
        places = np.flatnonzero(kept)
        # of a whole chunk the low bits: a division of int64 takes longer than all else here
        offsets.append(places.astype(np.uint8) & (CHUNK - 1) if width == CHUNK else (places % width).astype(np.uint8))
        counts[chunk] = _count(part)
    pointers = np.empty(counts.size + 1, np.int32)
    fill_pointers(counts.ravel(), pointers)
    return torch.from_numpy(np.concatenate(offsets)).to(bits.device), torch.from_numpy(pointers).to(bits.device)


def blocks(bits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the blocks of a BlockSparseLinear whose grid is `width` blocks wide, on the bits' device."""
    kept = np.unpackbits(bits.cpu().numpy(), axis=1, count=width, bitorder="little")
    starts = np.append(0, kept.sum(1, dtype=np.int64).cumsum())
    columns = np.nonzero(kept)[1].astype(np.int64)
    return torch.from_numpy(starts).to(bits.device), torch.from_numpy(columns).to(bits.device)


def indices(shape: Shape, bits: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer of this shape holds beside its values."""
    return blocks(bits, shape.grid[1]) if shape.block else lists(bits, shape.columns)


def _count(bits: np.ndarray) -> np.ndarray:
    """How many bits of each row are set."""
    return _ONES[bits].sum(1, dtype=np.int64)


def empty(shape: Shape, kept: int, bias: bool, dtype: torch.dtype) -> Compact:
    """A layer on the meta device with room for so many kept weights or blocks."""
    layer: Compact
    if shape.block:
        layer = BlockSparseLinear(shape.columns, shape.out, shape.block, bias, "meta", dtype)
        own = (layer.weight, layer.crow_indices, layer.col_indices)
    else:
        layer = SparseLinear(shape.columns, shape.out, bias, "meta", dtype)
        own = (layer.weight, layer.offsets, layer.pointers)
    values, first, second = (tensor.detach() for tensor in own)
    sizes = (len(first), kept) if shape.block else (kept, len(second))
    layer._take(values.new_empty(shape.values(kept)), first.new_empty(sizes[0]), second.new_empty(sizes[1]))
    return layer


def unpack(shape: Shape, values: Tensor, bits: Tensor) -> Tensor:
    """The dense weight, as the layer held it that this one was made of."""
    layer = empty(shape, len(values), False, values.dtype)
    layer._take(values, *indices(shape, bits))
    dense = layer.to_dense()
    return (dense.T if shape.transposed else dense).contiguous()
