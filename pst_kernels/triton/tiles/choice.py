"""Which tile a call runs with: the user's where a tuning file has one, else the shipped one."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from . import tables, versions
from .tables import Tile
from .targets import TARGETS, Platform, cdiv, interpreted
from .tuning_file import tuned


def dtype_key(x: torch.dtype, weight: torch.dtype) -> str:
    """The row of a table: fp32 x, 16-bit x with an fp32 weight, or both of 16 bits."""
    if x == torch.float32:
        return "float"
    return "mixed" if weight == torch.float32 else "half"


def matmul(architecture: str, x: torch.dtype, weight: torch.dtype, tokens: int, depth: int, rank: int) -> Tile | None:
    """The tile that a masked matmul masks in its loop with, or None where the masked weight shall be made first."""
    key = dtype_key(x, weight)
    split = Platform(architecture, interpreted()).pairs(x)
    users = tuned(architecture)
    table = users.matmul.get(key) or tables.MATMUL[architecture][key]
    tile = next(tile for most, tile in table if tokens <= most)
    odd = depth % tile.depth != 0
    if key == "float":
        most = tables.FLOAT_TOKENS
    else:
        target = TARGETS[architecture]
        most = int(4.0 * target.rate / (target.bandwidth * (tables.ODD_SLOTS if odd else tables.SLOTS[architecture])))
        most = min(most, tables.IN_LOOP_TOKENS.get(architecture, most))
    if tokens > users.in_loop_tokens.get(key, most) or factor_width(rank, split) > tables.WIDEST_FACTOR:
        return None
    return tables.ODD[key] if odd else tile


def gradients(
    architecture: str, x: torch.dtype, weight: torch.dtype, rows: int, columns: int, ranks: int, few_ranks: bool,
    g_stored: bool = False,
) -> Tile:  # fmt: skip
    """The tile of G that a program of the gradient kernel makes, or reads; `ranks` is the number of sums of a row."""
    key = dtype_key(x, weight)
    tile = tuned(architecture).gradients.get(key) or _gradients(architecture, key, g_stored)
    whole = rows % tile.rows == 0 and columns % tile.columns == 0
    if whole and (few_ranks or (key == "float" and ranks <= 16)):
        return tile
    most, medium = (0, tile) if key == "float" else tables.MEDIUM[architecture]
    fits = ranks <= most and rows % medium.rows == 0 and columns % medium.columns == 0
    return medium if fits else tables.SMALL[key]


def _gradients(architecture: str, key: str, g_stored: bool) -> Tile:
    tile = tables.GRADIENTS[architecture][key]
    if g_stored and key != "float":
        tile = tables.G_STORED_TILES.get(architecture, tile)
    elif g_stored:
        tile = tile._replace(rows=min(tile.rows, versions.G_STORED_FLOAT_ROWS.get(architecture, tile.rows)))
    return tile._replace(columns=min(tile.columns, versions.GRADIENT_COLUMNS.get(architecture, tile.columns)))


def block_matmul(
    architecture: str, x: torch.dtype, weight: torch.dtype, tokens: int, size: int, width: int, ragged: bool
) -> Tile:
    """The tile of a product with blocks of `size`; `width` is that of the padded factors."""
    key = dtype_key(x, weight)
    users = tuned(architecture).block_matmul.get(key, {})
    tile = users.get(size) or tables.BLOCK_MATMUL[architecture][key][size]
    if ragged:
        tile = tile._replace(columns=min(tile.columns, 64), depth=32, stages=2)
    if width > tables.FACTOR_PART[key]:  # their parts are loaded within a step, which leaves nothing to pipeline
        warps = 8 if key == "float" else tile.warps
        depth = 16 if key == "float" and size == 128 else 32  # 32 spill on sm_80 with Triton 3.6
        tile = tile._replace(columns=min(tile.columns, 32), depth=depth, warps=warps, stages=1)
    return tile._replace(columns=min(tile.columns, 32)) if tokens <= tables.FEW_TOKENS else tile


def block_gradients(architecture: str, x: torch.dtype, size: int, rank: int, ragged: bool) -> Tile:
    """The tile of G that a program of the gradient kernel makes for blocks of `size`."""
    key = "float" if x == torch.float32 else "half"
    users = tuned(architecture).block_gradients.get(key, {})
    tile = users.get(size) or _block_gradients(architecture, key, size)
    if ragged:
        tile = tile._replace(depth=min(tile.depth, 32))
    return tile._replace(columns=min(tile.columns, 64)) if ragged or rank > 16 else tile


def _block_gradients(architecture: str, key: str, size: int) -> Tile:
    tile = tables.BLOCK_GRADIENTS[architecture][key][size]
    depth, stages = versions.BLOCK_GRADIENTS.get(architecture, {}).get(size, (tile.depth, tile.stages))
    return tile if key == "float" else tile._replace(depth=depth, stages=stages)


def sparse_matmul(architecture: str, x: torch.dtype, tokens: int) -> Tile:
    """The tile of a product with packed weights, for at most SPARSE_TOKENS tokens."""
    table = tables.SPARSE_MATMUL[architecture]["float" if x == torch.float32 else "half"]
    return next(tile for most, tile in table if tokens <= most)


def listed_matmul(tokens: int, kept: float, weights: int) -> bool:
    """Whether y is made from the lists: of few tokens, and where there are no more products than weights.

    On an H100 a token takes 13, 19 and 40 us by lists where 10, 20 and 50 % of 4,096 x 4,096 are kept, and 25, 25 and
    35 us by tiles; eight tokens 22 and 25 us at 10 %. Lists are 3 bytes a kept 16-bit weight in the place of 2 and a
    bit for each: at 8 tokens and an eighth kept, 1.07 times as much.
    """
    return tokens <= tables.LISTED_TOKENS and kept * tokens <= weights


def steps_per_split(architecture: str, tiles: int, depth: int, length: int) -> int:
    """How many steps of `length` a program takes of the depth of a product with packed weights.

    The depth is cut into as many parts as give every multiprocessor a program, or up to four where the sums of the
    parts are little beside the weights.
    """
    processors, steps = TARGETS[architecture].multiprocessors, cdiv(depth, length)
    splits = max(1, processors // tiles, min(4 * processors // tiles, depth // tables.SPARSE_DEPTH))
    return cdiv(steps, min(splits, steps))


def few_ranks(architecture: str, ranks: int) -> bool:
    """Whether a program holds the factors of W' and of S side by side; `ranks` is the number of both together."""
    return architecture in tables.FEW_RANKS and ranks <= 16


