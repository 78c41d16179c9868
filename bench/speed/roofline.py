"""What a training step must cost on a GPU at least: bytes and operations of every pass, from arithmetic. Not measured.

A pass takes at least max(bytes / bandwidth, operations / GEMM speed). Bytes are compulsory traffic, every operand once;
what a tile grid reads again comes from the second-level cache and stands in its own column, from the kernels' own tiles
where the package has them. Passes follow one another, so their floors add up.
"""

from __future__ import annotations

import argparse
import csv
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pst_kernels.files import replacing

from ..console import Table, console
from ..tables.rows import RESULTS
from . import host
from .cases import SHAPES, Shape, short

RANK = 8  # of U V and of A B
LABEL = "computed"


class Device(NamedTuple):
    """Published figures of one GPU; `gemm` is what a good library GEMM reaches of `peak` in 16-bit types."""

    name: str
    architecture: str
    bandwidth: float  # bytes/s
    peak: float  # dense 16-bit FLOP/s
    gemm: float


# peak and bandwidth from the vendors' data sheets; gemm 650 of 989 TFLOP/s on H100, the same share elsewhere
DEVICES = {
    "a100": Device("NVIDIA A100 SXM 80 GB", "sm_80", 2.04e12, 312e12, 205e12),
    "h100": Device("NVIDIA H100 SXM", "sm_90", 3.35e12, 989e12, 650e12),
    "h200": Device("NVIDIA H200 SXM", "sm_90", 4.8e12, 989e12, 650e12),
}


