"""The masks of many layers at once: in one grouped pass where the room of their device has one, else one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..masks import due
from .pst_layer import FACTORS, PSTLayer

GROUPS_KEPT = 8
WATCHED = ("weight", *FACTORS)
HELD = ("pst_num_pruned", "pst_guess", "pst_mask")
_groups: dict[tuple[int, ...], Group] = {}  # by the ids of their layers; gone when one of these is


class Group:
    """The table of some layers whose masks are made in one pass, as long as none of their tensors moves.

    It holds the tensors, but not the layers, and goes with the first of them that does.
    """

    def __init__(self, kernels: ModuleType, layers: Sequence[PSTLayer]):
        self.kernels = kernels
        self.table = kernels.MaskTable([kernels.LayerTensors(*layer.grouped_tensors()) for layer in layers])
        self.addresses = [_addresses(layer) for layer in layers]
        key = _key(layers)
        self.watched = [weakref.ref(layer, lambda _: _groups.pop(key, None)) for layer in layers]

    def fits(self, layers: Sequence[PSTLayer]) -> bool:
        return self.addresses == [_addresses(layer) for layer in layers]

    def refresh(self, layers: Sequence[PSTLayer]) -> None:
        for layer in layers:
            if layer._kept_weight is not None:  # a backward that still needs what was there must say so
                torch.autograd.graph.increment_version(layer._kept_weight)
        self.kernels.prune_masks(self.table)
        for layer in layers:
            layer.note_grouped_mask(_watched(layer))


def _key(layers: Sequence[PSTLayer]) -> tuple[int, ...]:
    return tuple(map(id, layers))


def _watched(layer: PSTLayer) -> list[Tensor]:
    held = layer._parameters
    return [held[name] for name in WATCHED]  # type: ignore[misc]


def _addresses(layer: PSTLayer) -> list[Any]:
    """What a table holds of a layer: the addresses of its tensors, and M * W' if it is kept."""
    parameters, buffers, ready = layer._parameters, layer._buffers, layer._ready
    keeps = ready is not None and ready.options.kept
    return [
        *(parameters[name].data_ptr() for name in WATCHED), *(buffers[name].data_ptr() for name in HELD),  # type: ignore[union-attr]
        id(layer._kept_weight) if keeps else None,
    ]  # fmt: skip


def refresh_layers(layers: Iterable[PSTLayer], only_grouped: bool = False) -> None:
    """Bring the masks that are due up to date, on the current stream; nothing waits for the device.

    `only_grouped`: those alone that a grouped pass makes; the others' next forward does it.
    """
    rooms: dict[str, Any] = {}
    grouped: dict[torch.device, list[PSTLayer]] = {}
    for layer in layers:
        device = layer.weight.device
        if device.type not in rooms:
            kernels = ops.kernels_for(device.type)
            rooms[device.type] = kernels if hasattr(kernels, "prune_masks") else None
        if rooms[device.type] is None or not layer.can_be_grouped():
            if not only_grouped:
                layer.refresh_mask()
        elif _is_due(layer):
            grouped.setdefault(device, []).append(layer)
    for device, members in grouped.items():
        _refresh_grouped(rooms[device.type], members)


def _is_due(layer: PSTLayer) -> bool:
    """Whether a mask is to be made; remembers a change after which it is not."""
    watch, count, watched = layer.watch, layer._buffers["pst_num_pruned"], _watched(layer)
    if watch.is_fresh(count, watched):
        return False
    if watch.is_due(count, layer.config.mask_interval):  # type: ignore[arg-type]
        return True
    watch.note(count, watched, made=False)  # type: ignore[arg-type]
    return False


@torch.no_grad()
def _refresh_grouped(kernels: ModuleType, layers: Sequence[PSTLayer]) -> None:
    key = _key(layers)
    group = _groups.get(key)
    if group is None or not group.fits(layers):
        _groups.pop(key, None)
        while len(_groups) >= GROUPS_KEPT:
            _groups.pop(next(iter(_groups)), None)
        group = _groups[key] = Group(kernels, layers)
    group.refresh(layers)


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
