"""The calls that make the kernels of a linear compile as a user's calls would, for the report on their machine code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pst_kernels.masks.packing import packed_width
from pst_kernels.operands import Factors, MaskedWeight, Needs, Scales, factor_shapes

from .. import gradients, group_mask, mask, matmul, score, select
from ..group_layer import LayerTensors
from ..group_table import MaskTable
from ..tiles import choice, tables, targets

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """One call of a launcher, on tensors of device "meta": they have a shape, a dtype and an aligned address, but no
    memory.

    machine_code.py replaces the launch, and takes kernel, signature, constexprs, attributes, warps and stages as Triton
    itself binds them. So a launcher must not look at values. Two cases that launch the same thing count once.

    A kernel whose main loop feeds tensor cores names the constexprs of its tile BLOCK_ROWS, BLOCK_COLUMNS and
    BLOCK_DEPTH: their product is the multiply-adds of one loop step, from which the issue slots per tensor-core cycle
    are computed.
    """

    name: str  # "bf16 weight, fp32 factors, aligned"
    call: Callable[[], object]
    slots: float | None = None  # budget: issue slots per tensor-core cycle that no main loop of the call may exceed


class Layout(NamedTuple):
    """What decides how a layer's kernels are compiled, besides the target: shape, ranks, dtypes and storage order."""

    weight: torch.dtype = BF16
    factors: torch.dtype = FP32
    rows: int = 1024
    columns: int = 1024
    rank: int = 8  # of both kinds
    transposed: bool = False  # whether W is stored transposed

    def operands(self) -> MaskedWeight:
        rows, columns = self.rows, self.columns
        weight = empty(*((columns, rows) if self.transposed else (rows, columns)), dtype=self.weight)
        shapes = factor_shapes((rows, columns), self.rank, self.rank)
        factors = Factors(*(empty(*shape, dtype=self.factors) for shape in shapes))
        mask = empty(rows, packed_width(columns), dtype=torch.int32)
        return MaskedWeight(weight.T if self.transposed else weight, factors, mask, Scales())


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pair_name(weight: torch.dtype, x: torch.dtype) -> str:
    """Such as "bfloat16", or "float32 W, bfloat16 x"."""
    names = [str(dtype).removeprefix("torch.") for dtype in (weight, x)]
    return names[0] if weight == x else f"{names[0]} W, {names[1]} x"


def architecture() -> str:
    """The target of `compiling_for`."""
    return targets.architecture(torch.device("meta"))


def swept() -> Iterator[tuple[str, MaskedWeight]]:
    """The layouts that the kernels for scores, threshold and mask are compiled for. Other ranks up to 64 differ in how
    often a loop is unrolled, or runs.
    """
    for dtype in (BF16, FP16, FP32):
        for factor in dict.fromkeys((FP32, dtype)):
            yield f"{dtype} weight, {factor} factors, rank 8", Layout(dtype, factor).operands()
    yield "bfloat16 weight of 512 columns, float32 factors, rank 8", Layout(rows=512, columns=512).operands()
    for rank in (16, 64):
        yield f"bfloat16 weight, float32 factors, rank {rank}", Layout(rank=rank).operands()
    yield "bfloat16 weight transposed, float32 factors, rank 8", Layout(transposed=True).operands()
    yield "bfloat16 weight unaligned, float32 factors, rank 5", Layout(rows=1023, columns=1023, rank=5).operands()


def of_scores() -> Iterator[Case]:
    for name, (weight, factors, _, scales) in swept():
        yield Case(name, partial(score.scores, weight, factors, scales))


def of_selection() -> Iterator[Case]:
    for name, (weight, factors, _, scales) in swept():
        num_pruned, guess = empty(dtype=torch.int64), empty(4)
        yield Case(name, partial(select.threshold, weight, factors, scales, num_pruned, guess))
    yield Case("scores", lambda: select.kth_value(empty(1 << 20), 1))


def of_masks() -> Iterator[Case]:
    for name, operands in swept():
        weight, factors, _, scales = operands
        state, masked = empty(16, dtype=torch.int64), empty(*weight.shape, dtype=weight.dtype)
        yield Case(name, partial(mask.mask_from, state, weight, factors, scales))
        yield Case(f"{name}, with the masked weight", partial(mask.mask_from, state, weight, factors, scales, masked))
        yield Case(name, partial(mask.masked_weight, operands, weight.dtype))


def of_tables() -> Iterator[Case]:
    """A table of one layer; fp16 compiles as bf16 does."""
    for name, (weight, factors, bits, scales) in swept():
        if weight.dtype != FP16:
            layer = LayerTensors(weight, factors, scales, empty(dtype=torch.int64), empty(4), bits, None)
            keep = layer._replace(masked=empty(*weight.shape, dtype=weight.dtype))
            yield Case(f"{name}, a table", partial(group_mask.prune_masks, MaskTable([layer])))
            yield Case(f"{name}, a table with masked weights", partial(group_mask.prune_masks, MaskTable([keep])))