class Tile(NamedTuple):
    """Output tile of a GEMM: it reads a strip of `rows` of one operand and a strip of `columns` of the other."""

    rows: int
    columns: int

    def down(self, shape: Shape) -> int:
        """Tiles along the rows of W."""
        return -(-shape.out // self.rows)

    def across(self, shape: Shape) -> int:
        return -(-shape.columns // self.columns)


class Tiles(NamedTuple):
    """What the kernels run with: of the masked products (None: the library's GEMM on a scratch weight) and of G."""

    forward: Tile | None
    backward: Tile | None
    gradients: Tile
    split_k: int  # how many programs split the tokens of one tile of G, each with sums of its own
    width: int  # of the product that adds beta U V in the loop: the rank, padded and split as the kernel multiplies it
    source: str
    sweep: int = 1  # tiles of G side by side that a program makes, adding up the sums of their rows
    g_stored: bool = False  # whether the library makes G, and the kernel reads its tiles


@dataclass(frozen=True)
class Pass:
    name: str
    nbytes: float  # compulsory memory traffic
    operations: float
    cache_bytes: float = 0.0  # read again by the tile grid, from the second-level cache at best

    def floor(self, device: Device) -> float:
        """Seconds."""
        return max(self.nbytes / device.bandwidth, self.operations / device.gemm)

    def bound(self, device: Device) -> str:
        return "memory" if self.nbytes / device.bandwidth > self.operations / device.gemm else "GEMM"


def gemm(name: str, rows: int, columns: int, depth: int, size: int, tile: Tile | None = None) -> Pass:
    """(rows x depth) @ (depth x columns), all of `size` bytes an element."""
    again = 0.0
    if tile is not None:
        strips = -(-columns // tile.columns) * rows * depth + -(-rows // tile.rows) * columns * depth
        again = float(size * (strips - rows * depth - columns * depth))
    nbytes = size * (rows * depth + columns * depth + rows * columns)
    return Pass(name, float(nbytes), 2.0 * rows * columns * depth, again)


def dense_step(shape: Shape, tokens: int, size: int, adamw_bytes: int) -> list[Pass]:
    """Full fine-tuning: three GEMMs and AdamW over W. `adamw_bytes` a weight, see `ADAMW`."""
    out, columns = shape.out, shape.columns
    return [
        gemm("forward GEMM", tokens, out, columns, size),
        gemm("dx GEMM", tokens, columns, out, size),
        gemm("dW GEMM", out, columns, tokens, size),
        Pass("AdamW over W", float(adamw_bytes * shape.numel), 14.0 * shape.numel),
    ]


# Bytes a weight that AdamW reads and writes: parameter and two moments read and written, gradient read.
ADAMW = {"fp32 state": 3 * 8 + 2, "16-bit state": 3 * 4 + 2}
IN_LOOP, SCRATCH = "masked in the loop", "masked weight made once"


def pst_step(shape: Shape, tokens: int, size: int, tiles: Tiles) -> list[Pass]:
    """Ours: threshold, mask bits, masked products, factor gradients from one G, AdamW."""
    out, columns, numel = shape.out, shape.columns, shape.numel
    factors = 2 * RANK * (out + columns) + out + columns
    low_rank = 2.0 * numel * RANK  # one product of rank RANK over all of W
    bits = numel / 8
    # per weight: two low-rank products, an absolute value and four additions; then one comparison
    passes = [
        Pass("threshold, warm", size * numel + 4.0 * factors, 2 * low_rank + 6.0 * numel),
        Pass("mask bits", size * numel + bits + 4.0 * factors, 2 * low_rank + 6.0 * numel),
    ]
    for name, tile, product in (
        ("forward", tiles.forward, gemm("forward GEMM", out, tokens, columns, size, tiles.forward)),
        ("dx", tiles.backward, gemm("dx GEMM", columns, tokens, out, size, tiles.backward)),
    ):
        if tile is None:
            passes += [Pass(f"masked weight for {name}", 2.0 * size * numel + bits, low_rank + 2.0 * numel), product]
        else:  # every strip of tokens unpacks the bits and adds beta U V again
            strips = -(-tokens // tile.columns)
            operations = product.operations + strips * 2.0 * numel * tiles.width
            passes.append(
                Pass(product.name, product.nbytes + bits, operations, product.cache_bytes + (strips - 1) * bits)
            )
    # For the gradients W' and four small products of each tile of G
    reduction = 5 * low_rank + 6.0 * numel
    # sums for U, A, R along each row of tiles and for V, B, C along each column, fp32, added up in a fixed order
    sums = out * -(-tiles.gradients.across(shape) // tiles.sweep) + columns * tiles.gradients.down(shape)
    partial = 4.0 * (2 * RANK + 1) * sums * tiles.split_k
    if tiles.g_stored:
        passes.append(gemm("G GEMM", out, columns, tokens, size))
        passes.append(Pass("factor gradients from G", 2.0 * size * numel + bits + partial, reduction))
    else:  # G stays in the accumulator: in place of writing it W is read, for the gate
        G = gemm("G GEMM with factor gradients", out, columns, tokens, size, tiles.gradients)
        passes.append(Pass(G.name, G.nbytes + bits + partial, G.operations + reduction, G.cache_bytes))
    passes.append(Pass("reduce partial sums", partial + 4.0 * factors, partial / 4.0))
    passes.append(Pass("AdamW over the factors", 28.0 * factors, 14.0 * factors))
    return passes


ASSUMED, SHIPPED = "assumed", "shipped"
IN_LOOP_TOKENS = 2048  # assumed up to here; break-even by arithmetic lies between 1.3 k and 3.3 k tokens


def shipped_tiles(architecture: str, shape: Shape, tokens: int, dtype: torch.dtype) -> Tiles:
    """From the table that the Triton kernels use; assumed ones where triton or the kernels are not there."""
    try:
        table: Any = importlib.import_module("pst_kernels.triton.tiles.choice")
        products = [table.matmul(architecture, dtype, dtype, tokens, d, RANK) for d in (shape.columns, shape.out)]
        forward, backward = (None if t is None else Tile(t.rows, t.columns) for t in products)
        plan = table.gradient_plan(architecture, dtype, dtype, (shape.out, shape.columns), tokens, (RANK, RANK))
        gradients, width = Tile(plan.tile.rows, plan.tile.columns), table.factor_width(RANK, True)
        return Tiles(
            forward, backward, gradients, plan.split_k, width, SHIPPED, plan.sweep_length, g_stored=plan.g_stored
        )
    except (ImportError, AttributeError):
        in_loop = Tile(128, 256 if tokens > 128 else 64) if tokens <= IN_LOOP_TOKENS else None
        return Tiles(in_loop, in_loop, Tile(128, 128), 1, RANK, ASSUMED)


class Line(NamedTuple):
    """One pass of one case, as the CSV has it."""

    label: str
    device: str
    shape: str
    out_features: int
    in_features: int
    tokens: int
    dtype: str
    step: str
    step_pass: str
    way: str
    megabytes: float
    gigaflop: float
    cache_megabytes: float
    floor_us: float
    bound: str
    tiles: str


def lines(device: Device, shapes: Iterable[Shape], token_counts: Iterable[int], dtype: torch.dtype) -> Iterator[Line]:
    kind = short(dtype)
    for shape in shapes:
        for tokens in token_counts:
            tiles = shipped_tiles(device.architecture, shape, tokens, dtype)
            steps = {f"dense, {name}": dense_step(shape, tokens, dtype.itemsize, n) for name, n in ADAMW.items()}
            steps["PST"] = pst_step(shape, tokens, dtype.itemsize, tiles)
            for step, passes in steps.items():
                way = "" if step != "PST" else IN_LOOP if tiles.forward else SCRATCH
                for one in passes:
                    yield Line(
                        LABEL, device.name, shape.name, shape.out, shape.columns, tokens, kind, step, one.name, way,
                        round(one.nbytes / 1e6, 3), round(one.operations / 1e9, 3), round(one.cache_bytes / 1e6, 3),
                        round(1e6 * one.floor(device), 3), one.bound(device), tiles.source if step == "PST" else "",
                    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="shapes whose name holds one of these")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 256, 1024, 4096, 16384], metavar="T")
    parser.add_argument("--passes", action="store_true", help="every pass of every case, not the totals alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for roofline_DEVICE.csv")


def main(options: argparse.Namespace) -> int:
    device = DEVICES[options.device]
    shapes = [s for s in SHAPES if not options.shapes or any(t.lower() in s.name.lower() for t in options.shapes)]
    if not shapes:
        raise ValueError(f"--shapes matches none of {', '.join(shape.name for shape in SHAPES)}")
    if min(options.tokens) < 1:
        raise ValueError(f"--tokens must be at least 1, got {min(options.tokens)}")
    found = list(lines(device, shapes, options.tokens, torch.bfloat16))
    out = console()
    out.print(
        f"[bold]Computed, not measured:[/bold] {device.name}, {device.bandwidth / 1e12:g} TB/s,"
        f" {device.gemm / 1e12:.0f} of {device.peak / 1e12:.0f} TFLOP/s taken for a good GEMM; bf16, ranks {RANK}."
    )
    out.print(_totals(found, options.output))
    if options.passes:
        out.print(_passes(found))
    path = options.output / f"roofline_{options.device}.csv"
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Line._fields, *found])
    out.print(f"{len(found)} computed rows written to {path}")
    return 0


def _totals(found: list[Line], results: Path) -> Table:
    """With the host's time beside the device's where `python -m bench host` has left it in `results`: the longer of
    the two is what a layer takes.
    """
    table = Table(title="floor of one training step, us (computed; with host: the longer of this and the host's time)")
    for name in (
        "shape",
        "T",
        *(f"dense, {s}" for s in ADAMW),
        "PST",
        *(f"PST / dense, {s}" for s in ADAMW),
        "dense with host",
        "PST with host",
        "way",
        "tiles",
    ):
        table.add_column(name, justify="left" if name in ("shape", "way", "tiles") else "right")
    cases: dict[tuple[str, int], dict[str, list[Line]]] = {}
    for line in found:
        cases.setdefault((line.shape, line.tokens), {}).setdefault(line.step, []).append(line)
    for (shape, tokens), steps in cases.items():
        total = {step: sum(line.floor_us for line in passes) for step, passes in steps.items()}
        dense = [total[f"dense, {name}"] for name in ADAMW]
        first = steps["PST"][0]
        of_host = host.of_shape(results, shape)
        longer = [
            "-" if name not in of_host else f"{max(device, of_host[name]):.1f}"
            for name, device in ((host.DENSE, dense[0]), (host.KEEP, total["PST"]))
        ]
        table.add_row(
            shape, str(tokens), *(f"{d:.1f}" for d in dense), f"{total['PST']:.1f}",
            *(f"{total['PST'] / d:.2f}" for d in dense), *longer, first.way, first.tiles,
        )  # fmt: skip
    return table


def _passes(found: list[Line]) -> Table:
    table = Table(title="passes (computed): compulsory bytes, operations, what tiles read again, floor")
    for name in ("shape", "T", "step", "pass", "MB", "GFLOP", "MB again", "floor us", "bound"):
        table.add_column(name, justify="left" if name in ("shape", "step", "pass", "bound") else "right")
    for x in found:
        table.add_row(
            x.shape, str(x.tokens), x.step, x.step_pass, f"{x.megabytes:.1f}", f"{x.gigaflop:.1f}",
            f"{x.cache_megabytes:.1f}", f"{x.floor_us:.1f}", x.bound,
        )  # fmt: skip
    return table