def mask_at_once(architecture: str, ranks: int) -> bool:
    return architecture in tables.MASK_AT_ONCE and ranks == 16


def gradient_parts(architecture: str, columns: int, g_stored: bool) -> int:
    """In how many parts of its columns a tile is reduced; where G is stored, its own offsets take registers."""
    return max(1, columns // (32 if g_stored else tables.GRADIENT_PART.get(architecture, 32)))


@functools.lru_cache(maxsize=256)
def sweep_length(architecture: str, tile: Tile, across: int, down: int, tokens: int, ranks: int) -> int:
    """How many of the `across` tiles of each of `down` rows a program of the gradient kernel makes one after another.

    A longer sweep reads the strips of two factors and stores and reads the sums of `ranks` columns less often, but may
    leave multiprocessors idle: the length with the least time for both is taken, each number of programs that the
    device runs at a time being one round.
    """
    target = TARGETS[architecture]
    resident = target.multiprocessors * max(1, 8 // tile.warps)  # each has the registers of 8 warps
    a_tile = (tokens + tables.REDUCTION_TOKENS) * tile.rows * tile.columns * resident / target.multiprocessors
    a_sweep = 3 * 4 * ranks * tile.rows * down  # bytes: strips read, sums stored, sums read

    def time(steps: int) -> float:
        sweeps = cdiv(across, steps)
        rounds = cdiv(sweeps * down, resident)
        return rounds * steps * a_tile * target.multiprocessors / target.rate + sweeps * a_sweep / target.bandwidth

    return min(range(1, across + 1), key=time)


def tokens_per_split(architecture: str, number: int, tokens: int, depth: int) -> int:
    """How many tokens a program sums over, in whole loop steps: not all where the tiles of G leave processors idle."""
    split_k = max(1, min(TARGETS[architecture].multiprocessors // number, tokens // tables.SPLIT_K_TOKENS))
    return cdiv(cdiv(tokens, split_k), depth) * depth


class GradientPlan(NamedTuple):
    """How the six factor gradients of one call are made; the grid is (sweeps, down, split_k)."""

    tile: Tile
    few_ranks: bool
    g_stored: bool  # whether the library makes G
    sweep_length: int  # tiles of a sweep
    sweeps: int  # of a row of tiles
    down: int  # rows of tiles
    tokens_per_split: int
    split_k: int
    parts: int  # in which the columns of a tile are reduced
    words_at_once: bool  # whether a tile loads its words of the mask once


def gradient_plan(
    architecture: str, x: torch.dtype, weight: torch.dtype, shape: tuple[int, int], tokens: int,
    ranks: tuple[int, int], scores: bool = True,
) -> GradientPlan:  # fmt: skip
    """For a weight of this shape and ranks (of W', of S); without `scores` U and V alone get a gradient."""
    (rows, columns), (rank_w, rank_s) = shape, ranks
    sums_w, sums_s = rank_w, rank_s + 1
    if not scores:
        rank_s = sums_s = 0
    few = few_ranks(architecture, rank_w + rank_s)
    g_stored = tokens >= tables.G_STORED_TOKENS[dtype_key(x, weight)]
    tile = gradients(architecture, x, weight, rows, columns, max(sums_w, sums_s), few, g_stored)
    if g_stored:
        most = versions.G_STORED_COLUMNS_OF.get(architecture, versions.G_STORED_COLUMNS)
        tile = tile._replace(columns=min(tile.columns, most))
    across, down = cdiv(columns, tile.columns), cdiv(rows, tile.rows)
    a_split = tokens if g_stored else tokens_per_split(architecture, across * down, tokens, tile.depth)
    split_k = cdiv(tokens, a_split)
    length, multiplied = 1, 0 if g_stored else a_split
    if few:
        length = sweep_length(architecture, tile, across, down * split_k, multiplied, sums_w + sums_s)
    return GradientPlan(
        tile, few, g_stored, length, cdiv(across, length), down, a_split, split_k,
        gradient_parts(architecture, tile.columns, g_stored), mask_at_once(architecture, rank_w + rank_s),
    )  # fmt: skip


def factor_width(rank: int, split: bool) -> int:
    """Columns of a padded factor: a power of two from 16, as tensor cores take them; `split` holds three parts."""
    return max(16, triton.next_power_of_2(3 * rank if split else rank))
