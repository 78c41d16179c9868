"""The compiled products with a weight of which only lists of kept weights are stored (see ../sparse_rows.py).

Tokens go in tiles of 8 to 64. A tile of x is packed transposed, (in, width), so that a chunk of its columns, a panel,
stays in a core's first cache while rows pass over it, and a row's sums over the tokens stay in registers.

A processor guesses where a row's loop ends from the ends before it. A row keeps a dozen weights of a chunk at 90 %, and
a wrong guess takes as long as several of them. So the same rows pass over two tiles one after the other: over the
second the ends are guessed right, and the lists are in a near cache.
"""

from __future__ import annotations

import numpy as np

from pst_kernels.masks.chunks import CHUNK

from .jit import inlined, part, whole_pass
from .threads import take_task
from .vectors import (
    HALVES,
    LANES,
    WIDTH,
    WIDTHS,
    dots,
    row_product,
    transpose,
    transpose_from_halves,
    transpose_to_halves,
    vector_products,
)
from .views import floats_at, halves_at, integers_at, record_of

ROWS, TOGETHER = 512, 2  # rows and tiles at most whose sums are held: 256 KB, which stay in a core's second cache
SUMS = ROWS * WIDTH  # floats of a tile's
_NUMBERS = (
    "next", "slots", "tasks", "groups", "group_rows", "rows", "columns", "tokens", "tile_count", "tile_bytes",
    "together", "packed_bytes", "x_stride", "y_stride", "x_is_bf16", "y_is_bf16", "values_are_bf16", "adds",
)  # fmt: skip
_ADDRESSES = (
    "x", "y", "values", "offsets", "pointers", "bias", "tiles", "packed", "sums", "packed_y", "out",
)  # fmt: skip
# `packed_bytes` lie between the scratch of two threads, `tile_bytes` between packed tiles; an address of 0: none
FRAME = np.dtype([(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)])
_frame = record_of("record_of_sparse_passes", FRAME)
SQUARE = 8  # of the transposes


@part
def widen_one(half):
    bits = np.empty(1, np.uint32)
    bits[0] = np.uint32(half) << np.uint32(16)
    return bits.view(np.float32)[0]


@part
def _narrow(number):
    """To nearest even; NaN stays NaN."""
    value = np.empty(1, np.float32)
    value[0] = number
    bits = value.view(np.uint32)[0]
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@part
def _pack(source, stride, is_bf16, tokens, columns, width, packed):
    """packed (columns, width) = source (tokens, columns)^T in fp32, zero behind the last token."""
    size = 2 if is_bf16 else 4
    whole = columns // SQUARE * SQUARE
    out = floats_at(packed, columns * width)
    for first in range(0, width, SQUARE):
        there, start = min(SQUARE, max(0, tokens - first)), 0
        if there == SQUARE:
            for j in range(0, whole, SQUARE):
                here = source + (first * stride + j) * size
                if is_bf16:
                    transpose_from_halves(here, stride * size, packed + (j * width + first) * 4, width * 4)
                else:
                    transpose(here, stride * size, packed + (j * width + first) * 4, width * 4)
            start = whole
        else:
            for j in range(columns):
                for token in range(there, min(SQUARE, width - first)):
                    out[j * width + first + token] = np.float32(0)
        for token in range(there):
            line = source + (first + token) * stride * size
            if is_bf16:
                halves = halves_at(line, columns)
                for j in range(start, columns):
                    out[j * width + first + token] = widen_one(halves[j])
            else:
                floats = floats_at(line, columns)
                for j in range(start, columns):
                    out[j * width + first + token] = floats[j]


@part
def _unpack(sums, width, rows, target, stride, is_bf16, tokens):
    """target (tokens, rows) = sums (rows, width)^T."""
    size = 2 if is_bf16 else 4
    whole = rows // SQUARE * SQUARE
    values = floats_at(sums, rows * width)
    for first in range(0, tokens, SQUARE):
        there, start = min(SQUARE, tokens - first), 0
        if there == SQUARE:
            for i in range(0, whole, SQUARE):
                here = target + (first * stride + i) * size
                if is_bf16:
                    transpose_to_halves(sums + (i * width + first) * 4, width * 4, here, stride * size)
                else:
                    transpose(sums + (i * width + first) * 4, width * 4, here, stride * size)
            start = whole
        for token in range(there):
            line = target + (first + token) * stride * size
            if is_bf16:
                halves = halves_at(line, rows)
                for i in range(start, rows):
                    halves[i] = _narrow(values[i * width + first + token])
            else:
                floats = floats_at(line, rows)
                for i in range(start, rows):
                    floats[i] = values[i * width + first + token]


@part
def form_of(width):
    """Of `row_product`, with fp32 values."""
    form = 0
    while WIDTHS[form] < width:
        form += 1
    return form


@part
def _chunk_product(f, chunk, form, width, panel, sums, first, last):
    """Add one chunk's columns to the sums of rows first to last."""
    pointers = integers_at(f.pointers + 4 * chunk * f.rows, f.rows + 1)
    size = 2 if f.values_are_bf16 else 4
    bias = floats_at(f.bias, f.rows)
    starts = np.int64(chunk == 0)
    for i in range(first, last):
        begin, end = np.int64(pointers[i]), np.int64(pointers[i + 1])
        start = bias[i] if starts and f.bias else np.float32(0)
        row_product(
            form, f.values + begin * size, f.offsets + begin, end - begin, panel, sums + (i - first) * width * 4,
            starts, start,
        )  # fmt: skip


@part
def _tile_of(f, tile):
    """First token, width, and how many tokens there are."""
    place = integers_at(f.tiles + 8 * tile, 2)
    token, width = np.int64(place[0]), np.int64(place[1])
    return token, width, min(width, f.tokens - token)


