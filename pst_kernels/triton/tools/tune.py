"""`pst-kernels tune`: time the neighbours of the shipped tiles on the GPU at hand, and write the file that
PST_KERNELS_TUNING reads. A tile that does not give the reference's result is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pst_kernels import cpu
from pst_kernels.files import write_json
from pst_kernels.masks.packing import pack_mask
from pst_kernels.operands import Factors, MaskedWeight, Needs, Scales

from .. import block_gradients, block_lists, block_matmul, gradients, matmul
from ..tiles import tables, targets
from ..tiles.tables import Tile
from ..tiles.tuning_file import Tuned, using

DTYPES = {
    "half": (torch.bfloat16, torch.bfloat16), "mixed": (torch.float32, torch.bfloat16),
    "float": (torch.float32, torch.float32),
}  # fmt: skip
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
        "--block-sizes", type=int, nargs="*", choices=tables.BLOCK_SIZES, default=tables.BLOCK_SIZES, metavar="SIZE",
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
    architecture = targets.architecture(device)
    found: dict[str, Any] = {
        "architecture": architecture, "device": torch.cuda.get_device_name(device),
        "matmul": {}, "gradients": {}, "in_loop_tokens": {}, "block_matmul": {}, "block_gradients": {},
    }  # fmt: skip
    with using(Tuned()):  # the shipped tables are what is tuned, not an earlier run's file
        for key in DTYPES:
            _tune(key, found, args, device)
    write_json(args.output, found)
    print(f"wrote {args.output}; use it with PST_KERNELS_TUNING={args.output}")
    return 0


def _tune(key: str, found: dict[str, Any], args: argparse.Namespace, device: torch.device) -> None:
    """Fill `found` for one kind of dtypes."""
    architecture, tolerance, problem = found["architecture"], TOLERANCE[key], _problem(key, args, device)
    rows = [
        (most, _best(_matmul_runs(problem, tile, min(most, 1024)), tolerance))
        for most, tile in tables.MATMUL[architecture][key]
    ]
    found["matmul"][key] = [[most, list(tile[:5])] for most, tile in rows]
    found["in_loop_tokens"][key] = _switch(problem, rows)
    tile = tables.GRADIENTS[architecture][key]
    found["gradients"][key] = list(_best(_gradient_runs(problem, tile, args.tokens, key), tolerance)[:5])
    for table, runs in (("block_matmul", _block_matmul_runs), ("block_gradients", _block_gradient_runs)):
        if key in _TABLES[table][architecture]:
            found[table][key] = {
                str(size): list(_best(runs(problem, args.tokens, key, size), tolerance)[:5])
                for size in args.block_sizes
            }


def neighbours(tile: Tile, columns: int = tables.MATMUL_COLUMNS) -> list[Tile]:
    """The tile itself, and those with one side doubled or halved, or with other warps or stages.

    None has fewer than so many columns.
    """
    found = [tile]
    for name, smallest in (("rows", 32), ("columns", columns), ("depth", 32), ("warps", 4)):
        value = getattr(tile, name)
        found += [tile._replace(**{name: v}) for v in (value // 2, value * 2) if v >= smallest]
    found += [tile._replace(stages=stages) for stages in (tile.stages - 1, tile.stages + 1) if stages >= 1]
    return [tile for tile in found if tile.warps <= 16]


Run = tuple[Tile, Callable[[], Any], list[Tensor]]  # a tile, a launch with it, and the results to expect


class Problem(NamedTuple):
    """What is timed: a masked weight, and x or gy for it of so many tokens and columns."""

    operands: MaskedWeight
    x: Callable[[int, int], Tensor]


def _problem(key: str, args: argparse.Namespace, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    weight, x = DTYPES[key]
    out, columns, rank = args.out_features, args.in_features, args.rank

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    mask = pack_mask(torch.rand((out, columns), generator=generator, device=device) > 0.5)
    W, U, V = normal(out, columns, dtype=weight) * 0.02, normal(out, rank), normal(rank, columns) * 0.01
    A, B, R, C = normal(out, rank), normal(rank, columns), torch.zeros(out), torch.zeros(columns)
    factors = Factors(U, V, A, B, R.to(device), C.to(device))
    return Problem(MaskedWeight(W, factors, mask, Scales()), lambda tokens, width: normal(tokens, width, dtype=x))


def _both(problem: Problem, tokens: int) -> tuple[Tensor, Tensor]:
    """x and gy."""
    out, columns = problem.operands.weight.shape
    return problem.x(tokens, columns), problem.x(tokens, out)


def _matmul_runs(problem: Problem, tile: Tile, tokens: int) -> Iterator[Run]:
    """Forward and input gradient, which share a table."""
    x, gy = _both(problem, tokens)
    y = cpu.linear_forward(x, problem.operands, None)
    dx = cpu.linear_backward(gy, x, problem.operands, True, Needs(True, False))[0]
    for other in neighbours(tile):
        yield other, partial(_in_loop, problem, x, gy, other), [y, dx]


def _in_loop(problem: Problem, x: Tensor, gy: Tensor, tile: Tile) -> list[Tensor]:
    platform = targets.platform(x.device)
    return [
        matmul.masked_matmul(operand, problem.operands, None, tile, platform, transposed)
        for operand, transposed in ((x, False), (gy, True))
    ]


def _made_first(problem: Problem, x: Tensor, gy: Tensor) -> list[Tensor]:
    platform = targets.platform(x.device)
    y = x @ matmul.masked_for_library(problem.operands, x.dtype, platform).T
    return [y, gy @ matmul.masked_for_library(problem.operands, x.dtype, platform)]


def _switch(problem: Problem, rows: Sequence[tuple[int, Tile]]) -> int:
    """The most tokens, of SWITCH_TOKENS, up to which masking in the loop is the faster way; 0 if it never is."""
    most = 0
    for tokens in SWITCH_TOKENS:
        tile = next(tile for limit, tile in rows if tokens <= limit)
        x, gy = _both(problem, tokens)
        in_loop, made_first = (
            triton.testing.do_bench(launch)
            for launch in (partial(_in_loop, problem, x, gy, tile), partial(_made_first, problem, x, gy))
        )
        print(f"{tokens} tokens: {in_loop:.3f} ms masked in the loop, {made_first:.3f} ms with the weight made first")
        if in_loop > made_first:
            break
        most = tokens
    return most


def _gradient_runs(problem: Problem, tile: Tile, tokens: int, key: str) -> Iterator[Run]:
    x, gy = _both(problem, tokens)
    expected = cpu.linear_backward(gy, x, problem.operands, True, Needs(False, True))[1:]
    for other in neighbours(tile, tables.GRADIENT_COLUMNS):

        def launch(tile: Tile = other) -> tuple[Tensor, ...]:
            with using(Tuned(gradients={key: tile})):
                return gradients.factor_gradients(gy, x, problem.operands, True)

        yield other, launch, list(expected)


_TABLES: dict[str, dict[str, dict[str, dict[int, Tile]]]] = {
    "block_matmul": tables.BLOCK_MATMUL, "block_gradients": tables.BLOCK_GRADIENTS,
}  # fmt: skip


def _block_matmul_runs(problem: Problem, tokens: int, key: str, size: int) -> Iterator[Run]:
    """Forward and input gradient with a tenth of the blocks, which share a table."""
    operands, M, updated = _kept_blocks(problem, size)
    x, gy = _both(problem, tokens)
    kept = (updated * M).to(x.dtype)
    by_columns = block_lists.list_blocks(operands.mask, operands.weight.shape, size).columns

    def launch() -> list[Tensor]:
        return [
            block_matmul.block_forward(x, operands, None, size),
            block_matmul.block_input_gradient(gy, operands, by_columns, size),
        ]

    yield from _block_runs("block_matmul", key, size, launch, [x @ kept.T, gy @ kept])


def _block_gradient_runs(problem: Problem, tokens: int, key: str, size: int) -> Iterator[Run]:
    operands, M, updated = _kept_blocks(problem, size)
    beta, U, V = operands.scales.beta, operands.factors.U, operands.factors.V
    x, gy = _both(problem, tokens)
    Q = gy.float().T @ x.float() * M * (1.0 + updated.abs())
    lists = block_lists.list_blocks(operands.mask, operands.weight.shape, size)

    def launch() -> tuple[Tensor, Tensor]:
        return block_gradients.block_factor_gradients(gy, x, operands, size, True, lists)

    yield from _block_runs("block_gradients", key, size, launch, [beta * Q @ V.T, beta * U.T @ Q])


def _block_runs(table: str, key: str, size: int, launch: Callable[[], Any], expected: list[Tensor]) -> Iterator[Run]:
    """`launch` with each neighbour of a tile in its place; its rows are the size of the blocks."""
    for other in neighbours(_TABLES[table][targets.architecture(expected[0].device)][key][size]):
        if other.rows != size:
            continue

        def launch_with(tile: Tile = other) -> Any:
            changed: Any = {key: {size: tile}}
            with using(Tuned(**{table: changed})):
                return launch()

        yield other, launch_with, expected


def _kept_blocks(problem: Problem, size: int) -> tuple[MaskedWeight, Tensor, Tensor]:
    """The operands with a tenth of the blocks, which these are as fp32 (out, columns), and W' in fp32.

    The first block is kept always, so that no result is zero.
    """
    weight, factors, _, scales = problem.operands
    flags = torch.rand(block_lists.grid_of(weight.shape, size), device=weight.device) < 0.1
    flags[0, 0] = True
    kept = flags.repeat_interleave(size, 0).repeat_interleave(size, 1)[: weight.shape[0], : weight.shape[1]]
    updated = weight.float() + scales.beta * factors.U @ factors.V
    return problem.operands._replace(mask=pack_mask(kept)), kept.float(), updated


def _best(runs: Iterator[Run], tolerance: float) -> Tile:
    """The fastest tile that is right; the shipped one, which comes first, where no other is."""
    timed: list[tuple[float, Tile]] = []
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
