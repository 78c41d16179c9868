"""The masks of many layers at once: in one grouped pass where the room of their device has one, else one by one."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..masks import due
from ..masks.refresh import making
from .pst_layer import FACTORS, PSTLayer

GROUPS_KEPT = 8
WATCHED = ("weight", *FACTORS)
HELD = ("pst_num_pruned", "pst_guess", "pst_mask")
watched_of, held_of = operator.itemgetter(*WATCHED), operator.itemgetter(*HELD)
_groups: dict[tuple[int, ...], Group] = {}  # by the ids of their layers; gone when one of these is


class Look(NamedTuple):
    """What a layer's tensors are now, looked up once a refresh."""

    layer: PSTLayer
    watched: tuple[Tensor, ...]  # what the mask is made of
    count: Any  # of due.count_of
    addresses: tuple[int, ...]  # of what is watched
    versions: int  # their sum


def looks_at(layers: Sequence[PSTLayer]) -> list[Look]:
    """Without a loop of Python's over tensors: of these a model has many."""
    watched = [watched_of(layer._parameters) for layer in layers]
    counts = [due.count_of(layer._buffers["pst_num_pruned"]) for layer in layers]  # type: ignore[arg-type]
    return list(map(Look, layers, watched, counts, *due.addresses_and_versions(watched)))


def _is_due(look: Look) -> bool:
    """Whether a mask is to be made; remembers a change after which it is not."""
    layer, watched, count, addresses, versions = look
    watch, total = layer.watch, sum(addresses) + versions
    if watch.is_fresh_at(count, total):
        return False
    if watch.is_due_at(count, layer.config.mask_interval):
        return True
    watch.note_look(count, total, watched, made=False)
    watch.looks += 1  # M * W' is no longer that of the factors
    return False


class Group:
    """The table of some layers whose masks are made in one pass, as long as none of their tensors moves.

    It holds the tensors, but not the layers, and goes with the first of them that does.
    """

    def __init__(self, kernels: ModuleType, looks: Sequence[Look]):
        self.kernels = kernels
        self.table = kernels.MaskTable([kernels.LayerTensors(*look.layer.grouped_tensors()) for look in looks])
        self.addresses, self.held = [look.addresses for look in looks], _held(looks)
        self.kept = [layer._kept_weight for layer, *_ in looks if layer._kept_weight is not None]
        key = _key(looks)
        self.layers = [weakref.ref(look.layer, lambda _: _groups.pop(key, None)) for look in looks]

    def fits(self, looks: Sequence[Look]) -> bool:
        held = _held(looks)
        return (
            self.addresses == [look.addresses for look in looks]
            and len(self.held) == len(held)
            and all(map(operator.is_, self.held, held))
        )

    def refresh(self, looks: Sequence[Look]) -> None:
        torch.autograd.graph.increment_version(self.kept)  # a backward that still needs what was there must say so
        self.kernels.prune_masks(self.table)
        for layer, watched, count, addresses, versions in looks:
            layer.note_grouped_mask(watched, count, sum(addresses) + versions)


def _key(looks: Sequence[Look]) -> tuple[int, ...]:
    return tuple([id(look.layer) for look in looks])


def _held(looks: Sequence[Look]) -> list[Any]:
    """What a table holds beside what is watched: the layers' buffers, and M * W' where it is kept."""
    held: list[Any] = []
    for layer, *_ in looks:
        held += held_of(layer._buffers)
        ready = layer._ready
        held.append(layer._kept_weight if ready is not None and ready.options.kept else None)
    return held


def refresh_layers(layers: Iterable[PSTLayer], only_grouped: bool = False) -> None:
    """Bring the masks that are due up to date, on the current stream; a grouped pass does not wait for the device.

    `only_grouped`: not those of layers that are sharded, or on a device without grouped passes, whose next forward does
    it. The others may be part of a captured graph, which looks at nothing.
    """
    rooms: dict[str, Any] = {}
    grouped: dict[torch.device, list[PSTLayer]] = {}
    for layer in layers:
        device = layer.weight.device
        if device.type not in rooms:
            kernels = ops.kernels_for(device.type)
            rooms[device.type] = kernels if hasattr(kernels, "prune_masks") else None
        if rooms[device.type] is not None and layer.can_be_grouped():
            grouped.setdefault(device, []).append(layer)
        elif not only_grouped or (rooms[device.type] is not None and layer.is_whole()):
            layer.refresh_mask()
    for device, members in grouped.items():
        _refresh_grouped(rooms[device.type], members)


@torch.no_grad()
def _refresh_grouped(kernels: ModuleType, layers: Sequence[PSTLayer]) -> None:
    with making:  # two threads would search in the same memory
        looks = [look for look in looks_at(layers) if _is_due(look)]
        if not looks:
            return
        key = _key(looks)
        group = _groups.get(key)
        if group is None or not group.fits(looks):
            _groups.pop(key, None)
            while len(_groups) >= GROUPS_KEPT:
                _groups.pop(next(iter(_groups)), None)
            group = _groups[key] = Group(kernels, looks)
        group.refresh(looks)


def release_groups() -> None:
    """Free what the grouped passes keep on the devices; the next one makes it again."""
    _groups.clear()


def _after_step(layers: Sequence[PSTLayer]) -> None:
    """After an optimizer step, for layers that no schedule takes care of."""
    for layer in layers:
        if layer.config.score_interval > 1 and not layer.scheduled:
            layer.at_step(layer.steps + 1)
    refresh_layers((layer for layer in layers if not layer.scheduled), only_grouped=True)


due.after_steps.append(_after_step)
