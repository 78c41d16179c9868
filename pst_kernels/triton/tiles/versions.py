"""The versions of Triton: the oldest that the kernels take, and what one's compiler needs otherwise than the others'.

This is the only place that asks for a version. Each choice is the smallest that compiles without a spill for every
target; `python tests/triton/every_triton.py` shows what each version makes of all kernels.
"""

from __future__ import annotations

import re

import triton

OLDEST = (3, 6)


def number(version: str) -> tuple[int, int]:
    """Of "3.7.1+git", (3, 7)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def require(version: str) -> None:
    if number(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"the kernels of pst_kernels need triton {oldest} or newer, found {version};"
            f" pip install 'triton>={oldest}', or set PST_KERNELS_BACKEND=torch"
        )


require(triton.__version__)
INSTALLED = number(triton.__version__)

# Triton 3.6 computes W' a second time, in the layout that W' is stored with, where W is stored transposed, and takes
# more registers to gather scores with 17 to 32 ranks, and of a group's layers that are stored transposed. Neighbours of
# the first tile, rows of a step of the second, and what a thread holds side by side of the third.
TRANSPOSED_ACROSS = 32 if INSTALLED < (3, 7) else 128
MANY_HELD_ROWS = 4 if INSTALLED < (3, 7) else 8
TRANSPOSED_VECTOR = 2 if INSTALLED < (3, 7) else 4

# Triton 3.8 takes more registers for 64 tokens and packed 16-bit weights, and for a tile of G that is read, and more
# instructions for the addresses of each stage. Columns of a tile of G, at most; depth and stages of sm_80's tiles of G
# of whole blocks.
WIDE_PACKED_SPILLS = INSTALLED >= (3, 8)
G_STORED_COLUMNS = 64 if INSTALLED >= (3, 8) else 128
G_STORED_COLUMNS_OF = {"sm_90": 32} if INSTALLED >= (3, 8) else {}  # of four warps
BLOCK_GRADIENTS = {"sm_80": {64: (128, 2), 128: (64, 2)}} if INSTALLED >= (3, 8) else {}

# And 3.9 for one of fp32 on sm_90: its rows, at most.
G_STORED_FLOAT_ROWS = {"sm_90": 32} if INSTALLED >= (3, 9) else {}

# And 3.8 for the candidates of a threshold that a program looks at together.
CANDIDATES_AT_ONCE = 2048 if INSTALLED >= (3, 8) else 4096

# And 3.8 alone for a tile of G that is made: its columns, at most.
GRADIENT_COLUMNS = {"sm_120": 64} if INSTALLED == (3, 8) else {}
