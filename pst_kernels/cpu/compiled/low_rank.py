"""The compiled passes of U and V over lists of kept weights: W' where a weight is kept, and dU and dV from G there.

`lists` are offsets, pointers, rows and columns, as in SparseRows. Nothing but the lists is read of W.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pst_kernels.masks.chunks import CHUNK

from . import threads as team
from .arguments import padded, rows_per_task
from .jit import part, whole_pass
from .ready import Scratch
from .row_loops import add_product
from .sparse_passes import form_of
from .vectors import WIDTH, WIDTHS, add_scaled, row_product
from .views import bytes_at, floats_at, integers_at, numbers_of, record_of

Places = tuple[Tensor, Tensor, int, int]  # offsets, pointers, rows, columns
TASKS, TASK_ROWS = 8, 64  # of dV: at most so many sums over rows, each of at least so many rows
_NUMBERS = ("next", "tasks", "task_rows", "rows", "columns", "rank")
_ADDRESSES = ("U", "V", "base", "added", "values", "offsets", "pointers", "dU", "partial")
FRAME = np.dtype([(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)])
_frame, _numbers = record_of("record_of_low_rank", FRAME), numbers_of(FRAME)
_CPU = torch.device("cpu")


@part
def _row_of(address, row, size):
    return floats_at(address + 4 * row * size, size)


@whole_pass
def update(address):
    """values (kept,) = base + U V where kept, + added if there are any. A task is some rows."""
    f = _frame(address)
    chunks = (f.columns + CHUNK - 1) // CHUNK
    pointers = integers_at(f.pointers, f.rows * chunks + 1)
    kept = np.int64(pointers[f.rows * chunks])
    offsets, base, added = bytes_at(f.offsets, kept), floats_at(f.base, kept), floats_at(f.added, kept)
    values, V = floats_at(f.values, kept), floats_at(f.V, f.rank * f.columns).reshape(f.rank, f.columns)
    line = np.empty(chunks * CHUNK, np.float32)
    while True:
        task = team.take_task(address)
        if task >= f.tasks:
            return
        for i in range(task * f.task_rows, min(f.rows, (task + 1) * f.task_rows)):
            line[:] = 0
            add_product(_row_of(f.U, i, f.rank), V, line[: f.columns])
            for chunk in range(chunks):
                first, begin, end = chunk * CHUNK, pointers[chunk * f.rows + i], pointers[chunk * f.rows + i + 1]
                if f.added:
                    for entry in range(begin, end):
                        values[entry] = base[entry] + line[first + offsets[entry]] + added[entry]
                else:
                    for entry in range(begin, end):
                        values[entry] = base[entry] + line[first + offsets[entry]]


@whole_pass
def gradients(address):
    """dU (rows, rank) and partial (tasks, columns, rank), of which dV^T is the sum, from G (kept,) in `values`.

    U is (rows, rank) and V here V^T (columns, rank), the rank one of WIDTHS. A task is some rows.
    """
    f = _frame(address)
    chunks, form = (f.columns + CHUNK - 1) // CHUNK, np.int64(form_of(f.rank))
    while True:
        task = team.take_task(address)
        if task >= f.tasks:
            return
        sums = f.partial + task * f.columns * f.rank * 4
        floats_at(sums, f.columns * f.rank)[:] = 0
        for chunk in range(chunks):
            pointers, above = integers_at(f.pointers + 4 * chunk * f.rows, f.rows + 1), chunk * CHUNK * f.rank * 4
            for i in range(task * f.task_rows, min(f.rows, (task + 1) * f.task_rows)):
                begin, line = np.int64(pointers[i]), i * f.rank * 4
                count, G, offsets = np.int64(pointers[i + 1]) - begin, f.values + 4 * begin, f.offsets + begin
                row_product(form, G, offsets, count, f.V + above, f.dU + line, np.int64(chunk == 0), np.float32(0))
                add_scaled(form, G, offsets, count, f.U + line, sums + above)


def values_of(base: Tensor, places: Places, U: Tensor, V: Tensor, beta: float, added: Tensor | None) -> Tensor:
    """W' where kept, fp32 (kept,): base + beta U V, and `added` to it; base and added fp32."""
    offsets, pointers, rows, columns = places
    out = torch.empty_like(base)
    task_rows = rows_per_task(rows, columns)
    U, V = padded(U, 1, beta), padded(V, 0)
    tasks = -(-rows // task_rows)
    frame = _numbers(
        tasks=tasks, task_rows=task_rows, rows=rows, columns=columns, rank=len(V), U=U.data_ptr(), V=V.data_ptr(),
        base=base.data_ptr(), added=0 if added is None else added.data_ptr(), values=out.data_ptr(),
        offsets=offsets.data_ptr(), pointers=pointers.data_ptr(),
    )  # fmt: skip
    team.run(update, frame, tasks)
    return out


def factor_gradients(
    G: Tensor, places: Places, U: Tensor, V: Tensor, beta: float, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """dU = beta G V^T (rows, r) and dV = beta U^T G (r, columns) of fp32 G (kept,), as many ranks at a time as fit."""
    parts = [slice(first, first + WIDTH) for first in range(0, len(V), WIDTH)]
    found = [_some_ranks(G, places, U[:, part], V[part], beta, scratch) for part in parts]
    if len(found) == 1:
        return found[0]
    return torch.cat([dU for dU, _ in found], 1), torch.cat([dV for _, dV in found])


def _some_ranks(
    G: Tensor, places: Places, U: Tensor, V: Tensor, beta: float, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    offsets, pointers, rows, columns = places
    width = min(width for width in WIDTHS if width >= len(V))
    lines, panel = (padded(factor, 1, beta, width) for factor in (U, V.t()))
    dU = torch.empty(rows, width)
    tasks = max(1, min(TASKS, rows // TASK_ROWS))
    partial = scratch("sums over rows", (tasks, columns, width), torch.float32, _CPU)
    frame = _numbers(
        tasks=tasks, task_rows=-(-rows // tasks), rows=rows, columns=columns, rank=width, U=lines.data_ptr(),
        V=panel.data_ptr(), values=G.data_ptr(), offsets=offsets.data_ptr(), pointers=pointers.data_ptr(),
        dU=dU.data_ptr(), partial=partial.data_ptr(),
    )  # fmt: skip
    team.run(gradients, frame, tasks)
    return dU[:, : len(V)], partial.sum(0)[:, : len(V)].t()
