"""When a mask is due: computed once per change of what it depends on, not once per forward.

A write in place moves a tensor's version counter, except that of a fused optimizer, so optimizer steps are counted too.
Gradient accumulation, evaluation and the recomputation of activation checkpointing move nothing, and reuse the mask.
`seen` (int64, on the CPU) remembers the counters of the last look; a tensor, so that a compiled graph can carry it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_CHANGES, _VALID, _FIRST = 0, 1, 2  # changes since the last refresh, whether the counters count, the counters


_optimizer_steps = 0  # of any optimizer in this process: torch.optim.AdamW(fused=True) moves no version counter


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def never_seen(tensors: int) -> Tensor:
    """The state of a mask that was never computed; `tensors` is how many tensors it depends on."""
    # device="cpu": under `with torch.device("meta")` it would be a meta tensor, and every refresh a silent no-op
    return torch.zeros(_FIRST + 2 * tensors + 1, dtype=torch.int64, device="cpu")


def is_due(seen: Tensor, num_pruned: Tensor, factors: Sequence[Tensor], interval: int) -> bool:
    """Whether to recompute the mask now, and remember this look.

    A changed sparsity is due at once, changed factors at every `interval`-th change.
    """
    before, now = seen.tolist(), _counters(num_pruned, factors)
    if before[_VALID] and before[_FIRST:] == now:
        return False
    first = not before[_VALID]
    sparsity_changed = before[_FIRST : _FIRST + 2] != now[:2]
    changes = before[_CHANGES] + 1
    due = first or sparsity_changed or changes >= interval
    seen.numpy()[:] = 0 if due else changes, 1, *now
    return due


def is_last_before_refresh(seen: Tensor, interval: int) -> bool:
    """Whether the next change makes the mask due, so that a gradient of the scores is worth its cost now."""
    return int(seen[_CHANGES]) + 1 >= interval


def mark_fresh(seen: Tensor, num_pruned: Tensor, factors: Sequence[Tensor]) -> None:
    """The mask belongs to these tensors as they are: after it was loaded with them."""
    seen.numpy()[:] = 0, 1, *_counters(num_pruned, factors)


def mark_stale(seen: Tensor) -> None:
    """Recompute before the next use, whatever the counters say."""
    seen.zero_()


def _counters(num_pruned: Tensor, factors: Sequence[Tensor]) -> list[int]:
    # A process group may write the same count anew in every forward, so it is compared by value where reading is free.
    count = [int(num_pruned), 0] if num_pruned.device.type == "cpu" else _counter(num_pruned)
    return [*count, _optimizer_steps, *(n for factor in factors for n in _counter(factor))]


def _counter(tensor: Tensor) -> list[int]:
    # The address tells a replaced tensor from its predecessor. Inference tensors have no version, and never change.
    return [0 if tensor.is_inference() else tensor._version, tensor.data_ptr()]
