"""Pruning in few events, with a learning rate that is rewound at each.

A large first step early, a few more up to the final sparsity, and long stretches of training in between: what the best
published sparse models have in common (Kurtic et al., "The Optimal BERT Surgeon", arXiv 2203.07259; Sanh et al., 2020).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from .config import PSTConfig, check_count, check_sparsity


@dataclass(frozen=True)
class Events:
    """When a model is pruned, and how far.

    Args:
        first: sparsity of the first event; the final one where that is lower.
        count: events, the first at `warmup` and the last at 1 - `cooldown` of the steps, evenly apart.

    The sparsity rises from `first` along the cubic of gradual pruning, and stays between two events.
    """

    first: float = 0.7
    count: int = 4

    def __post_init__(self) -> None:
        check_sparsity("first", self.first)
        check_count("events", self.count, 1)

    def steps(self, total_steps: int, config: PSTConfig) -> list[int]:
        """The optimizer steps after which an event comes, rising."""
        start, end = config.warmup * total_steps, total_steps - config.cooldown * total_steps
        if self.count == 1:
            return [round(start)]
        return [round(start + (end - start) * i / (self.count - 1)) for i in range(self.count)]

    def sparsity_at(self, step: int, total_steps: int, config: PSTConfig) -> float:
        """After `step` optimizer steps."""
        if step >= total_steps:
            return config.sparsity
        done = bisect.bisect_right(self.steps(total_steps, config), step)
        if not done:
            return config.initial_sparsity
        first = min(max(self.first, config.initial_sparsity), config.sparsity)
        remaining = 1.0 - (done - 1) / (self.count - 1) if self.count > 1 else 0.0
        return config.sparsity + (first - config.sparsity) * remaining**3

    def rate_at(self, step: int, total_steps: int, config: PSTConfig) -> float:
        """The learning rate's factor: from 1 after each event linearly down to 0 at the next one, or at the end."""
        edges = [0, *self.steps(total_steps, config), total_steps]
        last = bisect.bisect_right(edges, step) - 1
        if last + 1 >= len(edges):
            return 0.0
        return 1.0 - (step - edges[last]) / (edges[last + 1] - edges[last])


class RewindLR(LambdaLR):
    """A learning rate that starts anew at each event of a `SparsitySchedule(kind="events")`; `.step()` once a step.

    Example:
        schedule = SparsitySchedule(model, total_steps=1000, kind="events")
        rate = RewindLR(optimizer, schedule)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step(); optimizer.zero_grad(); schedule.step(); rate.step()
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Any, last_epoch: int = -1):
        super().__init__(optimizer, rewinding(schedule), last_epoch)


def rewinding(schedule: Any) -> Any:
    """The factor of a step, for `LambdaLR`. Raises ValueError for a schedule without events."""
    if schedule.events is None:
        raise ValueError("the schedule has no events to rewind at; make it with kind='events'")
    events, total, config = schedule.events, schedule.total_steps, schedule.config
    return lambda step: events.rate_at(step, total, config)