@whole_pass
def multiply(address):
    """y (tokens, rows) = x (tokens, columns) W^T + bias. A task is `together` tiles of tokens and a group of rows."""
    f = _frame(address)
    own = take_task(address + 8) * f.packed_bytes
    packed, sums = f.packed + own, f.sums + own
    in_hand = -1
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        group, first_tile = task % f.groups, task // f.groups * f.together
        tiles = min(f.tile_count - first_tile, f.together)
        if first_tile != in_hand:
            for number in range(tiles):
                token, width, tokens = _tile_of(f, first_tile + number)
                source = f.x + token * f.x_stride * (2 if f.x_is_bf16 else 4)
                panels = packed + number * f.tile_bytes
                _pack(source, f.x_stride, f.x_is_bf16, tokens, f.columns, width, panels)
            in_hand = first_tile
        last_of_group = min(f.rows, (group + 1) * f.group_rows)
        for first in range(group * f.group_rows, last_of_group, ROWS):
            last = min(first + ROWS, last_of_group)
            for chunk in range((f.columns + CHUNK - 1) // CHUNK):
                for number in range(tiles):
                    _, width, _ = _tile_of(f, first_tile + number)
                    form = np.int64(HALVES) if f.values_are_bf16 else np.int64(form_of(width))
                    panel = packed + number * f.tile_bytes + chunk * CHUNK * width * 4
                    _chunk_product(f, chunk, form, width, panel, sums + number * SUMS * 4, first, last)
            for number in range(tiles):
                token, width, tokens = _tile_of(f, first_tile + number)
                target = f.y + (token * f.y_stride + first) * (2 if f.y_is_bf16 else 4)
                _unpack(sums + number * SUMS * 4, width, last - first, target, f.y_stride, f.y_is_bf16, tokens)


@part
def pack_token(x, is_bf16, columns, packed):
    """One token's x in fp32, with zeros up to the end of the last chunk."""
    _pack(x, 0, is_bf16, 1, columns, 1, packed)
    table = floats_at(packed, (columns + CHUNK - 1) // CHUNK * CHUNK)
    for j in range(columns, table.size):
        table[j] = np.float32(0)


@inlined
def add_lanes(f, totals, bias, y, y_halves, first, last):
    """y of one token and rows first to last, of their sums lane by lane."""
    for i in range(first, last):
        total = np.float32(0)
        for lane in range(LANES):
            total += totals[(i - first) * LANES + lane]
        if f.bias:
            total += bias[i]
        if f.y_is_bf16:
            y_halves[i] = _narrow(total)
        else:
            y[i] = total


@whole_pass
def multiply_one(address):
    """`multiply` for one token: lists are read once, at the speed of memory. A task is a group of rows."""
    f = _frame(address)
    slot = take_task(address + 8)
    chunks = (f.columns + CHUNK - 1) // CHUNK
    kept = np.int64(integers_at(f.pointers + 4 * f.rows * chunks, 1)[0])
    packed, sums = f.packed + slot * f.packed_bytes, f.sums + slot * f.packed_bytes
    bias, totals = floats_at(f.bias, f.rows), floats_at(sums, ROWS * LANES)
    y, y_halves = floats_at(f.y, f.rows), halves_at(f.y, f.rows)
    pack_token(f.x, f.x_is_bf16, f.columns, packed)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        first, last = task * f.group_rows, min(f.rows, (task + 1) * f.group_rows)
        for chunk in range(chunks):
            vector_products(
                f.values_are_bf16, f.values, f.offsets, f.pointers + 4 * chunk * f.rows, kept, first, last,
                packed + chunk * CHUNK * 4, sums, np.int64(chunk == 0),
            )  # fmt: skip
        add_lanes(f, totals, bias, y, y_halves, first, last)


@part
def _pack_tile(source, stride, is_bf16, tokens, columns, packed, tile):
    """Tile `tile` of a tensor (tokens, columns) into packed (tiles, columns, WIDTH)."""
    size, first = 2 if is_bf16 else 4, tile * WIDTH
    line = source + first * stride * size
    _pack(line, stride, is_bf16, min(WIDTH, tokens - first), columns, WIDTH, packed + first * columns * 4)


@whole_pass
def pack_both(address):
    """x into `packed` and gy, which is in y, into `packed_y`: (tiles, features, WIDTH) each. A task is a tile."""
    f = _frame(address)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        tile = task // 2
        if task % 2:
            _pack_tile(f.x, f.x_stride, f.x_is_bf16, f.tokens, f.columns, f.packed, tile)
        else:
            _pack_tile(f.y, f.y_stride, f.y_is_bf16, f.tokens, f.rows, f.packed_y, tile)


@whole_pass
def sampled(address):
    """out (kept,) = gy^T x at the kept weights, or that added to it. A task is a group of rows and a chunk."""
    f = _frame(address)
    chunks, tiles = (f.columns + CHUNK - 1) // CHUNK, (f.tokens + WIDTH - 1) // WIDTH
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        group, chunk = task // chunks, task % chunks
        pointers = integers_at(f.pointers + 4 * chunk * f.rows, f.rows + 1)
        for tile in range(tiles):
            panel = f.packed + (tile * f.columns + chunk * CHUNK) * WIDTH * 4
            lines = f.packed_y + tile * f.rows * WIDTH * 4
            adds = np.int64(f.adds or tile > 0)
            for i in range(group * f.group_rows, min(f.rows, (group + 1) * f.group_rows)):
                begin, end = np.int64(pointers[i]), np.int64(pointers[i + 1])
                dots(lines + i * WIDTH * 4, f.offsets + begin, end - begin, panel, f.out + 4 * begin, adds)
