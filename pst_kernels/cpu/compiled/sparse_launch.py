"""What sparse_rows.py and sparse_products.py ask of the compiled passes over lists of kept weights."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pst_kernels.masks.packing import packed_width

from ..row_blocks import buffers
from ..sparse_rows import CHUNK, SparseRows, chunks_of, pointers_of
from . import sparse_lists, sparse_passes
from . import threads as team
from .vectors import WIDTH, WIDTHS

SHARE = 1 << 16  # weights of a share of rows of the passes that make lists
SHARES = 16  # a thread: rows may differ much in how much they keep, and cores in how fast they are
GROUP_ROWS = 16  # of which a group of rows is a multiple: a line of y in fp32 is 64 bytes
SAMPLED_ROWS, SAMPLED_TOKENS = 256, 512  # whose part of gy stays in a core's second cache: 512 KB
_CPU = torch.device("cpu")


def _run(compiled: Any, frame: np.ndarray, shares: int) -> None:
    frame["next"], frame["shares"] = 0, shares
    if torch.autograd.profiler._is_profiler_enabled:
        with torch.profiler.record_function(f"pst_kernels.cpu: {compiled.__name__}"):
            team.run(compiled, frame, shares)
    else:
        team.run(compiled, frame, shares)


def _frame(fields: dict[str, int], dtype: np.dtype, **values: Any) -> np.ndarray:
    """Numbers, and tensors, of which the frame gets the address: they must live as long as it is used.

    All numbers are int64 and written at once: one by one they would take as long as the product of a small layer.
    """
    numbers = fields | values
    return np.array([n.data_ptr() if isinstance(n, Tensor) else n for n in numbers.values()], np.int64).view(dtype)


_product = functools.partial(_frame, dict.fromkeys(sparse_passes.FRAME.names or (), 0), sparse_passes.FRAME)
_making = functools.partial(_frame, dict.fromkeys(sparse_lists.FRAME.names or (), 0), sparse_lists.FRAME)


def lists(weight: Tensor, mask: Tensor) -> SparseRows:
    """Of a weight (out, in) of any strides, fp32 or bf16, and a contiguous packed mask."""
    rows, columns = weight.shape
    pointers = torch.empty(chunks_of(columns) * rows + 1, dtype=torch.int32)
    share_rows = max(1, SHARE // columns)
    frame = _making(
        packed=mask, weight=weight, pointers=pointers, rows=rows, columns=columns,
        words=packed_width(columns), row_stride=weight.stride(0), column_stride=weight.stride(1),
        share_rows=share_rows, is_16_bit=weight.element_size() == 2,
    )  # fmt: skip
    shares = -(-rows // share_rows)
    _run(sparse_lists.count, frame, shares)
    pointers_of(pointers[1:].numpy(), out=pointers.numpy())
    kept = int(pointers[-1])
    values, offsets = torch.empty(kept, dtype=weight.dtype), torch.empty(kept, dtype=torch.uint8)
    frame["values"], frame["offsets"] = values.data_ptr(), offsets.data_ptr()
    _run(sparse_lists.fill, frame, shares)
    return SparseRows(values, offsets, pointers, rows, columns)


def transposed(lists: SparseRows) -> SparseRows:
    """The lists of W^T."""
    values, offsets, pointers, rows, columns = lists
    chunks, its_chunks = chunks_of(columns), chunks_of(rows)
    # where the blocks of CHUNK x CHUNK begin: the same runs before and after, in another order
    edges = pointers[:-1].numpy().reshape(chunks, rows)[:, ::CHUNK]
    sizes = np.diff(np.append(edges.ravel(), pointers[-1].numpy())).reshape(chunks, its_chunks)
    bases = torch.from_numpy(np.cumsum(sizes.T).astype(np.int32) - sizes.T.ravel())
    its_values, its_offsets = torch.empty_like(values), torch.empty_like(offsets)
    its_pointers = torch.empty(its_chunks * columns + 1, dtype=torch.int32)
    frame = _making(
        values=values, offsets=offsets, pointers=pointers, bases=bases, its_values=its_values,
        its_offsets=its_offsets, its_pointers=its_pointers, rows=rows, columns=columns,
        is_16_bit=values.element_size() == 2,
    )  # fmt: skip
    _run(sparse_lists.transpose, frame, len(bases))
    return SparseRows(its_values, its_offsets, its_pointers, columns, rows)


@functools.lru_cache(maxsize=256)
def _tiles(tokens: int) -> np.ndarray:
    """int32 (tiles, 2): first token and width of every tile. The last tokens take the narrowest that hold them."""
    starts = list(range(0, tokens - WIDTH + 1, WIDTH))
    tiles = [(start, WIDTH) for start in starts]
    start = len(tiles) * WIDTH
    if WIDTH // 2 < tokens - start <= WIDTH * 3 // 4:  # a half and one more is less than a whole
        tiles.append((start, WIDTH // 2))
        start += WIDTH // 2
    if start < tokens:
        tiles.append((start, min(width for width in WIDTHS if width >= tokens - start)))
    return np.array(tiles, np.int32)


def multiply(x: Tensor, lists: SparseRows, bias: Tensor | None, out: Tensor) -> Tensor:
    """out (T, rows) = x (T, columns) W^T + bias; x and out with rows of stride 1, bias fp32, T and the sizes not 0."""
    values, offsets, pointers, rows, columns = lists
    tokens, threads = x.shape[0], torch.get_num_threads()
    if tokens > WIDTHS[0] and values.dtype == torch.bfloat16:
        values = buffers.get("sparse values", values.shape, torch.float32, _CPU).copy_(values)
    tiles = _tiles(tokens)
    # each share packs its tile: many tiles are shares enough, few are cut by rows
    groups = 1 if len(tiles) >= 8 * threads else -(-SHARES * threads // len(tiles))
    group_rows = -(-rows // (groups * GROUP_ROWS)) * GROUP_ROWS
    if tokens == 1:
        group_rows = min(group_rows, sparse_passes.ROWS)
    groups = -(-rows // group_rows)
    width = WIDTH if tokens >= WIDTH else int(tiles[:, 1].max())
    panels = chunks_of(columns) * CHUNK * width
    packed = buffers.get("sparse panels", (threads, panels), torch.float32, _CPU)
    sums = buffers.get("sparse sums", (threads, sparse_passes.ROWS * WIDTH), torch.float32, _CPU)
    frame = _product(
        x=x, y=out, values=values, offsets=offsets, pointers=pointers, packed=packed, sums=sums, rows=rows,
        columns=columns, tokens=tokens, groups=groups, group_rows=group_rows, tiles=tiles.ctypes.data,
        packed_bytes=4 * panels, x_stride=x.stride(0), y_stride=out.stride(0), x_is_bf16=x.dtype == torch.bfloat16,
        y_is_bf16=out.dtype == torch.bfloat16, values_are_bf16=values.dtype == torch.bfloat16,
        bias=0 if bias is None else bias,
    )  # fmt: skip
    _run(sparse_passes.multiply_one if tokens == 1 else sparse_passes.multiply, frame, len(tiles) * groups)
    return out


def sampled(gy: Tensor, x: Tensor, lists: SparseRows, out: Tensor) -> Tensor:
    """out, fp32 (kept,) = gy^T x at the kept weights.

    gy (T, rows) and x (T, columns) have rows of stride 1; T is not 0.
    """
    _, offsets, pointers, rows, columns = lists
    chunks, step = chunks_of(columns), min(len(x), SAMPLED_TOKENS)
    tiles = -(-step // WIDTH)
    packed = buffers.get("sparse panels", (tiles, columns, WIDTH), torch.float32, _CPU)
    packed_y = buffers.get("sparse gradients", (tiles, rows, WIDTH), torch.float32, _CPU)
    group_rows = min(rows, SAMPLED_ROWS)
    frame = _product(
        offsets=offsets, pointers=pointers, packed=packed, packed_y=packed_y, out=out, rows=rows,
        columns=columns, group_rows=group_rows, x_stride=x.stride(0), y_stride=gy.stride(0),
        x_is_bf16=x.dtype == torch.bfloat16, y_is_bf16=gy.dtype == torch.bfloat16,
    )  # fmt: skip
    for start in range(0, len(x), step):
        some_x, some_gy = x[start : start + step], gy[start : start + step]
        frame["x"], frame["y"], frame["tokens"] = some_x.data_ptr(), some_gy.data_ptr(), len(some_x)
        frame["adds"] = start > 0
        _run(sparse_passes.pack_both, frame, 2 * -(-len(some_x) // WIDTH))
        _run(sparse_passes.sampled, frame, chunks * -(-rows // group_rows))
    return out
