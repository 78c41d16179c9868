"""The user's own tiles: a JSON file that `pst-kernels tune` writes and PST_KERNELS_TUNING names."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from pst_kernels import env

from .tables import BLOCK_SIZES, GRADIENT_COLUMNS, MATMUL_COLUMNS, ODD, Tile
from .targets import TARGETS, setting


@dataclass(frozen=True)
class Tuned:
    """What stands in place of the shipped tables, by the same keys; what is absent is as shipped."""

    matmul: dict[str, tuple[tuple[int, Tile], ...]] = field(default_factory=dict)
    gradients: dict[str, Tile] = field(default_factory=dict)
    in_loop_tokens: dict[str, int] = field(default_factory=dict)
    block_matmul: dict[str, dict[int, Tile]] = field(default_factory=dict)
    block_gradients: dict[str, dict[int, Tile]] = field(default_factory=dict)


_used: contextvars.ContextVar[Tuned | None] = contextvars.ContextVar("tuned", default=None)


def using(tables: Tuned) -> contextlib.AbstractContextManager[None]:
    """Inside, launchers choose from `tables` before the shipped ones, whatever file a variable names."""
    return setting(_used, tables)


def tuned(architecture: str) -> Tuned:
    """Those of `using`, else of the file that PST_KERNELS_TUNING names if it is for this architecture, else none."""
    used = _used.get()
    if used is not None:
        return used
    path = env.tuning_file()
    if path is None:
        return Tuned()
    found, tables = _read(path, path.stat().st_mtime_ns)
    return tables if found == architecture else Tuned()


@functools.lru_cache(maxsize=8)
def _read(path: Path, _modified: int) -> tuple[str, Tuned]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["architecture"] not in TARGETS:
            raise ValueError(f"architecture is {data['architecture']!r}, not one of {', '.join(TARGETS)}")
        keys = set[str]().union(*(data[name].keys() for name in (one.name for one in fields(Tuned))))
        if keys - ODD.keys():
            raise ValueError(f"dtypes are {sorted(keys)}, but only {', '.join(ODD)} are known")
        matmul = {key: tuple((int(most), _tile(tile)) for most, tile in rows) for key, rows in data["matmul"].items()}
        if any(not rows or rows[-1][0] < 1 << 30 for rows in matmul.values()):
            raise ValueError("the last row of each matmul table must go up to at least 1073741824 tokens")
        gradients = {key: _tile(tile, GRADIENT_COLUMNS) for key, tile in data["gradients"].items()}
        tokens = {key: int(most) for key, most in data["in_loop_tokens"].items()}
        of_blocks = {
            name: {
                key: {int(size): _block_tile(size, tile) for size, tile in sizes.items()}
                for key, sizes in data[name].items()
            }
            for name in ("block_matmul", "block_gradients")
        }
    except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"PST_KERNELS_TUNING={str(path)!r} is not a tuning file ({type(error).__name__}: {error});"
            " write one with `pst-kernels tune`, or unset the variable"
        ) from error
    return data["architecture"], Tuned(matmul, gradients, tokens, **of_blocks)


def _tile(numbers: list[int], columns: int = MATMUL_COLUMNS, fewest: int = 32) -> Tile:
    tile = Tile(*(int(n) for n in numbers))
    powers = all(n > 0 and n & (n - 1) == 0 for n in tile[:4])
    small = min(tile.rows, tile.depth) < fewest or tile.columns < columns
    if len(numbers) != 5 or not powers or tile.stages < 1 or small:
        raise ValueError(
            f"tile {numbers}: need [rows, columns, depth, warps, stages], powers of two but for stages,"
            f" rows and depth from {fewest}, columns from {columns}"
        )
    return tile


def _block_tile(size: str, numbers: list[int]) -> Tile:
    tile = _tile(numbers, fewest=16)
    if int(size) not in BLOCK_SIZES or tile.rows != int(size):
        raise ValueError(f"tile {numbers} for blocks of {size}: blocks are of {BLOCK_SIZES}, and rows are their size")
    return tile