def of_matmul() -> Iterator[Case]:
    """Every tile of the table with every dtype it serves, in both directions; the widest for bf16 W also
    with rank 16, and with W transposed.
    """
    pairs = {"half": [(BF16, BF16), (FP16, FP16)], "mixed": [(FP32, BF16), (FP32, FP16)], "float": [(FP32, FP32)]}
    for key, dtypes in pairs.items():
        table = tables.MATMUL[architecture()][key]
        for weight, x in dtypes:
            for transposed in (False, True):
                for _, tile in table:
                    yield _matmul(Layout(weight), x, tile, transposed)
                odd = (1001, 1003) if transposed else (1003, 1001)
                yield _matmul(Layout(weight, rows=odd[0], columns=odd[1]), x, tables.ODD[key], transposed)
                if weight == BF16:
                    yield _matmul(Layout(weight, rank=16), x, table[-1][1], transposed)
                    yield _matmul(Layout(weight, transposed=True), x, table[-1][1], transposed)


def _matmul(layout: Layout, x: torch.dtype, tile: tables.Tile, transposed: bool) -> Case:
    rows, depth = (layout.columns, layout.rows) if transposed else (layout.rows, layout.columns)

    def call() -> None:
        platform = targets.platform(torch.device("meta"))
        matmul.masked_matmul(empty(tile.columns, depth, dtype=x), layout.operands(), None, tile, platform, transposed)

    name = "input gradient" if transposed else "forward"
    details = [f"{rows} x {depth}"] * (rows % 2) + ["W transposed"] * layout.transposed
    return Case(", ".join([name, pair_name(layout.weight, x), f"rank {layout.rank}", *details]), call, tile.slots)


def of_gradients() -> Iterator[Case]:
    for weight, x in ((BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16), (FP32, FP32)):
        yield _gradients(Layout(weight), x)
    yield _gradients(Layout(FP32, rank=16), FP32)
    for rank in (5, 9, 15, 16, 64):
        yield _gradients(Layout(rank=rank), BF16)
    yield _gradients(Layout(FP32, rank=64), BF16)
    yield _gradients(Layout(BF16, BF16), BF16)
    yield _gradients(Layout(FP16, FP16), FP16)
    yield _gradients(Layout(rows=960), BF16)
    for weight in (BF16, FP32):
        yield _gradients(Layout(weight, rows=1003, columns=1001), weight)
    yield _gradients(Layout(transposed=True), BF16)
    yield _gradients(Layout(), BF16, through=False)
    for dtype, key in ((BF16, "half"), (FP16, "half"), (FP32, "float")):
        yield _gradients(Layout(dtype), dtype, tokens=tables.G_STORED_TOKENS[key])
    for through in (True, False):  # while the scores rest, or the mask is fixed
        yield _gradients(Layout(), BF16, through=through, scores=False)
        for dtype, key in ((BF16, "half"), (FP32, "float")):
            yield _gradients(Layout(dtype), dtype, tables.G_STORED_TOKENS[key], through, scores=False)
        for rank in (16, 64):
            yield _gradients(Layout(rank=rank), BF16, through=through, scores=False)
    yield _gradients(Layout(rows=1003, columns=1001), BF16, through=False, scores=False)


def _gradients(layout: Layout, x: torch.dtype, tokens: int = 32, through: bool = True, scores: bool = True) -> Case:
    weight, factors, rows, columns, rank, transposed = layout

    def call() -> None:
        gy, x_ = empty(tokens, rows, dtype=x), empty(tokens, columns, dtype=x)
        if scores:
            gradients.factor_gradients(gy, x_, layout.operands(), through)
        else:
            gradients.rested_backward(gy, x_, layout.operands(), through, Needs(False, True))

    few_ranks = choice.few_ranks(architecture(), 2 * rank if scores else rank)
    tile = choice.gradients(architecture(), x, weight, rows, columns, rank + scores, few_ranks)
    odd, g_stored = rows % 2 == 1, tokens >= tables.G_STORED_TOKENS[choice.dtype_key(x, weight)]
    details = [f"{rows} x {columns}"] * (rows != 1024) + ["W transposed"] * transposed
    details += [f"factors {factors}".replace("torch.", "")] * (factors != FP32)
    details += ["G stored"] * g_stored + ["not through |W'|"] * (not through) + ["U and V alone"] * (not scores)
    name = ", ".join(["factor gradients", pair_name(weight, x), f"rank {rank}", *details])
    return Case(name, call, None if odd or g_stored else tile.slots)
