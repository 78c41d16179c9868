"""What the tasks of a look at many scores found, put together: each has written into room of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pst_kernels.masks.guess import Candidates

from .row_loops import SLACK

MOST_CANDIDATES = 8  # one in so many scores; where a task has more, as in ties of millions, the pass runs again
Scratch = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]


class Room:
    """For the candidates of `tasks` tasks, `capacity` each, and their counts."""

    def __init__(self, tasks: int, capacity: int, scratch: Scratch):
        device = torch.device("cpu")
        self.capacity = capacity
        self.scores = scratch("candidate scores", (tasks, capacity), torch.float32, device)
        self.indices = scratch("candidate indices", (tasks, capacity), torch.int64, device)
        self.below, self.found = np.empty(tasks, np.int64), np.empty(tasks, np.int64)

    def candidates(self) -> Candidates:
        """Of all tasks, in their order."""
        return Candidates(
            int(self.below.sum()),
            np.concatenate([row[:n] for row, n in zip(self.scores.numpy(), self.found, strict=True)]),
            np.concatenate([row[:n] for row, n in zip(self.indices.numpy(), self.found, strict=True)]),
        )


def look(run: Callable[[Room], None], tasks: int, scores_per_task: int, scratch: Scratch) -> Candidates:
    """What `run` finds: it fills a room, and counts what does not fit, for which it runs again."""
    usual = scores_per_task // MOST_CANDIDATES
    room = Room(tasks, usual + SLACK, scratch)
    run(room)
    if room.found.max() > usual:
        room = Room(tasks, scores_per_task + SLACK, scratch)
        run(room)
    return room.candidates()
