"""`pst-kernels tune`: time the neighbours of the shipped tiles on the GPU at hand, and write the file that
PST_KERNELS_TUNING reads. A tile that does not give the reference's result is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from pst_kernels import cpu
from pst_kernels.masks.packing import pack_mask
from pst_kernels.operands import Factors, MaskedWeight, Needs, Scales

from .. import block_gradients, block_lists, block_matmul, gradients, matmul, tiles

DTYPES = {
    "half": (torch.bfloat16, torch.bfloat16), "mixed": (torch.float32, torch.bfloat16),
    "float": (torch.float32, torch.float32),
}  # fmt: skip
SCALES = (1.0, 1.0, 1.0)
TOLERANCE = {"half": 2e-2, "mixed": 2e-2, "float": 1e-4}  # RMS error over RMS value: a wrong tile is off by about one
SWITCH_TOKENS = tuple(1 << n for n in range(4, 14))  # where the switch between the two ways is looked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens to time gradients and products with blocks with"
    )
    parser.add_argument(
        "--block-sizes", type=int, nargs="*", choices=tiles.BLOCK_SIZES, default=tiles.BLOCK_SIZES, metavar="SIZE",
        help="sizes of blocks to tune, default all: 16 32 64 128; without a number none",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(
            "pst-kernels tune times kernels on a GPU, and PyTorch finds none; here the shipped tables are used"
            " (`pst-kernels kernels` checks them without a GPU)", file=sys.stderr,
        )  # fmt: skip
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = tiles.architecture(device)
    found: dict[str, Any] = {
        "architecture": architecture, "device": torch.cuda.get_device_name(device),
        "matmul": {}, "gradients": {}, "in_loop_tokens": {}, "block_matmul": {}, "block_gradients": {},
    }  # fmt: skip
    os.environ.pop("PST_KERNELS_TUNING", None)  # the shipped tables are what is tuned, not an earlier run's
    for key in DTYPES:
        problem = _problem(key, args, device)
        rows = [
            (most, _best(_matmul_runs(problem, tile, min(most, 1024)), TOLERANCE[key]))
            for most, tile in tiles.MATMUL[architecture][key]
        ]
        found["matmul"][key] = [[most, list(tile[:5])] for most, tile in rows]
        found["in_loop_tokens"][key] = _switch(problem, rows)
        tile = tiles.GRADIENTS[architecture][key]
        found["gradients"][key] = list(_best(_gradient_runs(problem, tile, args.tokens, key), TOLERANCE[key])[:5])
        for table, runs in (("block_matmul", _block_matmul_runs), ("block_gradients", _block_gradient_runs)):
            if key in _TABLES[table][architecture]:
                found[table][key] = {
                    str(size): list(_best(runs(problem, args.tokens, key, size), TOLERANCE[key])[:5])
                    for size in args.block_sizes
                }
    write(args.output, found)
    print(f"wrote {args.output}; use it with PST_KERNELS_TUNING={args.output}")
    return 0


def neighbours(tile: tiles.Tile, columns: int = tiles.MATMUL_COLUMNS) -> list[tiles.Tile]:
    """The tile itself, and those with one side doubled or halved, or with other warps or stages.

    None has fewer than so many columns.
    """
    found = [tile]
    for name, smallest in (("rows", 32), ("columns", columns), ("depth", 32), ("warps", 4)):
        value = getattr(tile, name)
        found += [tile._replace(**{name: v}) for v in (value // 2, value * 2) if v >= smallest]
    found += [tile._replace(stages=stages) for stages in (tile.stages - 1, tile.stages + 1) if stages >= 1]
    return [tile for tile in found if tile.warps <= 16]


def write(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


Run = tuple[tiles.Tile, Callable[[], Any], list[Tensor]]  # a tile, a launch with it, and the results to expect


def _problem(key: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    weight, x = DTYPES[key]
    out, columns, rank = args.out_features, args.in_features, args.rank

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    mask = pack_mask(torch.rand((out, columns), generator=generator, device=device) > 0.5)
    return {
        "x": lambda tokens, width: normal(tokens, width, dtype=x), "weight": normal(out, columns, dtype=weight) * 0.02,
        "U": normal(out, rank), "V": normal(rank, columns) * 0.01, "A": normal(out, rank), "B": normal(rank, columns),
        "mask": mask, "split": x != torch.float32 and not tiles.interpreted(),
    }  # fmt: skip


def _operands(problem: dict[str, Any]) -> MaskedWeight:
    weight, U, V, A, B, mask = (problem[name] for name in ("weight", "U", "V", "A", "B", "mask"))
    R, C = (torch.zeros(n, device=weight.device) for n in weight.shape)
    return MaskedWeight(weight, Factors(U, V, A, B, R, C), mask, Scales(*SCALES))


def _matmul_runs(problem: dict[str, Any], tile: tiles.Tile, tokens: int) -> Iterator[Run]:
    """Forward and input gradient, which share a table."""
    weight = problem["weight"]
    x, gy = problem["x"](tokens, weight.shape[1]), problem["x"](tokens, weight.shape[0])
    operands = _operands(problem)
    y = cpu.linear_forward(x, operands, None)
    dx = cpu.linear_backward(gy, x, operands, True, Needs(True, False))[0]
    for other in neighbours(tile):

        def launch(tile: tiles.Tile = other) -> list[Tensor]:
            return _in_loop(problem, x, gy, tile)

        yield other, launch, [y, dx]


def _in_loop(problem: dict[str, Any], x: Tensor, gy: Tensor, tile: tiles.Tile) -> list[Tensor]:
    weight, mask = problem["weight"], problem["mask"]
    factors = matmul.split_factors(problem["U"], problem["V"], SCALES[0], problem["split"])
    return [
        matmul.masked_matmul(operand, weight, *factors, None, mask, tile, transposed)
        for operand, transposed in ((x, False), (gy, True))
    ]


def _made_first(problem: dict[str, Any], x: Tensor, gy: Tensor) -> list[Tensor]:
    operands = _operands(problem)
    y = x @ matmul.masked_in_scratch(operands, x.dtype).T
    return [y, gy @ matmul.masked_in_scratch(operands, x.dtype)]


def _switch(problem: dict[str, Any], rows: Sequence[tuple[int, tiles.Tile]]) -> int:
    """The most tokens, of SWITCH_TOKENS, up to which masking in the loop is the faster way; 0 if it never is."""
    most, (out, columns) = 0, problem["weight"].shape
    for tokens in SWITCH_TOKENS:
        tile = next(tile for limit, tile in rows if tokens <= limit)
        x, gy = problem["x"](tokens, columns), problem["x"](tokens, out)
        in_loop, made_first = (
            triton.testing.do_bench(launch)
            for launch in (partial(_in_loop, problem, x, gy, tile), partial(_made_first, problem, x, gy))
        )
        print(f"{tokens} tokens: {in_loop:.3f} ms masked in the loop, {made_first:.3f} ms with the weight made first")
        if in_loop > made_first:
            break
        most = tokens
    return most


def _gradient_runs(problem: dict[str, Any], tile: tiles.Tile, tokens: int, key: str) -> Iterator[Run]:
    weight, U, V, A, B, mask = (problem[name] for name in ("weight", "U", "V", "A", "B", "mask"))
    x, gy = problem["x"](tokens, weight.shape[1]), problem["x"](tokens, weight.shape[0])
    expected = cpu.linear_backward(gy, x, _operands(problem), True, Needs(False, True))[1:]
    table = tiles.GRADIENTS[tiles.architecture(x.device)]
    for other in neighbours(tile, tiles.GRADIENT_COLUMNS):

        def launch(tile: tiles.Tile = other) -> tuple[Tensor, ...]:
            shipped, table[key] = table[key], tile
            try:
                return gradients.factor_gradients(gy, x, weight, U, V, A, B, mask, *SCALES, True)
            finally:
                table[key] = shipped

        yield other, launch, list(expected)


_TABLES: dict[str, dict[str, dict[str, dict[int, tiles.Tile]]]] = {
    "block_matmul": tiles.BLOCK_MATMUL, "block_gradients": tiles.BLOCK_GRADIENTS,
}  # fmt: skip


def _block_matmul_runs(problem: dict[str, Any], tokens: int, key: str, size: int) -> Iterator[Run]:
    """Forward and input gradient with a tenth of the blocks, which share a table."""
    weight, U, V = (problem[name] for name in ("weight", "U", "V"))
    mask, M = _kept_blocks(problem, size)
    x, gy = problem["x"](tokens, weight.shape[1]), problem["x"](tokens, weight.shape[0])
    kept = ((weight.float() + SCALES[0] * U @ V) * M).to(x.dtype)
    by_columns = block_lists.lines(mask, weight.shape, size, block_matmul.COLUMNS)

    def launch() -> list[Tensor]:
        return [
            block_matmul.block_forward(x, _operands(problem)._replace(mask=mask), None, size),
            block_matmul.block_input_gradient(gy, weight, U, V, SCALES[0], by_columns, size),
        ]

    yield from _block_runs("block_matmul", key, size, launch, [x @ kept.T, gy @ kept])


def _block_gradient_runs(problem: dict[str, Any], tokens: int, key: str, size: int) -> Iterator[Run]:
    weight, U, V = (problem[name] for name in ("weight", "U", "V"))
    mask, M = _kept_blocks(problem, size)
    x, gy = problem["x"](tokens, weight.shape[1]), problem["x"](tokens, weight.shape[0])
    Q = gy.float().T @ x.float() * M * (1.0 + (weight.float() + SCALES[0] * U @ V).abs())
    by_rows, by_columns = (
        block_lists.lines(mask, weight.shape, size, of) for of in (block_matmul.ROWS, block_matmul.COLUMNS)
    )

    def launch() -> tuple[Tensor, Tensor]:
        return block_gradients.block_factor_gradients(gy, x, weight, U, V, SCALES[0], True, by_rows, by_columns, size)

    yield from _block_runs("block_gradients", key, size, launch, [SCALES[0] * Q @ V.T, SCALES[0] * U.T @ Q])


def _block_runs(table: str, key: str, size: int, launch: Callable[[], Any], expected: list[Tensor]) -> Iterator[Run]:
    """`launch` with each neighbour of a tile in its place in the table; its rows are the size of the blocks."""
    row = _TABLES[table][tiles.architecture(expected[0].device)][key]
    for other in neighbours(row[size]):
        if other.rows != size:
            continue

        def launch_with(tile: tiles.Tile = other) -> Any:
            shipped, row[size] = row[size], tile
            try:
                return launch()
            finally:
                row[size] = shipped

        yield other, launch_with, expected


def _kept_blocks(problem: dict[str, Any], size: int) -> tuple[Tensor, Tensor]:
    """A tenth of the blocks, as packed bits and as fp32 (out, columns); the first always, so that no result is zero."""
    weight = problem["weight"]
    flags = torch.rand(block_lists.grid_of(weight.shape, size), device=weight.device) < 0.1
    flags[0, 0] = True
    kept = flags.repeat_interleave(size, 0).repeat_interleave(size, 1)[: weight.shape[0], : weight.shape[1]]
    return pack_mask(kept), kept.float()


def _best(runs: Iterator[Run], tolerance: float) -> tiles.Tile:
    """The fastest tile that is right; the shipped one, which comes first, where no other is."""
    timed: list[tuple[float, tiles.Tile]] = []
    first, runs = itertools.tee(runs)
    shipped = next(first)[0]
    for tile, launch, expected in runs:
        try:
            results = launch()
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError) as error:
            print(f"{tuple(tile)[:5]}: {type(error).__name__}", file=sys.stderr)
            continue
        worst = max(
            float((r.double() - e.double()).norm() / e.double().norm()) for r, e in zip(results, expected, strict=True)
        )
        if not worst <= tolerance:
            print(f"{tuple(tile)[:5]}: wrong by {worst:.1e}, not timed", file=sys.stderr)
            continue
        timed.append((triton.testing.do_bench(launch), tile))
        print(f"{tuple(tile)[:5]}: {timed[-1][0]:.3f} ms")
    return min(timed, key=lambda pair: pair[0])[1] if timed else shipped
