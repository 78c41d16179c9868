"""The calls that make the kernels for packed weights compile; see cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from pst_kernels.masks.chunks import chunks_of

from .. import sparse_matmul
from ..tiles import tables
from ..tiles.targets import TARGETS
from .cases import BF16, FP16, FP32, Case, architecture, empty, pair_name

EVEN, ODD = (1024, 1024), (1003, 1001)


def of_products() -> Iterator[Case]:
    """Every tile of the table in both directions; the first one also with an odd shape, and for 16-bit x with fp16 and
    with fp32 values; W written out.
    """
    table = tables.SPARSE_MATMUL[architecture()]
    first = table["half"][0][0]
    for transposed in (False, True):
        for tokens, tile in table["half"]:
            yield _product(BF16, BF16, tokens, transposed, slots=_budget(tile))
        for tokens, _ in table["float"]:
            yield _product(FP32, FP32, tokens, transposed)
        for weight, x, shape in ((BF16, BF16, ODD), (FP32, FP32, ODD), (FP16, FP16, EVEN), (FP32, BF16, EVEN)):
            yield _product(weight, x, first, transposed, shape)
    for dtype in (BF16, FP32):
        yield Case(
            f"W written out, {pair_name(dtype, dtype)}",
            partial(sparse_matmul.expanded, *_lists(dtype, EVEN), EVEN, dtype),
        )


def of_lists() -> Iterator[Case]:
    """Products of very few tokens: each number that one is compiled for, and other dtypes."""
    for tokens in (1, 2, 4, 8):
        yield _product(BF16, BF16, tokens, False)
    for weight, x in ((FP32, FP32), (FP16, FP16), (FP32, BF16)):
        for tokens in (1, 8):
            yield _product(weight, x, tokens, False)


def _budget(tile: tables.Tile) -> float | None:
    """SPARSE_INSTRUCTIONS as issue slots per tensor-core cycle; none for gfx942, whose code is not read."""
    name = architecture()
    if name.startswith("gfx"):
        return None
    # 128 threads' instructions are issued a cycle, each for one weight, which has a multiply-add a token
    return round(tables.SPARSE_INSTRUCTIONS * TARGETS[name].fma_per_cycle / (128 * tile.columns), 3)


def _lists(dtype: torch.dtype, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pointers = empty(chunks_of(shape[1]) * shape[0] + 1, dtype=torch.int32)
    return empty(4096, dtype=dtype), empty(4096, dtype=torch.uint8), pointers


def _product(
    weight: torch.dtype, x: torch.dtype, tokens: int, transposed: bool, shape: tuple[int, int] = EVEN,
    slots: float | None = None,
) -> Case:  # fmt: skip
    def call() -> None:
        left, lists = empty(tokens, shape[0 if transposed else 1], dtype=x), _lists(weight, shape)
        if transposed:
            sparse_matmul.sparse_input_gradient(left, *lists, shape[1])
        else:
            sparse_matmul.sparse_forward(left, *lists, None, shape[0])

    direction = "input gradient" if transposed else "forward"
    name = [
        f"{direction}, packed",
        pair_name(weight, x),
        f"{tokens} tokens",
        f"{shape[0]} x {shape[1]}" * (shape == ODD),
    ]
    return Case(", ".join(filter(None, name)), call, slots)
