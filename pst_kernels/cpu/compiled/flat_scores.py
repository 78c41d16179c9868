"""A look at many scores that are stored: how many lie below a bracket, and which lie inside it (see ../select.py)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pst_kernels.masks.guess import Bracket, Candidates

from . import row_loops, threads
from .candidates import Room, Scratch, look
from .jit import whole_pass
from .threads import take_task
from .views import floats_at, longs_at, record_of

TASK = 1 << 16  # scores of a task
STEP = 1 << 12  # scores looked at together: with their flags they stay in a core's first cache
_NUMBERS = ("next", "tasks", "numel", "capacity")
_ADDRESSES = ("scores", "below", "found", "candidate_scores", "candidate_indices")
FRAME = np.dtype(
    [(name, np.int64) for name in (*_NUMBERS, *_ADDRESSES)] + [("lower", np.float32), ("upper", np.float32)]
)
_frame = record_of("record_of_flat_scores", FRAME)


@whole_pass
def count(address):
    """For each task: how many scores lie below the bracket, how many inside it, and these with their flat index,
    unless that many and SLACK more do not fit.
    """
    f = _frame(address)
    flags = np.zeros(STEP, np.uint8)
    below_of, found_of = longs_at(f.below, f.tasks), longs_at(f.found, f.tasks)
    while True:
        task = take_task(address)
        if task >= f.tasks:
            return
        below, found, room = 0, 0, task * f.capacity
        out = floats_at(f.candidate_scores + 4 * room, f.capacity)
        indices = longs_at(f.candidate_indices + 8 * room, f.capacity)
        last = min(f.numel, (task + 1) * TASK)
        for first in range(task * TASK, last, STEP):
            size = min(STEP, last - first)
            scores = floats_at(f.scores + 4 * first, size)
            row_loops.keep_from(scores, f.lower, flags[:size])
            below += size - row_loops.count(flags[:size])
            row_loops.inside(scores, f.lower, f.upper, flags[:size])
            for j in range(size, STEP):
                flags[j] = 0
            found = row_loops.collect(scores, flags, first, found, out, indices)
        below_of[task], found_of[task] = below, found


def gather(scores: Tensor, bracket: Bracket, scratch: Scratch) -> Candidates:
    """Of contiguous fp32 scores on a CPU."""
    tasks, frame = -(-scores.numel() // TASK), np.zeros(1, FRAME)

    def run(room: Room) -> None:
        for name, value in {
            "next": 0, "tasks": tasks, "numel": scores.numel(), "capacity": room.capacity,
            "scores": scores.data_ptr(), "below": room.below.ctypes.data, "found": room.found.ctypes.data,
            "candidate_scores": room.scores.data_ptr(), "candidate_indices": room.indices.data_ptr(),
            "lower": bracket.lower, "upper": bracket.upper,
        }.items():  # fmt: skip
            frame[name] = value
        threads.run(count, frame, tasks)

    return look(run, tasks, TASK, scratch)
