"""When a mask is due: computed once per change of what it depends on, not once per forward.

A write in place moves a tensor's version counter, except that of a fused optimizer, so the optimizers that own a
layer's factors report their steps too. Gradient accumulation, evaluation and the recomputation of activation
checkpointing move nothing, and reuse the mask. `seen` (int64, on the CPU) remembers the counters of the last look; a
tensor, so that a compiled graph can carry it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

# Changes since the last refresh; whether the counters count; whether an optimizer has stepped; the counters
_CHANGES, _VALID, _STEPPED, _FIRST = 0, 1, 2, 3

_layers: weakref.WeakSet[Any] = weakref.WeakSet()  # that wait for optimizer steps; each has `factors` and `_seen`


def watch_optimizers(layer: Any) -> None:
    """Let the steps of every optimizer that owns a factor of this layer count as changes of its factors."""
    _layers.add(layer)
    _hook_optimizers()


@functools.cache
def _hook_optimizers() -> None:
    """Once a process, when its first layer is made: no other optimizer pays for it."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    owned = set(map(id, parameters))
    sharded = any(hasattr(p, "full_tensor") for p in parameters)
    for layer in _layers:
        factors = layer.factors
        # Sharded parameters that are gathered now are other objects than the optimizer's.
        gathered = sharded and not any(hasattr(factor, "full_tensor") for factor in factors)
        if gathered or any(id(factor) in owned for factor in factors):
            layer._seen.numpy()[_STEPPED] = 1


def never_seen(tensors: int) -> Tensor:
    """The state of a mask that was never computed; `tensors` is how many tensors it depends on."""
    # device="cpu": under `with torch.device("meta")` it would be a meta tensor, and every refresh a silent no-op
    return torch.zeros(_FIRST + 2 * tensors, dtype=torch.int64, device="cpu")


def is_due(seen: Tensor, num_pruned: Tensor, factors: Sequence[Tensor], interval: int) -> bool:
    """Whether to recompute the mask now, and remember this look.

    A changed sparsity is due at once, changed factors at every `interval`-th change.
    """
    before, now = seen.tolist(), _counters(num_pruned, factors)
    if before[_VALID] and not before[_STEPPED] and before[_FIRST:] == now:
        return False
    first = not before[_VALID]
    sparsity_changed = before[_FIRST : _FIRST + 2] != now[:2]
    changes = before[_CHANGES] + 1
    due = first or sparsity_changed or changes >= interval
    seen.numpy()[:] = 0 if due else changes, 1, 0, *now
    return due


def is_last_before_refresh(seen: Tensor, interval: int) -> bool:
    """Whether the next change makes the mask due, so that a gradient of the scores is worth its cost now."""
    return int(seen[_CHANGES]) + 1 >= interval


def mark_fresh(seen: Tensor, num_pruned: Tensor, factors: Sequence[Tensor]) -> None:
    """The mask belongs to these tensors as they are: after it was loaded with them."""
    seen.numpy()[:] = 0, 1, 0, *_counters(num_pruned, factors)


def mark_stale(seen: Tensor) -> None:
    """Recompute before the next use, whatever the counters say."""
    seen.zero_()


def _counters(num_pruned: Tensor, factors: Sequence[Tensor]) -> list[int]:
    # A process group may write the same count anew in every forward, so it is compared by value where reading is free.
    count = [int(num_pruned), 0] if num_pruned.device.type == "cpu" else _counter(num_pruned)
    return [*count, *(n for factor in factors for n in _counter(factor))]


def _counter(tensor: Tensor) -> list[int]:
    # The address tells a replaced tensor from its predecessor. Inference tensors have no version, and never change.
    return [0 if tensor.is_inference() else tensor._version, tensor.data_ptr()]
