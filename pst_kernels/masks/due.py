"""When a mask is due: computed after changes of what it depends on, not once per forward.

A write in place moves a tensor's version counter, except that of a fused optimizer, so the optimizers that own a
layer's factors report their steps too. Gradient accumulation, evaluation and the recomputation of activation
checkpointing move nothing, and reuse the mask. A write through `tensor.data` moves nothing either: saving and
merging make the mask anew, and `refresh_masks` is for the rest.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Watch:
    """What a layer's mask was made from, as far as a look can tell it from what is there now."""

    def __init__(self, made: bool = False, changes: int = 0):
        self.made = made  # whether there is a mask at all
        self.changes = changes  # of the factors since it was made
        self.looks = 0  # at which something had changed: what was made after one belongs to its number
        self.stepped = False  # whether an optimizer has stepped since the last look
        self.count: Any = None
        self.total = NOTHING
        self.mask = NOTHING  # the mask's own version and address: what else writes it is told by them
        # Held, so that no other tensor can get the address of one of these.
        self.tensors: tuple[Tensor, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, (self.made, self.changes)  # a copy's tensors are others: its next look sees one change

    def is_fresh(self, num_pruned: Any, tensors: Sequence[Any]) -> bool:
        """Whether nothing has changed since the last look."""
        return not self.stepped and self.is_fresh_at(count_of(num_pruned), total_of(tensors))

    def is_fresh_at(self, count: Any, total: int) -> bool:
        """`is_fresh` of what was looked up already, by `count_of` and `total_of`."""
        return not self.stepped and self.total == total and self.count == count

    def is_due(self, num_pruned: Tensor, interval: int) -> bool:
        """Whether to make the mask now that something has changed: a changed sparsity is due at once, changed factors
        at the `interval`-th look that finds them changed.
        """
        return self.is_due_at(count_of(num_pruned), interval)

    def is_due_at(self, count: Any, interval: int) -> bool:
        moved = self.count is not None and self.count != count
        return not self.made or moved or self.changes + 1 >= interval

    def note(self, num_pruned: Tensor, tensors: Sequence[Tensor], made: bool, mask: Tensor | None = None) -> None:
        """Remember this look; `made` says that the mask belongs to these tensors as they are."""
        self.looks += 1
        self.note_look(count_of(num_pruned), total_of(tensors), tuple(tensors), made, mask)

    def note_look(
        self, count: Any, total: int, tensors: tuple[Tensor, ...], made: bool, mask: Tensor | None = None
    ) -> None:
        """`note` of what was looked up already; what was made before stays right."""
        self.changes = 0 if made else self.changes + 1
        self.mask = self.mask if mask is None else total_of((mask,))
        self.made, self.stepped = True, False
        self.count, self.total, self.tensors = count, total, tensors

    def mark_stale(self) -> None:
        """Make the mask before the next use, whatever the counters say."""
        self.made, self.tensors, self.total = False, (), NOTHING

    def is_last_before_refresh(self, interval: int) -> bool:
        """Whether the next change makes the mask due, so that a gradient of the scores is worth its cost now."""
        return self.changes + 1 >= interval


NOTHING = -1  # no sum of versions and addresses


def total_of(tensors: Sequence[Tensor]) -> int:
    """One number that differs after a write, which moves a tensor's version, and after a tensor was replaced by
    another, whose address tells it from its predecessor. Inference tensors have no version.
    """
    try:
        return sum(map(version_of, tensors)) + sum(map(address_of, tensors))
    except RuntimeError:
        return sum((0 if t.is_inference() else t._version) + t.data_ptr() for t in tensors)


# Called for every tensor of a model after each step, so without a frame of Python's.
version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
address_of: Callable[[Tensor], int] = Tensor.data_ptr


def addresses_of(tensors: Sequence[Any]) -> int:
    """One number that differs after a tensor was replaced by another, or its memory by other memory."""
    return sum(map(address_of, tensors))


def addresses_and_versions(tensors: Sequence[Sequence[Tensor]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Of every part, which are equally long: the addresses, and the sum of the versions. Together `total_of` each."""
    every, size = list(itertools.chain.from_iterable(tensors)), len(tensors[0]) if tensors else 1
    try:
        versions = list(map(version_of, every))
    except RuntimeError:
        versions = [0 if tensor.is_inference() else tensor._version for tensor in every]
    addresses = zip(*[map(address_of, every)] * size, strict=True)
    return list(addresses), list(map(sum, zip(*[iter(versions)] * size, strict=True)))


def count_of(num_pruned: Tensor) -> Any:
    # A process group may write the same count anew in every forward, so it is compared by value where reading is free.
    if num_pruned.is_cpu:
        return int(num_pruned)
    return num_pruned._version, num_pruned.data_ptr()


_layers: weakref.WeakSet[Any] = weakref.WeakSet()  # each has `factors` and `watch`
_by_address: dict[int, weakref.ref[Watch]] = {}


def register(layer: Any) -> None:
    """Let the steps of every optimizer that owns a factor of this layer count as changes of its factors."""
    _layers.add(layer)
    _hook_optimizers()


@functools.cache
def _hook_optimizers() -> None:
    """Once a process, when its first layer is made: a process without layers has no hook."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


# What is done with an optimizer that is about to step, and the layers of which it has a factor.
before_steps: list[Callable[[torch.optim.Optimizer, Sequence[Any]], None]] = []
# What is done with the layers of which an optimizer has moved a factor.
after_steps: list[Callable[[Sequence[Any]], None]] = []


def _before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    layers = owned_layers(optimizer)
    for act in before_steps:
        act(optimizer, layers)


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    layers = owned_layers(optimizer)
    for layer in layers:
        layer.watch.stepped = True
    for act in after_steps:
        act(layers)


_owned: weakref.WeakKeyDictionary[Any, tuple[Any, weakref.WeakSet[Any]]] = weakref.WeakKeyDictionary()


def owned_layers(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The layers of which an optimizer owns a factor."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    layers = len(_layers)
    known = _owned.get(optimizer)
    if known is None or known[0] != (sizes, layers):  # looked up once, until either has more or fewer
        known = _owned[optimizer] = (sizes, layers), weakref.WeakSet(_look_up(optimizer))
    return list(known[1])


def _look_up(optimizer: torch.optim.Optimizer) -> list[Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    owned = set(map(id, parameters))
    sharded = any(hasattr(p, "full_tensor") for p in parameters)
    found = []
    for layer in _layers:
        factors = layer.factors
        # Sharded parameters that are gathered now are other objects than the optimizer's.
        gathered = sharded and not any(hasattr(factor, "full_tensor") for factor in factors)
        kept = layer._parameters.get("pst_kept")  # trained kept weights
        if gathered or id(kept) in owned or any(id(factor) in owned for factor in factors):
            found.append(layer)
    return found


def layers_on(device: torch.device) -> list[Any]:
    """All layers whose weight is on a device."""
    return [layer for layer in _layers if layer.weight.device == device]


def watch_of(U: Tensor) -> Watch:
    """The watch of the layer with this factor: for a compiled graph, which carries tensors alone.

    Not one of a layer's: a new watch, whose mask is due.
    """
    address = U.data_ptr()
    reference = _by_address.get(address)
    watch = None if reference is None else reference()
    if watch is None or not watch.tensors or watch.tensors[1].data_ptr() != address:
        # `factors` of a layer that is being taken apart may not be there
        found = [layer.watch for layer in _layers if layer.factors.U.data_ptr() == address]
        watch = found[0] if found else Watch()
        _by_address[address] = weakref.ref(watch)
    return watch
