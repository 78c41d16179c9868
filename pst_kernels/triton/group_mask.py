"""The masks of all layers of a table, and their masked weights, in a number of launches that layers do not add to."""

from __future__ import annotations

import triton
import triton.language as tl

from .group_row import (
    MASK,
    MASKED,
    ROWS,
    field_of,
    load_place,
    load_row,
    pointer_of,
    row_sweep,
    tile_indices_at,
)  # fmt: skip
from .group_select import Search
from .group_table import Group, MaskTable
from .launch import Launch
from .mask import kept, load_threshold, store_masked, store_words
from .select import SLOTS
from .sweep import hold_rights, step_scores


@triton.jit
def group_mask_kernel(
    p_layers, p_tiles, p_state,
    W_TYPE: tl.constexpr, F_TYPE: tl.constexpr, MASKED_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK_W: tl.constexpr, RANK_S: tl.constexpr, UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, HELD: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`mask.mask_kernel` of one tile of a layer. Without MASKED_TYPE no layer wants M * W'."""
    layer, strip, block = load_place(p_tiles)
    b_row = load_row(p_layers, layer)
    (
        p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, p_right_1,
        n_i, n_j, stride_i, stride_j, beta, alpha1, alpha2,
    ) = row_sweep(b_row, W_TYPE, F_TYPE, ALIGNED, TRANSPOSED)  # fmt: skip
    key, last_row, last_column = load_threshold(p_state + layer * SLOTS, n_i, n_j, TRANSPOSED)
    p_mask = pointer_of(b_row, MASK, tl.int32, ALIGNED)
    rows_per_program = field_of(b_row, ROWS)
    first_i, length, j, m_j = tile_indices_at(strip, block, n_i, n_j, rows_per_program, BLOCK_J, VECTOR)
    held_w, held_s, b_right_1 = hold_rights(
        p_right_w, p_right_s, p_right_1, j, m_j, n_j, RANK_W, RANK_S, HELD, TRANSPOSED
    )
    for step in tl.range(0, length, BLOCK_I, num_stages=STAGES):
        i, m_i, m_tile, b_updated, b_score = step_scores(
            p_weight, p_left_w, p_right_w, p_left_s, p_right_s, p_left_1, held_w, held_s, b_right_1,
            first_i, step, j, m_j, n_i, n_j, stride_i, stride_j, 0, beta, alpha1, alpha2,
            RANK_W, RANK_S, UNIT, TRANSPOSED, HELD, BLOCK_I,
        )  # fmt: skip
        b_kept = m_tile & kept(b_score, i, j, key, last_row, last_column, TRANSPOSED)
        store_words(p_mask, b_kept, i, j, m_i, m_j, n_i, n_j, TRANSPOSED)
        if MASKED_TYPE is not None:
            p_out = pointer_of(b_row, MASKED, MASKED_TYPE, ALIGNED)
            wide_i, wide_j = n_i.to(tl.int64), n_j.to(tl.int64)
            m_tile = m_tile & (field_of(b_row, MASKED) != 0)
            store_masked(p_out, b_updated, b_kept, i, j, m_tile, wide_i, wide_j, TRANSPOSED)


class Passes:
    """All launches over a group."""

    def __init__(self, group: Group) -> None:
        self.search = Search(group)
        tiling = group.mask
        self.mask = Launch(group_mask_kernel, tiling.grid, MASKED_TYPE=group.masked_type, **tiling.constants)

    def __call__(self, group: Group) -> None:
        self.search(group)
        self.mask(group.rows, group.mask.places, group.state)


def prune_masks(table: MaskTable) -> None:
    """Make the mask of every layer, and M * W' where it has room for it, on the current stream."""
    for group in table.groups:
        if group.passes is None:
            group.passes = Passes(group)
        group.passes(group)
