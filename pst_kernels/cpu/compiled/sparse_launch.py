"""What sparse_rows.py and sparse_products.py call of the compiled passes over lists of kept weights.

Lists are the fields of SparseRows: values, offsets, pointers, rows, columns. `scratch` is the function of the package
above that gives buffers (scratch.get).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pst_kernels.masks.chunks import CHUNK, chunks_of, fill_pointers
from pst_kernels.masks.packing import packed_width

from . import low_rank as low_rank  # for callers of this module
from . import one_token, ready, sparse_lists, sparse_passes
from . import threads as team
from .expansion import SPREADS
from .ready import Lists, Scratch
from .sparse_passes import TOGETHER
from .vectors import WIDTH, WIDTHS
from .views import numbers_of

TASK = 1 << 16  # weights of a task of rows of the passes that make lists
TASKS = 16  # a thread: rows may differ much in how much they keep, and cores in how fast they are
GROUP_ROWS = 16  # of which a group of rows is a multiple: a line of y in fp32 is 64 bytes
# Of a small weight, the ends of all rows' loops are guessed right from the second tile of tokens on (sparse_passes.py),
# and two tiles of x are more than need to lie in a near cache. A run is a row's part of a chunk.
RUNS_TOGETHER = 12_288
SAMPLED_ROWS, SAMPLED_TOKENS = 256, 512  # whose part of gy stays in a core's second cache: 512 KB
_CPU = torch.device("cpu")
find_ready = ready.find
_product, _making = numbers_of(sparse_passes.FRAME), numbers_of(sparse_lists.FRAME)
_TASKS, _TOKENS, _ADDS, _X, _Y = (
    list(sparse_passes.FRAME.names or ()).index(name) for name in ("tasks", "tokens", "adds", "x", "y")
)
_VALUES, _OFFSETS = (list(sparse_lists.FRAME.names or ()).index(name) for name in ("values", "offsets"))


def lists(weight: Tensor, mask: Tensor) -> Lists:
    """Of a weight (out, in) of any strides, fp32 or bf16, and a contiguous packed mask."""
    rows, columns = weight.shape
    pointers = torch.empty(chunks_of(columns) * rows + 1, dtype=torch.int32)
    task_rows = max(1, TASK // columns)
    tasks = -(-rows // task_rows)
    frame = _making(
        tasks=tasks, task_rows=task_rows, rows=rows, columns=columns, words=packed_width(columns),
        row_stride=weight.stride(0), column_stride=weight.stride(1), is_16_bit=weight.element_size() == 2,
        packed=mask.data_ptr(), weight=weight.data_ptr(), pointers=pointers.data_ptr(),
    )  # fmt: skip
    team.run(sparse_lists.count, frame, tasks)
    fill_pointers(pointers[1:].numpy(), pointers.numpy())
    kept = int(pointers[-1])
    values, offsets = torch.empty(kept, dtype=weight.dtype), torch.empty(kept, dtype=torch.uint8)
    frame[0], frame[_VALUES], frame[_OFFSETS] = 0, values.data_ptr(), offsets.data_ptr()
    team.run(sparse_lists.fill, frame, tasks)
    return values, offsets, pointers, rows, columns


def transposed(lists: Lists) -> Lists:
    """The lists of W^T."""
    values, offsets, pointers, rows, columns = lists
    its_chunks = chunks_of(rows)
    tasks = chunks_of(columns) * its_chunks
    its_values, its_offsets = torch.empty_like(values), torch.empty_like(offsets)
    its_pointers = torch.empty(its_chunks * columns + 1, dtype=torch.int32)
    frame = _making(
        tasks=tasks, rows=rows, columns=columns, is_16_bit=values.element_size() == 2,
        values=values.data_ptr(), offsets=offsets.data_ptr(), pointers=pointers.data_ptr(),
        its_values=its_values.data_ptr(), its_offsets=its_offsets.data_ptr(), its_pointers=its_pointers.data_ptr(),
    )  # fmt: skip
    team.run(sparse_lists.transpose, frame, tasks)
    return its_values, its_offsets, its_pointers, columns, rows


class _Plan(NamedTuple):
    """How a number of tokens is cut."""

    tiles: np.ndarray  # int32 (tiles, 2): first token and width
    address: int
    many: int
    width: int  # of the widest


@functools.lru_cache(maxsize=256)
def _plan(tokens: int) -> _Plan:
    """Tiles of WIDTH; the last tokens take the narrowest that hold them."""
    tiles = [(start, WIDTH) for start in range(0, tokens - WIDTH + 1, WIDTH)]
    start = len(tiles) * WIDTH
    if WIDTH // 2 < tokens - start <= WIDTH * 3 // 4:  # a half and one more is less than a whole
        tiles.append((start, WIDTH // 2))
        start += WIDTH // 2
    if start < tokens:
        tiles.append((start, min(width for width in WIDTHS if width >= tokens - start)))
    array = np.array(tiles, np.int32)
    return _Plan(array, array.ctypes.data, len(array), max(width for _, width in tiles))


def multiply(x: Tensor, lists: Lists, bias: Tensor | None, out: Tensor, scratch: Scratch) -> Tensor:
    """out (T, rows) = x (T, columns) W^T + bias; x and out with rows of stride 1, bias fp32, T and the sizes not 0."""
    values, tokens = lists[0], x.shape[0]
    fits = tokens <= ready.MOST_TOKENS and x.is_contiguous() and out.is_contiguous() and x.dtype is out.dtype
    if fits and (found := find_ready(x, *lists[:3], bias)) is not None:
        return found(x, out, scratch)
    if fits and tokens == 1 and SPREADS:
        return ready.keep(one_token.prepared(x, lists, bias), x, *lists[:3], bias)(x, out, scratch)
    if tokens > WIDTHS[0] and values.dtype is torch.bfloat16:
        values = scratch("sparse values", values.shape, torch.float32, _CPU).copy_(values)
        lists, fits = (values, *lists[1:]), False
    record = _multiplying(x, lists, bias, out)
    panels = record["together"] * record["tile_bytes"]  # of a thread, and behind them its sums
    compiled = sparse_passes.multiply_one if tokens == 1 else sparse_passes.multiply
    room = (torch.get_num_threads(), record["packed_bytes"])
    if fits:
        call = ready.Ready(compiled, sparse_passes.FRAME, record, lists[3], room, panels, _plan(tokens))
        return ready.keep(call, x, *lists[:3], bias)(x, out, scratch)
    begins = scratch("few tokens", room, torch.uint8, _CPU).data_ptr()
    frame = _product(**record, x=x.data_ptr(), y=out.data_ptr(), packed=begins, sums=begins + panels)
    team.run(compiled, frame, record["tasks"])
    return out


def _multiplying(x: Tensor, lists: Lists, bias: Tensor | None, out: Tensor) -> dict[str, int]:
    """The record of a product but for where x, y and the scratch lie."""
    values, offsets, pointers, rows, columns = lists
    tokens, threads = x.shape[0], torch.get_num_threads()
    plan = _plan(tokens)
    fit = rows * chunks_of(columns) >= RUNS_TOGETHER and _go_round(plan.many, TOGETHER * threads)
    together = TOGETHER if fit else 1
    parts = -(-plan.many // together)
    # each task packs its tiles, so rows are cut only where tiles do not go round
    groups = 1 if _go_round(parts, threads) else -(-TASKS * threads // parts)
    group_rows = -(-rows // (groups * GROUP_ROWS)) * GROUP_ROWS
    if tokens == 1:
        group_rows = min(group_rows, sparse_passes.ROWS)
    groups = -(-rows // group_rows)
    tile_bytes = 4 * chunks_of(columns) * CHUNK * plan.width
    return {
        "tasks": parts * groups, "groups": groups, "group_rows": group_rows, "rows": rows, "columns": columns,
        "tokens": tokens, "tile_count": plan.many, "tile_bytes": tile_bytes, "together": together,
        "packed_bytes": together * (tile_bytes + 4 * sparse_passes.SUMS), "x_stride": x.stride(0),
        "y_stride": out.stride(0), "x_is_bf16": x.dtype is torch.bfloat16, "y_is_bf16": out.dtype is torch.bfloat16,
        "values_are_bf16": values.dtype is torch.bfloat16, "values": values.data_ptr(),
        "offsets": offsets.data_ptr(), "pointers": pointers.data_ptr(), "bias": 0 if bias is None else bias.data_ptr(),
        "tiles": plan.address,
    }  # fmt: skip


def _go_round(parts: int, threads: int) -> bool:
    """Whether threads that take so many equal parts end at about the same time."""
    return parts % threads == 0 or parts >= 8 * threads


def sampled(gy: Tensor, x: Tensor, lists: Lists, out: Tensor, scratch: Scratch) -> Tensor:
    """out, fp32 (kept,) = gy^T x at the kept weights.

    gy (T, rows) and x (T, columns) have rows of stride 1; T is not 0.
    """
    _, offsets, pointers, rows, columns = lists
    chunks, step = chunks_of(columns), min(len(x), SAMPLED_TOKENS)
    tiles, group_rows = -(-step // WIDTH), min(rows, SAMPLED_ROWS)
    packed = scratch("sparse panels", (tiles, columns, WIDTH), torch.float32, _CPU)
    packed_y = scratch("sparse gradients", (tiles, rows, WIDTH), torch.float32, _CPU)
    frame = _product(
        group_rows=group_rows, rows=rows, columns=columns, x_stride=x.stride(0), y_stride=gy.stride(0),
        x_is_bf16=x.dtype is torch.bfloat16, y_is_bf16=gy.dtype is torch.bfloat16, offsets=offsets.data_ptr(),
        pointers=pointers.data_ptr(), packed=packed.data_ptr(), packed_y=packed_y.data_ptr(), out=out.data_ptr(),
    )  # fmt: skip
    x_bytes, y_bytes = x.stride(0) * x.element_size(), gy.stride(0) * gy.element_size()
    for start in range(0, len(x), step):
        tokens = min(step, len(x) - start)
        frame[_ADDS], frame[_TOKENS] = start > 0, tokens
        frame[_X], frame[_Y] = x.data_ptr() + start * x_bytes, gy.data_ptr() + start * y_bytes
        for compiled, tasks in (
            (sparse_passes.pack_both, 2 * -(-tokens // WIDTH)),
            (sparse_passes.sampled, chunks * -(-rows // group_rows)),
        ):
            frame[0], frame[_TASKS] = 0, tasks
            team.run(compiled, frame, tasks)
    return out
