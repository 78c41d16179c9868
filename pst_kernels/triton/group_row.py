"""One layer of a table in device memory: its row of int64 fields, and how a kernel reads what a launch would be given.

A pointer is an address, and nothing specialises on it: ALIGNED says that what is loaded along j begins and is spaced by
multiples of 16, as Triton itself would find out for an argument.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Addresses
WEIGHT = tl.constexpr(0)
LEFT_W, RIGHT_W = tl.constexpr(1), tl.constexpr(2)  # of UV, AB and R + C, as in a sweep
LEFT_S, RIGHT_S = tl.constexpr(3), tl.constexpr(4)
LEFT_1, RIGHT_1 = tl.constexpr(5), tl.constexpr(6)
PRUNED = tl.constexpr(7)
GUESS = tl.constexpr(8)
MASK = tl.constexpr(9)
MASKED = tl.constexpr(10)  # 0 where M * W' is not asked for
# Numbers
N_I, N_J = tl.constexpr(11), tl.constexpr(12)
STRIDE_I, STRIDE_J = tl.constexpr(13), tl.constexpr(14)
CAPACITY = tl.constexpr(15)  # room for candidates, from FIRST_CANDIDATE on
FIRST_CANDIDATE = tl.constexpr(16)
INDEX_BITS = tl.constexpr(17)
ROWS = tl.constexpr(18)  # that a program goes through
BETA, ALPHA1, ALPHA2 = tl.constexpr(19), tl.constexpr(20), tl.constexpr(21)  # fp32 bits
FIELDS = tl.constexpr(32)

# Beside its row a layer has `select.SLOTS` of state, and copies of int32 bins: in one of them all weights could meet
RADIX_BINS, COPIES = tl.constexpr(2048), tl.constexpr(4)

# A tile's place is one int64: the layer, the strip along i, the block of BLOCK_J along j
LAYERS, STRIPS = tl.constexpr(1 << 16), tl.constexpr(1 << 24)


@triton.jit
def load_row(p_layers, layer):
    """All fields by one load, as `select.load_state` does."""
    return tl.load(p_layers + tl.full([], layer, tl.int64) * FIELDS + tl.arange(0, FIELDS))


@triton.jit
def field_of(b_row, FIELD: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, FIELDS) == FIELD, b_row, 0), 0)


@triton.jit
def pointer_of(b_row, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = field_of(b_row, FIELD).to(tl.pointer_type(TYPE))
    # A hint stays with the operation that it is given to: not with what a function returns.
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def size_of(b_row, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    size = field_of(b_row, FIELD).to(tl.int32)
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit
def scale_of(b_row, FIELD: tl.constexpr):
    return field_of(b_row, FIELD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def row_scales(b_row):
    return scale_of(b_row, BETA), scale_of(b_row, ALPHA1), scale_of(b_row, ALPHA2)


@triton.jit
def row_numel(b_row):
    return field_of(b_row, N_I) * field_of(b_row, N_J)


@triton.jit
def row_shape(b_row, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """n_i and n_j. Along i only what is stored transposed is loaded."""
    return size_of(b_row, N_I, ALIGNED and TRANSPOSED), size_of(b_row, N_J, ALIGNED)


@triton.jit
def row_strides(b_row, ALIGNED: tl.constexpr):
    stride_i = field_of(b_row, STRIDE_I)
    return stride_i // 16 * 16 if ALIGNED else stride_i, field_of(b_row, STRIDE_J)


@triton.jit
def row_operands(b_row, W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The weight, and left and right of UV, AB and R + C."""
    return (
        pointer_of(b_row, WEIGHT, W_TYPE, ALIGNED),
        pointer_of(b_row, LEFT_W, F_TYPE, ALIGNED),
        pointer_of(b_row, RIGHT_W, F_TYPE, ALIGNED),
        pointer_of(b_row, LEFT_S, F_TYPE, ALIGNED),
        pointer_of(b_row, RIGHT_S, F_TYPE, ALIGNED),
        pointer_of(b_row, LEFT_1, F_TYPE, ALIGNED),
        pointer_of(b_row, RIGHT_1, F_TYPE, ALIGNED),
    )


@triton.jit
def row_sweep(b_row, W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What a sweep over a layer takes: its operands, n_i and n_j, the strides, the scales."""
    p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1 = row_operands(
        b_row, W_TYPE, F_TYPE, ALIGNED
    )
    n_i, n_j = row_shape(b_row, ALIGNED, TRANSPOSED)
    stride_i, stride_j = row_strides(b_row, ALIGNED)
    beta, alpha1, alpha2 = row_scales(b_row)
    return (
        p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1, n_i, n_j, stride_i, stride_j, beta,
        alpha1, alpha2,
    )  # fmt: skip


@triton.jit
def load_place(p_tiles):
    """Of this program's tile: the layer, the strip, the block."""
    place = tl.load(p_tiles + tl.program_id(0))
    return place % LAYERS, place // LAYERS % STRIPS, place // LAYERS // STRIPS


@triton.jit
def tile_indices_at(strip, block, n_i, n_j, rows_per_program, BLOCK_J: tl.constexpr, VECTOR: tl.constexpr):
    """First i of a tile, how many there are, its j, and which of these exist: `sweep.program_indices` of any tile.

    The indices are int32, which saves the registers that addresses from memory take; products with them are int64.
    """
    first_i = (strip * rows_per_program).to(tl.int32)
    j = (block * BLOCK_J).to(tl.int32) + tl.arange(0, BLOCK_J)
    return first_i, tl.minimum(rows_per_program, n_i - first_i).to(tl.int32), tl.multiple_of(j, VECTOR), j < n_j
