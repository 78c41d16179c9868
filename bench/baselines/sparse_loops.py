"""SparseProp's loop (Nikdan et al., ICML 2023), written anew, and the fused multiply-adds that a core can do at most.

SparseProp keeps the output in memory: for each kept weight, y[i, :] += w * x[j, :] over a tile of tokens, which is two
loads and a store for each multiply-add.
"""

from __future__ import annotations

import functools

import llvmlite.ir as ir
import numba
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from pst_kernels.cpu.compiled.vectors import LANES

TILE = 128  # tokens
CHAINS = 12  # of multiply-adds, each of which waits for its own last one


class SparseProp:
    """y = x W^T with W in torch's CSR layout."""

    def __init__(self, weight: Tensor):
        self.rows = weight.shape[0]
        parts = weight.values(), weight.crow_indices(), weight.col_indices()
        self.parts = [part.numpy() for part in parts]

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.zeros(self.rows, len(x))
        add_rows = _on_one_thread if torch.get_num_threads() == 1 else _on_all_threads
        add_rows(*self.parts, x.T.contiguous().numpy(), y.numpy())
        return y.T.contiguous()


def _add_rows(values, crow, columns, x, y):
    for tile in numba.prange((x.shape[1] + TILE - 1) // TILE):
        first, last = tile * TILE, min(x.shape[1], (tile + 1) * TILE)
        for i in range(crow.size - 1):
            out = y[i, first:last]
            for entry in range(crow[i], crow[i + 1]):
                value, line = values[entry], x[columns[entry], first:last]
                for t in range(out.size):
                    out[t] += value * line[t]


_compile = functools.partial(numba.njit, fastmath={"contract", "nsz"}, error_model="numpy")
_on_all_threads, _on_one_thread = _compile(parallel=True)(_add_rows), _compile()(_add_rows)


@intrinsic
def _multiply_adds(typing_context, count, factor):
    def generate(context, builder, signature, arguments):
        count, factor = arguments
        vector = ir.VectorType(ir.FloatType(), LANES)
        nothing = ir.Constant(vector, ir.Undefined)
        one = builder.insert_element(nothing, factor, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        splat = builder.shuffle_vector(one, nothing, zeros)
        sums = [cgutils.alloca_once(builder, vector) for _ in range(CHAINS)]
        for number, place in enumerate(sums):
            builder.store(ir.Constant(vector, [float(number)] * LANES), place)
        start, step = ir.Constant(count.type, 0), ir.Constant(count.type, 1)
        with cgutils.for_range_slice(builder, start, count, step):
            for place in sums:
                product = builder.fmul(builder.load(place), splat, flags=("contract",))
                builder.store(builder.fadd(product, splat, flags=("contract",)), place)
        total = builder.load(sums[0])
        for place in sums[1:]:
            total = builder.fadd(total, builder.load(place))
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64, types.float32), generate


@numba.njit(nogil=True)
def _run_multiply_adds(count, factor):
    return _multiply_adds(count, factor)


def multiply_adds(count: int) -> int:
    """Do about so many on one core, from registers alone; returns how many."""
    turns = max(1, count // (CHAINS * LANES))
    _run_multiply_adds(turns, np.float32(0.5))
    return turns * CHAINS * LANES
