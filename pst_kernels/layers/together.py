"""The masks of many layers at once: in one grouped pass where the room of their device has one, else one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..masks import due
from .pst_layer import PSTLayer

TABLES_KEPT = 8
_tables: dict[tuple[int, ...], Any] = {}  # by the ids of their layers; each says whether it still fits


def refresh_layers(layers: Iterable[PSTLayer]) -> None:
    """Bring the masks that are due up to date, on the current stream; nothing waits for the device."""
    grouped: dict[tuple[torch.device, Any], list[PSTLayer]] = {}
    for layer in layers:
        kernels = layer.grouping_kernels()
        if kernels is None:
            layer.refresh_mask()
        elif layer.needs_mask():
            grouped.setdefault((layer.weight.device, kernels), []).append(layer)
    for (_, kernels), members in grouped.items():
        _refresh_grouped(kernels, members)


@torch.no_grad()
def _refresh_grouped(kernels: Any, layers: Sequence[PSTLayer]) -> None:
    tensors = [layer.grouped_tensors(kernels.LayerTensors) for layer in layers]
    key = tuple(map(id, layers))
    table = _tables.get(key)
    if table is None or not table.matches(tensors):
        _tables.pop(key, None)
        while len(_tables) >= TABLES_KEPT:
            _tables.pop(next(iter(_tables)))
        table = _tables[key] = kernels.MaskTable(tensors)
    kernels.prune_masks(table)
    for layer in layers:
        layer.note_grouped_mask()


def release_tables() -> None:
    """Free what the grouped passes keep on the devices; the next one makes it again."""
    _tables.clear()


def _after_step(layers: Sequence[PSTLayer]) -> None:
    """After an optimizer step, for layers that no schedule takes care of."""
    refresh_layers(layer for layer in layers if not layer.scheduled and layer.grouping_kernels() is not None)


due.after_steps.append(_after_step)
