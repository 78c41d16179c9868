"""For one token: rows of bits and packed values against a chunk of x that stays in registers.

A vector of values is spread out to the places that its bits name, and multiplied by x as a dense weight would be: of a
chunk of 128 columns that is 8 steps with AVX-512 and 16 with AVX2, however many weights it keeps. Looking x up by each
value's column (`vector_products`) took 1.25 times as long at 90 % pruned and 1.4 times at 50 to 80 %, on one core with
AVX-512 and weights that no cache holds; and the bits are fewer bytes than the columns.
"""

from __future__ import annotations

import llvmlite.binding
import llvmlite.ir as ir
import numba
from numba.core import cgutils
from numba.extending import intrinsic

from pst_kernels.masks.chunks import CHUNK

from .vectors import (
    _FLOAT,
    _I8,
    _I32,
    _I64,
    LANES,
    _constant,
    _integers,
    _load,
    _multiply_add,
    _of_either_type,
    _pointer,
    _row_reader,
    _store,
)

BYTES = CHUNK // 8  # of bits of a row in a chunk
AHEAD = 2048  # bytes between a value and what is asked for while it is multiplied


def _host_spreads() -> bool:
    """Whether the processor has an instruction that the spreading is made of."""
    if LANES == 16:
        return True
    if numba.config.CPU_NAME and numba.config.CPU_NAME != "host":
        return "+avx2" in (numba.config.CPU_FEATURES or "")
    return bool(llvmlite.binding.get_host_cpu_features().get("avx2", False))


SPREADS = _host_spreads()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_TABLE = "pst_kernels.spread"  # for each byte of bits, in which order eight values go to their places


def _order(byte: int) -> list[int]:
    """For each of eight places the number of its value among the kept ones; a negative number where none is."""
    return [bin(byte & ((1 << place) - 1)).count("1") - (0 if byte >> place & 1 else 128) for place in range(8)]


def _spread(builder: ir.IRBuilder, values: ir.Value, bits: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first values at the places of the bits, an integer of LANES bits, anything elsewhere; and where they are."""
    if LANES == 16:
        flags = builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR, flags.type])
        expand = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.expand.v16f32")
        return builder.call(expand, [values, ir.Constant(_VECTOR, [0.0] * LANES), flags]), flags
    table = builder.module.globals.get(_TABLE)
    if table is None:
        numbers = [number for byte in range(256) for number in _order(byte)]
        table = cgutils.add_global_variable(builder.module, ir.ArrayType(_I8, len(numbers)), _TABLE)
        table.initializer = ir.Constant(table.value_type, numbers)
        table.global_constant, table.linkage = True, "internal"
    place = builder.gep(table, [_constant(0), builder.mul(builder.zext(bits, _I64), _constant(8))])
    order = builder.load(builder.bitcast(place, ir.VectorType(_I8, 8).as_pointer()), align=1)
    order = builder.sext(order, ir.VectorType(_I32, 8))
    kind = ir.FunctionType(_VECTOR, [_VECTOR, order.type])
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
    return builder.call(permute, [values, order]), builder.icmp_signed(">=", order, _integers([0] * 8))


def _fetch(builder: ir.IRBuilder, array: ir.Value, place: ir.Value) -> None:
    """Ask for a line of memory that is used later: a row is too short for the processor to see where it goes on."""
    address = builder.bitcast(builder.gep(array, [place]), _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [address, *(ir.Constant(_I32, number) for number in (0, 3, 1))])


def _bit_products(builder: ir.IRBuilder, value_type: ir.Type, arguments: list[ir.Value]) -> None:
    values, offsets, bits, pointers, kept, first, last, table, sums, starts = arguments
    values, offsets = _pointer(builder, values, value_type), _pointer(builder, offsets, _I8)
    bits, pointers = _pointer(builder, bits, ir.IntType(LANES)), _pointer(builder, pointers, _I32)
    sums, table = _pointer(builder, sums, _FLOAT), _pointer(builder, table, _FLOAT)
    # eight registers with AVX-512; AVX2 has too few for sixteen
    x = [_load(builder, table, place, LANES) for place in range(0, CHUNK, LANES)] if LANES == 16 else []
    zero, one = ir.Constant(_VECTOR, [0.0] * LANES), _constant(1)
    starts = builder.icmp_signed("!=", starts, _constant(0))
    ahead = _constant(AHEAD // (4 if value_type == _FLOAT else 2))

    pointer, floats = _row_reader(builder, value_type, pointers)
    with cgutils.for_range_slice(builder, first, last, one) as (row, _):
        begin, end = pointer(row), pointer(builder.add(row, one))
        place = builder.gep(sums, [builder.mul(builder.sub(row, first), _constant(LANES))])
        before = builder.select(starts, zero, _load(builder, place, 0, LANES))
        own = builder.mul(row, _constant(CHUNK // LANES))
        inside = builder.icmp_signed("<=", builder.add(end, _constant(LANES)), kept)
        with builder.if_else(inside, likely=True) as (whole, at_the_end):
            with whole:  # what is read of the next row is not spread
                _fetch(builder, values, builder.add(begin, ahead))
                _fetch(builder, values, builder.add(end, ahead))
                _fetch(builder, bits, builder.add(own, _constant(AHEAD // 4 // (LANES // 8))))
                chains, passed = [before, zero], begin
                for step, first_column in enumerate(range(0, CHUNK, LANES)):
                    # each load goes to a mask and to a count at once, which shifts of a longer word would not
                    flags = builder.load(builder.gep(bits, [builder.add(own, _constant(step))]), align=1)
                    here = builder.gep(values, [passed])
                    vector = builder.bitcast(here, ir.VectorType(value_type, LANES).as_pointer())
                    spread, there = _spread(builder, floats(builder.load(vector, align=2)), flags)
                    column = x[step] if x else _load(builder, table, first_column, LANES)
                    total = chains[step % 2]
                    # a NaN of x must not reach rows that keep nothing for it
                    chains[step % 2] = builder.select(there, _multiply_add(builder, spread, column, total), total)
                    passed = builder.add(passed, builder.zext(builder.ctpop(flags), _I64))
                _store(builder, builder.fadd(*chains), place, 0)
            with at_the_end:
                _store(builder, before, place, 0)
                with cgutils.for_range_slice(builder, begin, end, one) as (entry, _):
                    column = builder.zext(builder.load(builder.gep(offsets, [entry])), _I64)
                    value = floats(builder.load(builder.gep(values, [entry])))
                    product = builder.fmul(value, builder.load(builder.gep(table, [column])))
                    lane = builder.gep(place, [builder.urem(column, _constant(LANES))])
                    builder.store(builder.fadd(builder.load(lane), product), lane)


@intrinsic
def bit_products(typing_context, halves, values, offsets, bits, pointers, kept, first, last, table, sums, starts):
    """Sums (last - first, LANES) of a chunk's products of rows first to last, lane by lane.

    `bits` are the chunk's, 16 bytes a row from row 0 on; `table` (CHUNK,) is the chunk of x; `kept` the length of the
    whole list, behind which nothing is read.
    """

    return _of_either_type(_bit_products, 11)
