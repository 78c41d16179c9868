"""Vector instructions that Numba's own loops do not become: made as LLVM's, with sums that stay in registers.

An array or scalars that a loop adds to are stored and loaded again at every step by what Numba makes of it. Here the
sums are stack slots that LLVM turns into registers. Addresses are int64, sizes count elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import llvmlite.ir as ir
import numba
from numba.core import cgutils, types
from numba.extending import intrinsic

from pst_kernels.masks.chunks import CHUNK

WIDTHS = (8, 16, 32, 64)  # tokens of a tile
WIDTH = WIDTHS[-1]

_FLOAT, _I64, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_FUSED = ("contract", "nsz")
_EIGHT, _EIGHT_I32, _EIGHT_I16 = (ir.VectorType(t, 8) for t in (_FLOAT, _I32, _I16))


def _host_lanes() -> int:
    """Floats of a vector: 16 with AVX-512, else 8, which LLVM splits where vectors are narrower.

    Numba's own variables count: code that is made for another processor must run there.
    """
    if numba.config.CPU_NAME and numba.config.CPU_NAME != "host":
        return 16 if "+avx512f" in (numba.config.CPU_FEATURES or "") else 8
    return 16 if llvmlite.binding.get_host_cpu_features().get("avx512f", False) else 8


LANES = _host_lanes()


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _integers(values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(values)), values)


def _pointer(builder: ir.IRBuilder, address: ir.Value, type: ir.Type) -> ir.Value:
    return builder.inttoptr(address, type.as_pointer())


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, nothing, _integers([0] * lanes))


def _load(builder: ir.IRBuilder, floats: ir.Value, place: int, lanes: int) -> ir.Value:
    vector = builder.bitcast(builder.gep(floats, [_constant(place)]), ir.VectorType(_FLOAT, lanes).as_pointer())
    return builder.load(vector, align=4)


def _store(builder: ir.IRBuilder, value: ir.Value, floats: ir.Value, place: int) -> None:
    builder.store(value, builder.bitcast(builder.gep(floats, [_constant(place)]), value.type.as_pointer()), align=4)


def _multiply_add(builder: ir.IRBuilder, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(left, right, flags=_FUSED), total, flags=_FUSED)


def _widened(builder: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    """bf16 bits, a number or a vector of them, as fp32."""
    if isinstance(halves.type, ir.VectorType):
        lanes = halves.type.count
        bits = builder.zext(halves, ir.VectorType(_I32, lanes))
        return builder.bitcast(builder.shl(bits, _integers([16] * lanes)), ir.VectorType(_FLOAT, lanes))
    return builder.bitcast(builder.shl(builder.zext(halves, _I32), ir.Constant(_I32, 16)), _FLOAT)


def _narrowed(builder: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """A vector of eight fp32 as bf16 bits, to nearest even; NaN stays NaN."""

    def eight(value: int) -> ir.Constant:
        return _integers([value] * 8)

    bits = builder.bitcast(floats, _EIGHT_I32)
    odd = builder.and_(builder.lshr(bits, eight(16)), eight(1))
    rounded = builder.lshr(builder.add(builder.add(bits, eight(0x7FFF)), odd), eight(16))
    nan = builder.fcmp_unordered("uno", floats, floats)
    return builder.trunc(builder.select(nan, eight(0x7FC0), rounded), _EIGHT_I16)


class _Form(NamedTuple):
    """How a list is multiplied with a panel: the sums are `vectors` registers, `chains` times.

    Each chain takes one entry in turn, and they are added up at the end: a sum that waits for the last one takes four
    cycles, in which eight others could be made.
    """

    width: int  # tokens of the panel
    vectors: int
    chains: int
    values: ir.Type = _FLOAT

    @property
    def lanes(self) -> int:
        return self.width // self.vectors


# AVX2 has 16 registers, AVX-512 has 32.
_FORMS = [
    _Form(8, 1, 4), *([_Form(16, 1, 4), _Form(32, 2, 4), _Form(64, 4, 3)] if LANES == 16 else
    [_Form(16, 2, 4), _Form(32, 4, 2), _Form(64, 8, 1)]), _Form(8, 1, 4, _I16),
]  # fmt: skip
HALVES = len(_FORMS) - 1  # the form of 8 tokens and bf16 values; the others, of fp32 values, are in the order of WIDTHS


def _row_product(builder: ir.IRBuilder, form: _Form, arguments: list[ir.Value]) -> None:
    values, offsets, count, panel, sums, starts, start = arguments
    values, offsets = _pointer(builder, values, form.values), _pointer(builder, offsets, _I8)
    panel, sums = _pointer(builder, panel, _FLOAT), _pointer(builder, sums, _FLOAT)
    lanes, vector = form.lanes, ir.VectorType(_FLOAT, form.lanes)
    held = [[cgutils.alloca_once(builder, vector) for _ in range(form.vectors)] for _ in range(form.chains)]
    with builder.if_else(builder.icmp_signed("!=", starts, _constant(0))) as (first, later):
        with first:
            for place in held[0]:
                builder.store(_splat(builder, start, lanes), place)
        with later:
            for v, place in enumerate(held[0]):
                builder.store(_load(builder, sums, v * lanes, lanes), place)
    for place in itertools.chain(*held[1:]):
        builder.store(ir.Constant(vector, [0.0] * lanes), place)

    def add(entry: ir.Value, chain: list[ir.Value]) -> None:
        value = builder.load(builder.gep(values, [entry]))
        value = _splat(builder, value if form.values == _FLOAT else _widened(builder, value), lanes)
        offset = builder.zext(builder.load(builder.gep(offsets, [entry])), _I64)
        x = builder.gep(panel, [builder.mul(offset, _constant(form.width))])
        for v, place in enumerate(chain):
            column = _load(builder, x, v * lanes, lanes)
            builder.store(_multiply_add(builder, value, column, builder.load(place)), place)

    whole = builder.sub(count, builder.urem(count, _constant(form.chains)))
    with cgutils.for_range_slice(builder, _constant(0), whole, _constant(form.chains)) as (entry, _):
        for c, chain in enumerate(held):
            add(builder.add(entry, _constant(c)), chain)
    if form.chains > 1:
        with cgutils.for_range_slice(builder, whole, count, _constant(1)) as (entry, _):
            add(entry, held[0])
    for v in range(form.vectors):
        total = builder.load(held[0][v])
        for chain in held[1:]:
            total = builder.fadd(total, builder.load(chain[v]))
        _store(builder, total, sums, v * lanes)


def _add_scaled(builder: ir.IRBuilder, form: _Form, arguments: list[ir.Value]) -> None:
    values, offsets, count, line, panel = arguments
    values, offsets = _pointer(builder, values, _FLOAT), _pointer(builder, offsets, _I8)
    line, panel = _pointer(builder, line, _FLOAT), _pointer(builder, panel, _FLOAT)
    held = [_load(builder, line, v * form.lanes, form.lanes) for v in range(form.vectors)]
    with cgutils.for_range_slice(builder, _constant(0), count, _constant(1)) as (entry, _):
        value = _splat(builder, builder.load(builder.gep(values, [entry])), form.lanes)
        offset = builder.zext(builder.load(builder.gep(offsets, [entry])), _I64)
        place = builder.gep(panel, [builder.mul(offset, _constant(form.width))])
        for v, vector in enumerate(held):
            before = _load(builder, place, v * form.lanes, form.lanes)
            _store(builder, _multiply_add(builder, value, vector, before), place, v * form.lanes)


def _by_form(
    forms: list[_Form], generate: Callable[..., None], builder: ir.IRBuilder, arguments: list[ir.Value]
) -> None:
    """What an intrinsic does, in the form that its first argument chooses."""
    end = builder.append_basic_block("end")
    blocks = [builder.append_basic_block(f"form{number}") for number in range(len(forms))]
    choice = builder.switch(arguments[0], blocks[-1])
    for number, (form, block) in enumerate(zip(forms, blocks, strict=True)):
        choice.add_case(_constant(number), block)
        builder.position_at_end(block)
        generate(builder, form, arguments[1:])
        builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def row_product(typing_context, form, values, offsets, count, panel, sums, starts, start):
    """sums (width,) += values (count,) @ panel[offsets], or `start` + that where `starts`; panel (columns, width)."""

    def generate(context, builder, signature, arguments):
        _by_form(_FORMS, _row_product, builder, arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, types.float32), generate


@intrinsic
def add_scaled(typing_context, form, values, offsets, count, line, panel):
    """panel[offsets] += values (count,) times line (width,), of fp32 values."""

    def generate(context, builder, signature, arguments):
        _by_form(_FORMS[:HALVES], _add_scaled, builder, arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _lookup(builder: ir.IRBuilder, table: ir.Value) -> Callable[[ir.Value], ir.Value]:
    """What makes table[places] of a vector of places; the table has CHUNK floats.

    With AVX-512 it lies in eight registers: a gather is as slow as a load for each lane.
    """
    vector, indices = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)
    parts = [_load(builder, table, part * LANES, LANES) for part in range(CHUNK // LANES)] if LANES == 16 else []
    choose = ir.FunctionType(vector, [vector, indices, vector])

    def look(places: ir.Value) -> ir.Value:
        if not parts:
            result: ir.Value = ir.Constant(vector, ir.Undefined)
            for lane in range(LANES):
                place = builder.zext(builder.extract_element(places, ir.Constant(_I32, lane)), _I64)
                result = builder.insert_element(
                    result, builder.load(builder.gep(table, [place])), ir.Constant(_I32, lane)
                )
            return result
        two = cgutils.get_or_insert_function(builder.module, choose, "llvm.x86.avx512.vpermi2var.ps.512")
        found = [builder.call(two, [parts[part], places, parts[part + 1]]) for part in range(0, len(parts), 2)]
        bit = 2 * LANES
        while len(found) > 1:
            upper = builder.icmp_signed("!=", builder.and_(places, _integers([bit] * LANES)), _integers([0] * LANES))
            found = [builder.select(upper, found[n + 1], found[n]) for n in range(0, len(found), 2)]
            bit *= 2
        return found[0]

    return look


Reader = Callable[[ir.Value], ir.Value]


def _row_reader(builder: ir.IRBuilder, value_type: ir.Type, pointers: ir.Value) -> tuple[Reader, Reader]:
    """What gives the pointer of a row, and what makes fp32 of values that were loaded."""

    def pointer(row: ir.Value) -> ir.Value:
        return builder.zext(builder.load(builder.gep(pointers, [row])), _I64)

    def floats(loaded: ir.Value) -> ir.Value:
        return loaded if value_type == _FLOAT else _widened(builder, loaded)

    return pointer, floats


def _of_either_type(products: Callable[..., None], count: int) -> tuple[Any, Any]:
    """Signature and code of an intrinsic of so many integers, of which the first says whether values are bf16."""

    def generate(context, builder, signature, arguments):
        with builder.if_else(builder.icmp_signed("!=", arguments[0], _constant(0))) as (in_halves, in_floats):
            with in_halves:
                products(builder, _I16, arguments[1:])
            with in_floats:
                products(builder, _FLOAT, arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * count), generate


def _vector_products(builder: ir.IRBuilder, value_type: ir.Type, arguments: list[ir.Value]) -> None:
    values, offsets, pointers, kept, first, last, table, sums, starts = arguments
    values, offsets = _pointer(builder, values, value_type), _pointer(builder, offsets, _I8)
    pointers, sums = _pointer(builder, pointers, _I32), _pointer(builder, sums, _FLOAT)
    table, vector = _pointer(builder, table, _FLOAT), ir.VectorType(_FLOAT, LANES)
    look, zero = _lookup(builder, table), ir.Constant(vector, [0.0] * LANES)
    starts, one = builder.icmp_signed("!=", starts, _constant(0)), _constant(1)
    held = cgutils.alloca_once(builder, vector)

    pointer, floats = _row_reader(builder, value_type, pointers)
    with cgutils.for_range_slice(builder, first, last, one) as (row, _):
        begin, end = pointer(row), pointer(builder.add(row, one))
        place = builder.gep(sums, [builder.mul(builder.sub(row, first), _constant(LANES))])
        builder.store(builder.select(starts, zero, _load(builder, place, 0, LANES)), held)
        with cgutils.for_range_slice(builder, begin, end, _constant(LANES)) as (entry, _):
            whole = builder.icmp_signed("<=", builder.add(entry, _constant(LANES)), kept)
            with builder.if_else(whole) as (inside, at_the_end):
                with inside:  # what is read of the next row is not counted
                    bytes = ir.VectorType(_I8, LANES).as_pointer()
                    offset = builder.load(builder.bitcast(builder.gep(offsets, [entry]), bytes), align=1)
                    here = builder.bitcast(builder.gep(values, [entry]), ir.VectorType(value_type, LANES).as_pointer())
                    value = floats(builder.load(here, align=2))
                    product = builder.fmul(value, look(builder.zext(offset, ir.VectorType(_I32, LANES))))
                    left = _splat(builder, builder.trunc(builder.sub(end, entry), _I32), LANES)
                    counted = builder.icmp_signed("<", _integers(list(range(LANES))), left)
                    total = builder.fadd(builder.load(held), builder.select(counted, product, zero))
                    builder.store(total, held)
                with at_the_end, cgutils.for_range_slice(builder, entry, end, one) as (single, _):
                    offset = builder.zext(builder.load(builder.gep(offsets, [single])), _I64)
                    value = floats(builder.load(builder.gep(values, [single])))
                    product = builder.fmul(value, builder.load(builder.gep(table, [offset])))
                    lane = builder.trunc(builder.sub(single, entry), _I32)
                    total = builder.load(held)
                    number = builder.fadd(builder.extract_element(total, lane), product)
                    builder.store(builder.insert_element(total, number, lane), held)
        _store(builder, builder.load(held), place, 0)


@intrinsic
def vector_products(typing_context, halves, values, offsets, pointers, kept, first, last, table, sums, starts):
    """For one token: sums (last - first, LANES) of a chunk's products of rows first to last, lane by lane.

    `table` (CHUNK,) is the chunk of x; `kept` the length of the whole list, behind which nothing is read.
    """

    return _of_either_type(_vector_products, 10)


def _dots_of(vectors: int) -> Any:
    """Dot products of one line, held in registers, with the columns of a panel that a list names."""
    lanes, together = WIDTH // vectors, 4

    @intrinsic
    def dots(typing_context, line, offsets, count, panel, out, adds):
        def generate(context, builder, signature, arguments):
            line, offsets, count, panel, out, adds = arguments
            line, offsets = _pointer(builder, line, _FLOAT), _pointer(builder, offsets, _I8)
            panel, out = _pointer(builder, panel, _FLOAT), _pointer(builder, out, _FLOAT)
            left = [_load(builder, line, v * lanes, lanes) for v in range(vectors)]
            adds = builder.icmp_signed("!=", adds, _constant(0))

            def partial(entry):
                """Four numbers whose sum is the dot product."""
                offset = builder.zext(builder.load(builder.gep(offsets, [entry])), _I64)
                x = builder.gep(panel, [builder.mul(offset, _constant(WIDTH))])
                # two chains: one of eight sums would take as long as all the rest
                chains = [builder.fmul(left[v], _load(builder, x, v * lanes, lanes)) for v in range(2)]
                for v in range(2, vectors):
                    chains[v % 2] = _multiply_add(builder, left[v], _load(builder, x, v * lanes, lanes), chains[v % 2])
                total = builder.fadd(*chains)
                while (size := total.type.count) > 4:
                    halves = [_integers(list(range(first, first + size // 2))) for first in (0, size // 2)]
                    total = builder.fadd(*(builder.shuffle_vector(total, total, half) for half in halves))
                return total

            def folded(left, right, low, high):
                return builder.fadd(
                    builder.shuffle_vector(left, right, _integers(low)),
                    builder.shuffle_vector(left, right, _integers(high)),
                )

            def put(value, entry):
                place = builder.bitcast(builder.gep(out, [entry]), value.type.as_pointer())
                before = builder.load(place, align=4)
                nothing = ir.Constant(value.type, [0.0] * 4 if isinstance(value.type, ir.VectorType) else 0.0)
                builder.store(builder.fadd(value, builder.select(adds, before, nothing)), place, align=4)

            whole = builder.sub(count, builder.urem(count, _constant(together)))
            with cgutils.for_range_slice(builder, _constant(0), whole, _constant(together)) as (entry, _):
                a, b, c, d = (partial(builder.add(entry, _constant(e))) for e in range(together))
                ab, cd = folded(a, b, [0, 4, 1, 5], [2, 6, 3, 7]), folded(c, d, [0, 4, 1, 5], [2, 6, 3, 7])
                put(folded(ab, cd, [0, 1, 4, 5], [2, 3, 6, 7]), entry)
            with cgutils.for_range_slice(builder, whole, count, _constant(1)) as (entry, _):
                one = partial(entry)
                pair = folded(one, one, [0, 1, 0, 1], [2, 3, 2, 3])  # in the order of the four above
                numbers = [builder.extract_element(pair, ir.Constant(_I32, n)) for n in range(2)]
                put(builder.fadd(*numbers), entry)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return dots


dots = _dots_of(WIDTH // LANES)


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Of eight vectors of eight, in three steps: pairs, fours, halves."""

    def shuffled(left: ir.Value, right: ir.Value, places: list[int]) -> ir.Value:
        return builder.shuffle_vector(left, right, _integers(places))

    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = [(shuffled(rows[i], rows[i + 1], low), shuffled(rows[i], rows[i + 1], high)) for i in (0, 2, 4, 6)]
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    fours = [[shuffled(pairs[i][p], pairs[i + 1][p], places) for p in (0, 1) for places in (low, high)] for i in (0, 2)]
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [shuffled(top, bottom, places) for places in (low, high) for top, bottom in zip(*fours, strict=True)]


def _square(read: Callable, write: Callable) -> Any:
    """Transpose 8 x 8 numbers from one address to another; the strides are those of their rows, in bytes."""

    @intrinsic
    def square(typing_context, source, source_stride, target, target_stride):
        def generate(context, builder, signature, arguments):
            source, source_stride, target, target_stride = arguments
            rows = [read(builder, builder.add(source, builder.mul(source_stride, _constant(row)))) for row in range(8)]
            for row, vector in enumerate(_transposed(builder, rows)):
                write(builder, vector, builder.add(target, builder.mul(target_stride, _constant(row))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return square


def _read_floats(builder, address):
    return builder.load(_pointer(builder, address, _EIGHT), align=4)


def _read_halves(builder, address):
    return _widened(builder, builder.load(_pointer(builder, address, _EIGHT_I16), align=2))


def _write_floats(builder, vector, address):
    builder.store(vector, _pointer(builder, address, _EIGHT), align=4)


def _write_halves(builder, vector, address):
    builder.store(_narrowed(builder, vector), _pointer(builder, address, _EIGHT_I16), align=2)


transpose = _square(_read_floats, _write_floats)
transpose_from_halves = _square(_read_halves, _write_floats)
transpose_to_halves = _square(_read_floats, _write_halves)
