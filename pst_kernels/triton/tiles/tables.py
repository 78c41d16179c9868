"""The shipped tiles by architecture, dtype and shape bucket, with their budgets beside them."""

from __future__ import annotations

from typing import NamedTuple

from .targets import TARGETS


class Tile(NamedTuple):
    """What one program computes, and with what: rows x columns, stepping over depth."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    slots: float | None = None  # budget of the main loop: issue slots per tensor-core cycle, read from machine code


class Lists(NamedTuple):
    """What one program computes of a product with lists: rows of W, and chunks of their columns at once.

    A row of a chunk has `lanes`, which take its kept weights in `turns` between two looks at whether any is left.
    """

    rows: int
    chunks: int
    lanes: int
    turns: int
    warps: int


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
# Where the registers cannot hold U beside A and V beside B (see FEW_RANKS), and where a matrix is no multiple of the
# tile, it is the MEDIUM tile for as many sums a row (ranks, and one for R) as it has room for, where the matrix is a
# multiple of it, else the SMALL one.
_FLOAT_GRADIENTS = Tile(64, 32, 32, 4, 2)
GRADIENTS: dict[str, dict[str, Tile]] = {
    name: {"half": half, "mixed": half, "float": _FLOAT_GRADIENTS}
    for name, half in {
        "sm_80": Tile(128, 128, 32, 8, 3, 0.40), "sm_86": Tile(128, 128, 32, 8, 3, 0.23),
        "sm_89": Tile(128, 128, 32, 8, 3, 0.23), "sm_90": Tile(64, 128, 64, 4, 3, 0.42),
        "sm_100": Tile(128, 128, 64, 8, 3), "sm_120": Tile(128, 128, 32, 8, 3, 0.45), "gfx942": Tile(64, 64, 32, 4, 2),
    }.items()
}  # fmt: skip
# Where G is read. Of nine tiles that were timed on an H100, these for sm_90 are the fastest without a spill: of four
# warps, so that two programs share a multiprocessor, and one computes while the other waits.
G_STORED_TILES = {"sm_90": Tile(128, 64, 64, 4, 3)}
_MEDIUM = 16, Tile(128, 64, 32, 8, 3)
MEDIUM = {  # with the most sums that it is used for
    "sm_80": (16, Tile(64, 64, 32, 4, 3)), "sm_86": _MEDIUM, "sm_89": _MEDIUM,
    "sm_90": (1 << 30, Tile(64, 64, 64, 4, 3)), "sm_100": (1 << 30, Tile(64, 64, 64, 4, 3)), "sm_120": _MEDIUM,
    "gfx942": (16, Tile(64, 64, 32, 4, 2)),
}  # fmt: skip
SMALL = {"half": Tile(64, 32, 32, 4, 3), "mixed": Tile(64, 32, 32, 4, 3), "float": Tile(32, 32, 32, 8, 2)}

FEW_RANKS = tuple(name for name in TARGETS if name != "gfx942")  # where up to 16 of both kinds stand side by side
GRADIENT_PART = {"sm_100": 64}  # columns of a tile that are reduced at a time, others: 32

# Where a tile loads its words of the mask once, with 16 ranks. Elsewhere that spills or lengthens the main loop: a word
# is loaded by the four threads that need it, which is one access to the cache.
MASK_AT_ONCE = ("sm_90", "sm_100")

MATMUL_COLUMNS, GRADIENT_COLUMNS = 16, 32  # the fewest of a tile: what a tensor core takes, and a word of the mask

# Up to how many tokens a masked matmul masks inside its loop; for more, the masked weight is made first. Made first, a
# 16-bit weight costs 4 B of traffic more, 2 to write it and 2 to read it again, whatever the number of tokens T is.
# Inside the loop it costs, for each token, SLOTS of that token's tensor-core time, taken as not overlapping at all.
# They are equal at T = 4 rate / (bandwidth SLOTS). SLOTS is what `pst-kernels kernels` reads from
# the machine code of the widest bf16 tile; for gfx942, whose code it cannot read, it is a guess.
SLOTS = {"sm_80": 0.43, "sm_86": 0.22, "sm_89": 0.22, "sm_90": 0.42, "sm_100": 1.94, "sm_120": 0.34, "gfx942": 1.0}
ODD_SLOTS = 8.0  # the small tile of odd shapes
# Where it was timed: 4,096 x 4,096 in bf16 on an H100 takes 49 us in the loop and 51 us made first with 64 tokens, 110
# and 56 with 128. What a step waits for is not in SLOTS.
IN_LOOP_TOKENS = {"sm_90": 64}
FLOAT_TOKENS = 64  # fp32 multiply-adds: the library's own are so much faster that only reading W once less pays
WIDEST_FACTOR = 64  # padded columns of U and V that a loop step multiplies; for higher ranks the masked weight is made

# From here on the library makes G, and the gradient kernel reads it. Timed on an H100, 4,096 x 4,096 in bf16: made in
# the kernel 114 us and 77 ns a token, by the library 97 us and 42 ns a token, so that would always win; from 512 on,
# because G in x's dtype costs a rounding, and its room. Other devices have not been timed. fp32 multiply-adds of this
# kernel are so much slower than the library's that G is worth making for few tokens already.
G_STORED_TOKENS = {"half": 512, "mixed": 512, "float": 64}
SPLIT_K_TOKENS = 1024  # at least so many a split of a tile of G: storing its sums costs as much as about 200

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

# Packed weights: rows of W, tokens, and the columns of a chunk, by the number of tokens. For more than SPARSE_TOKENS W
# is written out, and the library multiplies. A split has SPARSE_DEPTH of depth at least where that is enough programs
# for every multiprocessor: its sums, written and read in fp32, are 8 B a token and row for each 2,048 weights of it.
SPARSE_TOKENS, SPARSE_DEPTH = 64, 2048
_SPARSE = {
    "half": ((16, Tile(32, 16, 128, 4, 2)), (32, Tile(32, 32, 128, 4, 2)), (64, Tile(64, 64, 128, 4, 2))),
    "float": ((16, Tile(16, 16, 128, 4, 1)), (64, Tile(16, 32, 128, 4, 1))),
}  # fmt: skip
SPARSE_MATMUL = dict.fromkeys(TARGETS, _SPARSE)

# From lists, for very few tokens. Of 16 tiles that were timed on an H100 none is faster by more than a twentieth.
LISTED_TOKENS, LISTED_MATMUL = 8, Lists(32, 8, 4, 2, 8)
SPARSE_INSTRUCTIONS = 21  # budget of the main loop, instructions of a thread a weight (16-bit W and x, whole tiles)
