"""The calls that make the kernels for block patterns compile; see cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from pst_kernels.masks.packing import packed_width

from .. import block_gradients, block_lists, block_matmul
from ..tiles import tables
from .cases import BF16, FP16, FP32, Case, Layout, architecture, empty, pair_name

RAGGED = Layout(rows=1003, columns=1001)


def of_lists() -> Iterator[Case]:
    bits = empty(1024, packed_width(1024), dtype=torch.int32)
    yield Case("lists of blocks", partial(block_lists.list_blocks, bits, torch.Size((1024, 1024)), 64))


def of_matmul() -> Iterator[Case]:
    """Every size of blocks in both directions; the thickest with other dtypes, a high rank, ragged, few tokens."""
    for transposed in (False, True):
        for size in tables.BLOCK_SIZES:
            yield _matmul(Layout(), BF16, size, transposed)
        yield _matmul(Layout(FP16), FP16, 128, transposed)
        yield _matmul(Layout(FP32), BF16, 128, transposed)
        yield _matmul(Layout(FP32), FP32, 128, transposed)
        yield _matmul(Layout(rank=64), BF16, 128, transposed)
        yield _matmul(RAGGED, BF16, 128, transposed)
    yield _matmul(Layout(FP32, rank=64), FP32, 128, False)
    yield _matmul(Layout(), BF16, 128, False, tokens=16)


def _matmul(layout: Layout, x: torch.dtype, size: int, transposed: bool, tokens: int = 1024) -> Case:
    def call() -> None:
        operands = layout.operands()
        left = empty(tokens, layout.rows if transposed else layout.columns, dtype=x)
        kept = block_lists.list_blocks(operands.mask, operands.weight.shape, size)[transposed]
        block_matmul.block_matmul(left, operands, None, kept, size, transposed)

    few = tokens < 64
    name = _name("input gradient" if transposed else "forward", size, layout, x, "few tokens" * few)
    return Case(name, call, None if few else _budget(layout, x, size)[0])


def of_gradients() -> Iterator[Case]:
    for size in tables.BLOCK_SIZES:
        yield _gradients(Layout(), BF16, size)
    yield _gradients(Layout(FP16), FP16, 128)
    yield _gradients(Layout(FP32), BF16, 128)
    yield _gradients(Layout(FP32), FP32, 128)
    yield _gradients(Layout(rank=64), BF16, 128)
    yield _gradients(RAGGED, BF16, 128)
    yield _gradients(Layout(), BF16, 128, through=False)


def _gradients(layout: Layout, x: torch.dtype, size: int, through: bool = True) -> Case:
    def call() -> None:
        operands = layout.operands()
        gy, x_ = (empty(64, width, dtype=x) for width in operands.weight.shape)
        kept = block_lists.list_blocks(operands.mask, operands.weight.shape, size)
        block_gradients.block_factor_gradients(gy, x_, operands, size, through, kept)

    name = _name("factor gradients", size, layout, x, "not through |W'|" * (not through))
    return Case(name, call, _budget(layout, x, size)[1])


def _name(kind: str, size: int, layout: Layout, x: torch.dtype, note: str) -> str:
    """Such as "forward, blocks of 64, bfloat16, rank 8"."""
    shape = f"{layout.rows} x {layout.columns}" * (layout.rows % 2)
    details = [f"{kind}, blocks of {size}", pair_name(layout.weight, x), f"rank {layout.rank}", shape, note]
    return ", ".join(detail for detail in details if detail)


def _budget(layout: Layout, x: torch.dtype, size: int) -> tuple[float | None, float | None]:
    """Of a product and of the gradients; none where the case is not what BLOCK_SLOTS are for."""
    if layout.rows % size or size < 64 or layout.rank != 8 or not layout.weight == x == BF16:
        return None, None
    return tables.BLOCK_SLOTS.get(architecture(), (None, None))
