"""y = x W^T + bias and dx = gy W for few tokens, with a weight that is stored as bits and packed kept values.

The values lie chunk by chunk of 128 columns, in a chunk row by row, so those of a tile of whole rows of a chunk lie
side by side. A weight's place is where its tile begins, plus the bits of the tile's words before its own, plus the bits
of its word below its own: a word of bits for 32 weights and the kept values are all that is read of W, 16 + 1 / density
bits a kept 16-bit weight, beside one pointer a tile. A load of the kept values alone makes the dense tile in registers,
which a tensor core multiplies. dx is the same tile turned over, so there is no second copy of the weight.

Few tokens have few tiles of y, so the depth is shared among programs. Their sums are added in a fixed order by a second
kernel: the same bits in every run. With very few tokens y is made without tiles (listed_matmul.py). For many W is
written out once and the library multiplies; it is freed with the product, as the masked weight of matmul.py is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks.chunks import CHUNK, chunks_of
from ..masks.packing import PAIR_MASK, WORD, packed_width
from .listed_matmul import listed_matmul
from .matmul import store_result
from .sums import add_sums, rooms
from .tiles import choice, tables, targets, versions
from .tiles.targets import Platform, cdiv

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of x and of the values, in any pair
BITS, WORDS, PAIR = tl.constexpr(WORD), tl.constexpr(CHUNK // WORD), tl.constexpr(PAIR_MASK)
RUNS = 32  # of a chunk, whose words one program makes
EXPANDED_ROWS = 32  # of a program that writes W out
WORDS_OF = "_pst_words"  # attribute of the offsets that holds their words


@triton.jit
def words_kernel(p_offsets, p_pointers, p_words, rows, words, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The packed mask (see masks/packing.py) of what the lists keep: BLOCK rows of one chunk."""
    i_chunk = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_rows = i < rows
    run = i_chunk * rows + i
    first = tl.load(p_pointers + run, mask=m_rows, other=0)
    last = tl.load(p_pointers + run + 1, mask=m_rows, other=0)
    place = first[:, None] + tl.arange(0, CHUNK)[None, :]
    kept = place < last[:, None]
    b_offsets = tl.load(p_offsets + place, mask=kept, other=0).to(tl.int32)
    b_bits = tl.full(b_offsets.shape, 1, tl.int32) << (b_offsets % BITS // 2 + BITS // 2 * (b_offsets % 2))
    for w in tl.static_range(WORDS):
        b_word = tl.sum(tl.where(kept & (b_offsets // BITS == w), b_bits, 0), 1)  # distinct bits: their union
        i_word = i_chunk * WORDS + w
        tl.store(p_words + i.to(tl.int64) * words + i_word, b_word, mask=m_rows & (i_word < words))


@triton.jit
def ones(b):
    """How many bits of each uint32 are set. LLVM knows these steps, and makes one instruction of them."""
    b = b - ((b >> 1) & 0x55555555)
    b = (b & 0x33333333) + ((b >> 2) & 0x33333333)
    return (((b + (b >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def kept_tile(
    p_values, p_words, p_pointers, i_rows, i_chunk, rows, words, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr
):  # fmt: skip
    """BLOCK_ROWS rows of a chunk of W, zero where it is not kept and where there is no such row or column."""
    r = tl.arange(0, BLOCK_ROWS)
    w = i_chunk * WORDS + tl.arange(0, WORDS)
    m = (i_rows + r < rows)[:, None] & (w < words)[None, :]
    b_words = tl.load(p_words + (i_rows + r).to(tl.int64)[:, None] * words + w[None, :], mask=m, other=0)
    first = tl.load(p_pointers + i_chunk * rows + i_rows)
    b_words = b_words.to(tl.uint32, bitcast=True)
    b_counts = ones(b_words).to(tl.int32)
    b_rows = tl.sum(b_counts, 1)
    b_before = first + (tl.cumsum(b_rows, 0) - b_rows)[:, None] + tl.cumsum(b_counts, 1) - b_counts

    bit = tl.arange(0, BLOCK_DEPTH) % BITS
    pair = bit // 2
    below = ((1 << pair) - 1) * PAIR  # of both columns of each pair before; of an odd column's own pair, the even one
    below = (below | tl.where(bit % 2 == 1, 1 << pair, 0)).to(tl.uint32, bitcast=True)
    own = (tl.full(bit.shape, 1, tl.int32) << (pair + BITS // 2 * (bit % 2))).to(tl.uint32, bitcast=True)
    b_word = tl.reshape(tl.broadcast_to(b_words[:, :, None], (BLOCK_ROWS, WORDS, BITS)), (BLOCK_ROWS, BLOCK_DEPTH))
    b_place = tl.reshape(tl.broadcast_to(b_before[:, :, None], (BLOCK_ROWS, WORDS, BITS)), (BLOCK_ROWS, BLOCK_DEPTH))
    b_place += ones(b_word & below[None, :]).to(tl.int32)
    return tl.load(p_values + b_place, mask=(b_word & own[None, :]) != 0, other=0.0)


@triton.jit(do_not_specialize=["tokens", "steps", "has_bias"])
def sparse_matmul_kernel(
    p_x, p_values, p_words, p_pointers, p_bias, p_y, tokens, rows, columns, words, steps, has_bias,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """y[t, row] = bias[row] + sum over columns of W[row, column] x[t, column], along `steps` tiles; or, TRANSPOSED,
    y[t, column] = sum over rows of W[row, column] x[t, row], down `steps` tiles.

    A tile is BLOCK_ROWS rows and BLOCK_DEPTH columns of W: a chunk. x and y are contiguous. The program's third number
    says which steps are its own, and to which (tokens, ...) part of p_y their sum belongs.
    """
    i_tokens = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    i_tile = tl.program_id(1)
    i_split = tl.program_id(2)
    t = tl.arange(0, BLOCK_COLUMNS)
    LENGTH: tl.constexpr = BLOCK_ROWS if TRANSPOSED else BLOCK_DEPTH  # of a step
    WIDTH: tl.constexpr = BLOCK_DEPTH if TRANSPOSED else BLOCK_ROWS  # of the tile of y
    depth, width = (rows, columns) if TRANSPOSED else (columns, rows)
    d = tl.arange(0, LENGTH)
    o_x = t[None, :] * depth + d[:, None]
    m_tokens = i_tokens + t < tokens
    p_x += i_tokens * depth

    b_y = tl.zeros((WIDTH, BLOCK_COLUMNS), tl.float32)
    for step in range(i_split * steps, min((i_split + 1) * steps, tl.cdiv(depth, LENGTH))):
        i_rows, i_chunk = (step * LENGTH, i_tile) if TRANSPOSED else (i_tile * WIDTH, step)
        i = step * LENGTH
        b_x = tl.load(p_x + i + o_x, mask=(i + d < depth)[:, None] & m_tokens[None, :], other=0.0)
        if UPCAST:
            b_x = b_x.to(tl.float32)
        b_kept = kept_tile(p_values, p_words, p_pointers, i_rows, i_chunk, rows, words, BLOCK_ROWS, BLOCK_DEPTH)
        b_kept = b_kept.to(b_x.dtype)
        if TRANSPOSED:
            b_kept = tl.trans(b_kept)
        b_y = tl.dot(b_kept, b_x, b_y, input_precision="ieee")

    p_y += i_split.to(tl.int64) * tokens * width
    store_result(b_y, p_y, p_bias, has_bias, i_tokens, i_tile.to(tl.int64) * WIDTH, tokens, width, WIDTH, BLOCK_COLUMNS)


@triton.jit
def expand_kernel(
    p_values, p_words, p_pointers, p_weight, rows, columns, words, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr
):  # fmt: skip
    """W (rows, columns), contiguous; one tile of it."""
    i_rows, i_chunk = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    b_kept = kept_tile(p_values, p_words, p_pointers, i_rows, i_chunk, rows, words, BLOCK_ROWS, BLOCK_DEPTH)
    i = i_rows + tl.arange(0, BLOCK_ROWS)
    j = i_chunk * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    o = i.to(tl.int64)[:, None] * columns + j[None, :]
    tl.store(p_weight + o, b_kept.to(p_weight.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


def words_of(offsets: Tensor, pointers: Tensor, rows: int, columns: int) -> Tensor:
    """The packed mask of the lists, int32 (rows, words): made at the first call, then kept with the offsets."""
    key = pointers.data_ptr(), _version(pointers), _version(offsets), rows, columns
    found = getattr(offsets, WORDS_OF, None)
    if found is not None and found[0] == key:
        return found[1]
    with torch.inference_mode(False):  # it outlives this call
        words = torch.empty((rows, packed_width(columns)), dtype=torch.int32, device=offsets.device)
        words_kernel[cdiv(rows, RUNS), chunks_of(columns)](
            offsets, pointers, words, rows, words.shape[1], BLOCK=RUNS, CHUNK=CHUNK, num_warps=4
        )
    # what is made while a CUDA graph is captured is there only when the graph is replayed
    if not (offsets.is_cuda and torch.cuda.is_current_stream_capturing()):
        setattr(offsets, WORDS_OF, (key, words))
    return words


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def expanded(values: Tensor, offsets: Tensor, pointers: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """W (rows, columns) in `dtype`."""
    words = words_of(offsets, pointers, *shape)
    weight = torch.empty(shape, dtype=dtype, device=values.device)
    expand_kernel[cdiv(shape[0], EXPANDED_ROWS), chunks_of(shape[1])](
        values, words, pointers, weight, *shape, words.shape[1], BLOCK_ROWS=EXPANDED_ROWS, BLOCK_DEPTH=CHUNK,
        num_warps=4,
    )  # fmt: skip
    return weight


def sparse_matmul(
    x: Tensor, values: Tensor, words: Tensor, pointers: Tensor, bias: Tensor | None, shape: tuple[int, int],
    transposed: bool, platform: Platform,
) -> Tensor:  # fmt: skip
    """x (T, columns) times the transpose of W (rows, columns), or with `transposed` x (T, rows) times W itself.

    x is contiguous, T at least 1; `words` are those of `words_of`.
    """
    rows, columns = shape
    tokens, (depth, width) = x.shape[0], (rows, columns) if transposed else (columns, rows)
    tile = choice.sparse_matmul(platform.architecture, x.dtype, tokens)
    length, breadth = (tile.rows, tile.depth) if transposed else (tile.depth, tile.rows)
    down, across = cdiv(width, breadth), cdiv(tokens, tile.columns)
    steps = choice.steps_per_split(platform.architecture, down * across, depth, length)
    splits = cdiv(cdiv(depth, length), steps)
    y, sums = rooms(x, width, splits)
    # in 16 bits nothing spills, and registers that are not taken let more programs run at a time
    spills = x.dtype == torch.float32 or (versions.WIDE_PACKED_SPILLS and tile.columns >= 64)
    registers = platform.all_registers if spills else {}
    added, has_bias = y if bias is None else bias, int(bias is not None)
    sparse_matmul_kernel[across, down, splits](
        x, values, words, pointers, added, sums, tokens, rows, columns, words.shape[1], steps,
        has_bias if splits == 1 else 0, TRANSPOSED=transposed, UPCAST=platform.interpreted,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, **registers,
    )  # fmt: skip
    if splits > 1:
        add_sums(sums, added, y, has_bias)
    return y


def takes(x: Tensor, values: Tensor) -> bool:
    """Whether the kernels multiply these dtypes."""
    return x.dtype in DTYPES and values.dtype in DTYPES


def sparse_forward(
    x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """y (T, out) = x (T, in) W^T + bias in x's dtype."""
    shape = out_features, x.shape[1]
    if not 0 < x.shape[0] <= tables.SPARSE_TOKENS:
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, expanded(values, offsets, pointers, shape, x.dtype), bias)
    platform = targets.platform(x.device)
    if choice.listed_matmul(x.shape[0], values.numel(), shape[0] * shape[1]):
        return listed_matmul(x.contiguous(), values, offsets, pointers, bias, out_features, platform)
    words = words_of(offsets, pointers, *shape)
    return sparse_matmul(x.contiguous(), values, words, pointers, bias, shape, False, platform)


def sparse_input_gradient(gy: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, in_features: int) -> Tensor:
    """dx = gy W (T, in) in gy's dtype."""
    shape = gy.shape[1], in_features
    if not 0 < gy.shape[0] <= tables.SPARSE_TOKENS:
        return gy @ expanded(values, offsets, pointers, shape, gy.dtype)
    words, platform = words_of(offsets, pointers, *shape), targets.platform(gy.device)
    return sparse_matmul(gy.contiguous(), values, words, pointers, None, shape, True, platform)
