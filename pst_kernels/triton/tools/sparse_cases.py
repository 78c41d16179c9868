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

ODD = (1003, 1001)


def of_products() -> Iterator[Case]:
    """Every tile of the table in both directions with the dtypes it serves; the first of each odd, and with fp32 values
    besides; W written out.
    """
    table = tables.SPARSE_MATMUL[architecture()]
    for transposed in (False, True):
        for dtype, key in ((BF16, "half"), (FP16, "half"), (FP32, "float")):
            for tokens, tile in table[key]:
                yield _product(dtype, dtype, tokens, transposed, slots=_budget(tile) if dtype == BF16 else None)
            yield _product(dtype, dtype, table[key][0][0], transposed, ODD)
        yield _product(FP32, BF16, table["half"][0][0], transposed)
    for dtype in (BF16, FP16, FP32):
        lists = _lists(dtype, (1024, 1024))
        yield Case(
            f"W written out, {pair_name(dtype, dtype)}", partial(sparse_matmul.expanded, *lists, (1024, 1024), dtype)
        )


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
    weight: torch.dtype, x: torch.dtype, tokens: int, transposed: bool, shape: tuple[int, int] = (1024, 1024),
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
