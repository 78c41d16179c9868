"""Which tile a kernel runs with: tables by architecture, dtype and shape bucket, with their budgets beside them.

Also what every kernel file needs to say about its launches: the target at hand, and `Case`, one call that makes the
kernels of a file compile, from which `compile.py` takes each shipped configuration.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .. import env


class Target(NamedTuple):
    """What one architecture offers a thread block, a multiprocessor and the whole device."""

    capability: int | str
    warp_size: int
    shared_block: int  # bytes
    shared_multiprocessor: int  # bytes
    registers: int  # 32-bit, a multiprocessor
    warps: int  # resident, a multiprocessor
    fma_per_cycle: int  # dense 16-bit tensor-core multiply-adds of a multiprocessor
    multiprocessors: int
    bandwidth: float  # bytes a second, of device memory
    rate: float  # 16-bit multiply-adds a second that a good GEMM reaches


TARGETS = {
    "sm_80": Target(80, 32, 166912, 167936, 65536, 64, 1024, 108, 2.0e12, 125e12),
    "sm_86": Target(86, 32, 101376, 102400, 65536, 48, 512, 84, 0.94e12, 32e12),
    "sm_89": Target(89, 32, 101376, 102400, 65536, 48, 512, 128, 1.0e12, 75e12),
    "sm_90": Target(90, 32, 232448, 233472, 65536, 64, 2048, 132, 3.35e12, 325e12),
    "sm_100": Target(100, 32, 232448, 233472, 65536, 64, 4096, 148, 8.0e12, 790e12),
    "sm_120": Target(120, 32, 101376, 102400, 65536, 48, 1024, 170, 1.8e12, 95e12),
    "gfx942": Target("gfx942", 64, 65536, 65536, 131072, 32, 2048, 304, 5.3e12, 325e12),
}

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[None]:
    """Inside, launchers choose the tiles of `architecture`, whatever device or variable says otherwise."""
    token = _target.set(architecture)
    try:
        yield
    finally:
        _target.reset(token)


def architecture(device: torch.device) -> str:
    """The name of the target that a launch on `device` chooses its tiles for, a key of TARGETS."""
    return _target.get() or env.architecture() or _architecture_of(device)


@functools.cache
def _architecture_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_80"  # the interpreter, which any table suits
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(t.capability for t in TARGETS.values() if isinstance(t.capability, int))
    at_most = [c for c in known if c <= 10 * major + minor]
    if not at_most:
        raise RuntimeError(
            f"this GPU has compute capability {major}.{minor}, but the kernels need 8.0; set PST_KERNELS_BACKEND=torch"
        )
    return f"sm_{at_most[-1]}"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bf16 arithmetic is wrong and which has no inline assembly."""
    return triton.knobs.runtime.interpret


class Case(NamedTuple):
    """One call of a launcher that makes its kernels compile as a user's call would.

    Every kernel file has `cases() -> Iterator[Case]`: one for each configuration, dtype and variant that it ships for
    the target of `compiling_for`. `call` runs the launcher on tensors of device "meta" (`torch.empty(...,
    device="meta")`, which have a shape, a dtype and an aligned address, but no memory); `compile.py` replaces the
    launch, and takes kernel, signature, constexprs, attributes, warps and stages as Triton itself binds them. So a
    launcher must not look at values. Two cases that launch the same thing count once.

    A kernel whose main loop feeds tensor cores names the constexprs of its tile BLOCK_ROWS, BLOCK_COLUMNS and
    BLOCK_DEPTH: their product is the multiply-adds of one loop step, from which the issue slots per tensor-core cycle
    are computed.
    """

    name: str  # "bf16 weight, fp32 factors, aligned"
    call: Callable[[], object]
    slots: float | None = None  # budget: issue slots per tensor-core cycle that no main loop of the call may exceed


