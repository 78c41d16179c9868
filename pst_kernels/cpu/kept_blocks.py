"""Products with a weight of which only blocks are stored, y = x W^T + bias, and dx = gy W.

The blocks of W (out, in) are stored transposed, (kept, in, out), in row-major order of W's blocks, with the indices of
torch's BSR: `rows` (row i has blocks rows[i] to rows[i + 1]) and `columns`. Blocks at W's edges are filled up with
zeros. Transposed they lie as the product reads them. `python -m bench blocks` times the product beside torch's BSR.
On a CPU few tokens go through a compiled pass, many through one product of the library a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import compiled, scratch


class BlockPosition(NamedTuple):
    """Where a block lies: its row and column among the blocks, and what of it is inside the weight."""

    row: int
    column: int
    height: int  # outputs
    width: int  # inputs


def positions(rows: Tensor, columns: Tensor, shape: tuple[int, int], size: int) -> Iterator[BlockPosition]:
    """Of every block, in order; `shape` is the weight's (out, in)."""
    kept = columns.tolist()
    for i, (start, end) in enumerate(_runs(rows)):
        for j in kept[start:end]:
            yield BlockPosition(i, j, min(size, shape[0] - i * size), min(size, shape[1] - j * size))


def _multiply_blocks(
    x: Tensor, blocks: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, out_features: int
) -> Tensor:
    """y (T, out) from x (T, in): one product a block, straight on columns of x and y."""
    size, shape = blocks.shape[1], (out_features, x.shape[1])
    y = x.new_empty((x.shape[0], out_features))
    y.zero_() if bias is None else y.copy_(bias)
    # split once: slices one by one cost time beside the small products that they are for
    inputs, outputs = x.split(size, 1), y.split(size, 1)
    if x.element_size() > 2:
        for block, at in zip(blocks.unbind(), positions(rows, columns, shape, size), strict=True):
            outputs[at.row].addmm_(inputs[at.column], block[: at.width, : at.height])
        return y
    # 16-bit sums would be rounded after every block: all inputs of a row of blocks in one product
    for i, (out, (start, end)) in enumerate(zip(outputs, _runs(rows), strict=True)):
        if start < end:
            chosen = torch.cat([inputs[j] for j in columns[start:end].tolist()], 1)
            height = min(size, out_features - i * size)
            out.addmm_(chosen, blocks[start:end].view(-1, size)[: chosen.shape[1], :height])
    return y


def transpose(blocks: Tensor, rows: Tensor, columns: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks and indices of W^T."""
    size = blocks.shape[1]
    order = torch.sort(columns, stable=True).indices
    its_rows = starts(torch.bincount(columns, minlength=-(-in_features // size)))
    return blocks[order].transpose(1, 2).contiguous(), its_rows, row_of_each(rows)[order]


def starts(counts: Tensor) -> Tensor:
    """`rows` for numbers of blocks in each row."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def row_of_each(rows: Tensor) -> Tensor:
    """int64 (kept,): the row of every block."""
    return torch.repeat_interleave(rows.diff())


def _multiply_bsr(
    x: Tensor, blocks: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, out_features: int
) -> Tensor:
    """The same by torch's block-sparse product, which takes whole blocks only: x is filled up with zeros, y cut."""
    size = blocks.shape[1]
    shape = (size * (len(rows) - 1), size * -(-x.shape[1] // size))
    weight = torch.sparse_bsr_tensor(rows, columns, blocks.transpose(1, 2).contiguous(), shape, check_invariants=False)
    y = (weight @ pad(x, (0, shape[1] - x.shape[1])).t()).t()[:, :out_features]
    return (y if bias is None else y + bias).contiguous()


def _runs(rows: Tensor) -> Iterator[tuple[int, int]]:
    """First block and end of every row."""
    return itertools.pairwise(rows.tolist())


def forward(x: Tensor, blocks: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, out_features: int) -> Tensor:
    """y = x W^T + bias; x (T, in), blocks and bias of x's floating dtype."""
    if x.device.type != "cpu":
        return _multiply_bsr(x, blocks, bias, rows, columns, out_features)
    passes = compiled.module("block_passes", "multiplies few tokens by stored blocks in plain PyTorch")
    if passes is not None and passes.takes(x, blocks, rows, columns):
        return passes.product(x, blocks, bias, rows, columns, out_features, scratch.get)
    return _multiply_blocks(x, blocks, bias, rows, columns, out_features)


def backward(gy: Tensor, blocks: Tensor, rows: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """dx = gy W, the same product with the blocks of W^T."""
    transposed, its_rows, its_columns = transpose(blocks, rows, columns, in_features)
    return forward(gy, transposed, None, its_rows, its_columns, in_features)