class Tile(NamedTuple):
    """What one program computes, and with what: rows x columns, stepping over depth."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    slots: float | None = None  # budget of the main loop: issue slots per tensor-core cycle, read from machine code


# The masked matmul's rows are the weight's (of its transpose for the input gradient), columns are tokens, depth is what
# is summed over. By the number of tokens up to which a tile is used; ODD where depth is no multiple of the tile's.
Table = dict[str, tuple[tuple[int, Tile], ...]]
ODD = {"half": Tile(64, 32, 32, 4, 2), "mixed": Tile(64, 32, 32, 4, 2), "float": Tile(32, 32, 32, 4, 2)}
_FLOAT = ((16, Tile(32, 16, 32, 4, 3)), (1 << 30, Tile(32, 32, 32, 4, 3)))
_AMPERE: Table = {
    "half": ((16, Tile(64, 16, 64, 4, 4)), (64, Tile(64, 64, 64, 4, 3)), (1 << 30, Tile(128, 128, 64, 8, 3, 0.65))),
    "mixed": ((16, Tile(64, 16, 64, 4, 3)), (1 << 30, Tile(64, 64, 64, 4, 3))),
    "float": _FLOAT,
}
_SMALL_SHARED: Table = {
    "half": ((16, Tile(64, 16, 64, 4, 3)), (64, Tile(64, 64, 64, 4, 3)), (1 << 30, Tile(128, 128, 64, 8, 2, 0.55))),
    "mixed": ((16, Tile(64, 16, 64, 4, 3)), (1 << 30, Tile(64, 64, 64, 4, 2))),
    "float": _FLOAT,
}
_HOPPER: Table = {
    "half": (
        (16, Tile(64, 16, 128, 4, 3)), (64, Tile(64, 64, 64, 4, 4)), (128, Tile(128, 128, 64, 8, 3, 0.95)),
        (1 << 30, Tile(128, 256, 64, 8, 3, 0.52)),
    ),
    "mixed": ((16, Tile(64, 16, 64, 4, 3)), (1 << 30, Tile(128, 128, 64, 8, 3))),
    "float": _FLOAT,
}  # fmt: skip
_BLACKWELL: Table = {
    "half": ((16, Tile(64, 16, 64, 4, 4)), (64, Tile(64, 64, 64, 4, 4)), (1 << 30, Tile(128, 128, 64, 8, 3))),
    "mixed": ((16, Tile(64, 16, 64, 4, 3)), (1 << 30, Tile(128, 128, 64, 8, 3))),
    "float": _FLOAT,
}
_AMD: Table = {
    "half": ((16, Tile(64, 16, 64, 4, 2)), (1 << 30, Tile(64, 64, 64, 4, 2))),
    "mixed": ((16, Tile(64, 16, 64, 4, 2)), (1 << 30, Tile(64, 64, 32, 4, 2))),
    "float": _FLOAT,
}
MATMUL: dict[str, Table] = {
    "sm_80": _AMPERE, "sm_86": _SMALL_SHARED, "sm_89": _SMALL_SHARED, "sm_90": _HOPPER, "sm_100": _BLACKWELL,
    "sm_120": _SMALL_SHARED, "gfx942": _AMD,
}  # fmt: skip

# Factor gradients: rows and columns of G, depth in tokens. The budget is the plain GEMM of the same tile plus 10 %.
# Where the registers cannot hold U beside A and V beside B (STACKED), and where a matrix is no multiple of the tile, it
# is the MEDIUM tile for as many sums a row (ranks, and one for R) as it has room for, where the matrix is a multiple of
# it, else the SMALL one.
_FLOAT_GRADIENTS = Tile(32, 32, 32, 4, 2)
GRADIENTS: dict[str, dict[str, Tile]] = {
    name: {"half": half, "mixed": half, "float": _FLOAT_GRADIENTS}
    for name, half in {
        "sm_80": Tile(128, 128, 32, 8, 3, 0.40), "sm_86": Tile(128, 128, 32, 8, 3, 0.23),
        "sm_89": Tile(128, 128, 32, 8, 3, 0.23), "sm_90": Tile(128, 128, 64, 8, 3, 0.32),
        "sm_100": Tile(128, 128, 64, 8, 3), "sm_120": Tile(128, 128, 32, 8, 3, 0.45), "gfx942": Tile(64, 64, 32, 4, 2),
    }.items()
}  # fmt: skip
_MEDIUM = 16, Tile(128, 64, 32, 8, 3)
MEDIUM = {  # with the most sums that it is used for
    "sm_80": (16, Tile(64, 64, 32, 4, 3)), "sm_86": _MEDIUM, "sm_89": _MEDIUM,
    "sm_90": (1 << 30, Tile(64, 64, 64, 4, 3)), "sm_100": (1 << 30, Tile(64, 64, 64, 4, 3)), "sm_120": _MEDIUM,
    "gfx942": (16, Tile(64, 64, 32, 4, 2)),
}  # fmt: skip
SMALL = {"half": Tile(64, 32, 32, 4, 3), "mixed": Tile(64, 32, 32, 4, 3), "float": Tile(32, 32, 32, 8, 2)}

STACKED = tuple(name for name in TARGETS if name != "gfx942")  # for up to 16 ranks of both kinds together
GRADIENT_PART = {"sm_100": 64}  # columns of a tile that are reduced at a time, others: 32

# Where a tile loads its words of the mask once, with 16 ranks. Elsewhere that spills or lengthens the main loop: a word
# is loaded by the four threads that need it, which is one access to the cache.
MASK_AT_ONCE = ("sm_90", "sm_100")

MATMUL_COLUMNS, GRADIENT_COLUMNS = 16, 32  # the fewest of a tile: what a tensor core takes, and a word of the mask

# Up to how many tokens a masked matmul masks inside its loop; for more, the masked weight is made first. Made first, a
# 16-bit weight costs 4 B of traffic more, 2 to write it and 2 to read it again, whatever the number of tokens T is.
# Inside the loop it costs, for each token, SLOTS of that token's tensor-core time, taken as not overlapping at all.
# They are equal at T = 4 rate / (bandwidth SLOTS): 920 tokens on sm_90. SLOTS is what `pst-kernels kernels` reads from
# the machine code of the widest bf16 tile; for gfx942, whose code it cannot read, it is a guess.
SLOTS = {"sm_80": 0.43, "sm_86": 0.22, "sm_89": 0.22, "sm_90": 0.42, "sm_100": 1.94, "sm_120": 0.34, "gfx942": 1.0}
ODD_SLOTS = 8.0  # the small tile of odd shapes
FLOAT_TOKENS = 64  # fp32 multiply-adds: the library's own are so much faster that only reading W once less pays
WIDEST_FACTOR = 64  # padded columns of U and V that a loop step multiplies; for higher ranks the masked weight is made

# From here on the library makes G, in the scratch buffer, and the gradient kernel reads it: 4 B a weight more, written
# and read, against a main loop that runs at an assumed 0.9 of the library's speed. 4 B / bandwidth = T (1 / 0.9 - 1) /
# rate gives 3,500 tokens on sm_90 and 2,250 on sm_80; some twice that, because G in x's dtype costs a rounding.
# fp32 multiply-adds of this kernel are so much slower than the library's that G is worth making for few tokens already.
GIVEN_TOKENS = {"half": 8192, "mixed": 8192, "float": 64}
SHARE_TOKENS = (
    1024  # at least so many for each program that shares a tile of G: storing sums costs as much as about 200
)

# Reducing a tile of 128 x 128 takes about 3,700 instructions of 8 warps on sm_90, as many cycles as the tensor cores
# take for so many tokens.
REDUCTION_TOKENS = 900

# Block patterns: tiles by the size of the blocks, which is their number of rows. In the products columns are tokens,
# of which FEW_TOKENS have a narrow tile, and depth is what a step takes of a strip of kept blocks. In the gradients
# columns are of a strip, and depth is tokens. A ragged matrix is no multiple of the blocks.
BLOCK_SIZES = (16, 32, 64, 128)
FEW_TOKENS = 32
FACTOR_PART = {"half": 64, "mixed": 64, "float": 16}  # columns of the padded factors that one small product takes
_BLOCKS: dict[str, dict[int, Tile]] = {
    "half": {
        16: Tile(16, 256, 64, 4, 3), 32: Tile(32, 256, 64, 4, 3), 64: Tile(64, 128, 64, 4, 3),
        128: Tile(128, 128, 64, 8, 2),
    },
    "mixed": {size: Tile(size, 128, 32, 8 if size == 128 else 4, 3) for size in BLOCK_SIZES},
    "float": {size: Tile(size, 32, 32, 4, 2) for size in BLOCK_SIZES},
}  # fmt: skip
# The tensor cores of these read registers, or have a memory of their own: twice the tokens for the same work on W'.
_BLOCKS_WIDE = _BLOCKS | {
    "half": _BLOCKS["half"] | {64: Tile(64, 256, 64, 4, 3), 128: Tile(128, 256, 64, 8, 3)}
}  # fmt: skip
BLOCK_MATMUL = {name: _BLOCKS_WIDE if name in ("sm_90", "sm_100") else _BLOCKS for name in TARGETS}
_FLOAT_BLOCK_GRADIENTS = {
    16: Tile(16, 32, 32, 4, 2), 32: Tile(32, 32, 32, 4, 2), 64: Tile(64, 32, 32, 8, 2), 128: Tile(128, 32, 16, 8, 2),
}  # fmt: skip
BLOCK_GRADIENTS = {
    name: {
        "half": {
            16: Tile(16, 64, 64, 4, 3), 32: Tile(32, 64, 64, 4, 3),
            64: Tile(64, 128 if name in ("sm_90", "sm_100") else 64, 64, 4, 3),
            128: Tile(128, 128 if name in ("sm_90", "sm_100") else 64, 64, 8, 3),
        },
        "float": _FLOAT_BLOCK_GRADIENTS,
    }
    for name in TARGETS
}  # fmt: skip


# Budgets of the main loops for whole blocks of 64 and 128, 16-bit W and x, rank 8: products, gradients.
BLOCK_SLOTS = {"sm_80": (0.75, 0.28), "sm_90": (0.55, 0.38), "sm_120": (0.65, 0.26)}


def dtype_key(x: torch.dtype, weight: torch.dtype) -> str:
    if x == torch.float32:
        return "float"
    return "mixed" if weight == torch.float32 else "half"


def matmul(architecture: str, x: torch.dtype, weight: torch.dtype, tokens: int, depth: int, rank: int) -> Tile | None:
    """The tile that a masked matmul masks in its loop with, or None where the masked weight shall be made first."""
    key = dtype_key(x, weight)
    split = x != torch.float32 and not interpreted()
    tuned = _tuning(architecture)
    table = tuned["matmul"].get(key) or MATMUL[architecture][key]
    tile = next(tile for most, tile in table if tokens <= most)
    odd = depth % tile.depth != 0
    if key == "float":
        most = FLOAT_TOKENS
    else:
        target = TARGETS[architecture]
        most = int(4.0 * target.rate / (target.bandwidth * (ODD_SLOTS if odd else SLOTS[architecture])))
    if tokens > tuned["in_loop_tokens"].get(key, most) or factor_width(rank, split) > WIDEST_FACTOR:
        return None
    return ODD[key] if odd else tile


def gradients(
    architecture: str, x: torch.dtype, weight: torch.dtype, rows: int, columns: int, ranks: int, stacked: bool
) -> Tile:
    """The tile of G that a program of the gradient kernel makes; `ranks` is the number of sums of a row."""
    key = dtype_key(x, weight)
    tile = _tuning(architecture)["gradients"].get(key) or GRADIENTS[architecture][key]
    whole = rows % tile.rows == 0 and columns % tile.columns == 0
    if whole and (stacked or (key == "float" and ranks <= 16)):
        return tile
    most, medium = (0, tile) if key == "float" else MEDIUM[architecture]
    fits = ranks <= most and rows % medium.rows == 0 and columns % medium.columns == 0
    return medium if fits else SMALL[key]


def block_matmul(
    architecture: str, x: torch.dtype, weight: torch.dtype, tokens: int, size: int, width: int, ragged: bool
) -> Tile:
    """The tile of a product with blocks of `size`; `width` is that of the padded factors."""
    key = dtype_key(x, weight)
    tile = _tuning(architecture)["block_matmul"].get(key, {}).get(size) or BLOCK_MATMUL[architecture][key][size]
    if ragged:
        tile = tile._replace(columns=min(tile.columns, 64), depth=32, stages=2)
    if width > FACTOR_PART[key]:  # their parts are loaded within a step, which leaves nothing to pipeline
        warps = 8 if key == "float" else tile.warps
        depth = 16 if key == "float" and size == 128 else 32  # 32 spill on sm_80 with Triton 3.6
        tile = tile._replace(columns=min(tile.columns, 32), depth=depth, warps=warps, stages=1)
    return tile._replace(columns=min(tile.columns, 32)) if tokens <= FEW_TOKENS else tile


def block_gradients(architecture: str, x: torch.dtype, size: int, rank: int, ragged: bool) -> Tile:
    """The tile of G that a program of the gradient kernel makes for blocks of `size`."""
    key = "float" if x == torch.float32 else "half"
    tile = _tuning(architecture)["block_gradients"].get(key, {}).get(size) or BLOCK_GRADIENTS[architecture][key][size]
    if ragged:
        tile = tile._replace(depth=min(tile.depth, 32))
    return tile._replace(columns=min(tile.columns, 64)) if ragged or rank > 16 else tile


def block_slots(
    weight: torch.dtype, x: torch.dtype, size: int, rank: int, other: bool
) -> tuple[float | None, float | None]:
    """The budgets of BLOCK_SLOTS for a case, none where it is an `other` than they are for."""
    if other or size < 64 or rank != 8 or not weight == x == torch.bfloat16:
        return None, None
    return BLOCK_SLOTS.get(architecture(torch.device("meta")), (None, None))


def stacked(architecture: str, ranks: int) -> bool:
    """Whether a program holds the factors of W' and of S side by side; `ranks` is the number of both together."""
    return architecture in STACKED and ranks <= 16


def mask_at_once(architecture: str, ranks: int) -> bool:
    return architecture in MASK_AT_ONCE and ranks == 16


def gradient_parts(architecture: str, columns: int, given: bool) -> int:
    """In how many parts of its columns a tile is reduced; where G is given, its own offsets take registers."""
    return max(1, columns // (32 if given else GRADIENT_PART.get(architecture, 32)))


@functools.lru_cache(maxsize=256)
def walk(architecture: str, tile: Tile, across: int, down: int, tokens: int, ranks: int) -> int:
    """How many of the `across` tiles of each of `down` rows a program of the gradient kernel makes one after another.

    A longer walk reads the strips of two factors and stores and reads the sums of `ranks` columns less often, but may
    leave multiprocessors idle: the walk with the least time for both is taken, each number of programs that the device
    runs at a time being one round.
    """
    target = TARGETS[architecture]
    resident = target.multiprocessors * max(1, 8 // tile.warps)  # each has the registers of 8 warps
    a_tile = (tokens + REDUCTION_TOKENS) * tile.rows * tile.columns * resident / target.multiprocessors
    a_walk = 3 * 4 * ranks * tile.rows * down  # bytes: strips read, sums stored, sums read

    def time(steps: int) -> float:
        walks = triton.cdiv(across, steps)
        rounds = triton.cdiv(walks * down, resident)
        return rounds * steps * a_tile * target.multiprocessors / target.rate + walks * a_walk / target.bandwidth

    return min(range(1, across + 1), key=time)


def token_share(architecture: str, tiles: int, tokens: int, depth: int) -> int:
    """How many tokens a program sums over, whole loop steps: not all where the tiles of G leave processors idle."""
    shares = max(1, min(TARGETS[architecture].multiprocessors // tiles, tokens // SHARE_TOKENS))
    return triton.cdiv(triton.cdiv(tokens, shares), depth) * depth


def pair_name(weight: torch.dtype, x: torch.dtype) -> str:
    """Such as "bfloat16", or "float32 W, bfloat16 x"."""
    names = [str(dtype).removeprefix("torch.") for dtype in (weight, x)]
    return names[0] if weight == x else f"{names[0]} W, {names[1]} x"


def factor_width(rank: int, split: bool) -> int:
    """Columns of a padded factor: a power of two from 16, as tensor cores take them; `split` holds three parts."""
    return max(16, triton.next_power_of_2(3 * rank if split else rank))


def _tuning(architecture: str) -> dict[str, dict[str, Any]]:
    """The user's tables where PST_KERNELS_TUNING names a file for this architecture, else empty ones."""
    path = env.tuning_file()
    if path is None:
        return _NOT_TUNED
    found, tables = _read_tuning(path, path.stat().st_mtime_ns)
    return tables if found == architecture else _NOT_TUNED


_TUNED = ("matmul", "gradients", "in_loop_tokens", "block_matmul", "block_gradients")
_NOT_TUNED: dict[str, dict[str, Any]] = {name: {} for name in _TUNED}


@functools.lru_cache(maxsize=8)
def _read_tuning(path: Path, _modified: int) -> tuple[str, dict[str, dict[str, Any]]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["architecture"] not in TARGETS:
            raise ValueError(f"architecture is {data['architecture']!r}, not one of {', '.join(TARGETS)}")
        keys = set[str]().union(*(data[name].keys() for name in _TUNED))
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
    return data["architecture"], {"matmul": matmul, "gradients": gradients, "in_loop_tokens": tokens, **of_blocks}


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
