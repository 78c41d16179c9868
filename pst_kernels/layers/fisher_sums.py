"""What backwards have seen joins the running sums of G^2 (fisher.py) before an optimizer's step: that of all processes.

Processes train together under DistributedDataParallel or fully_shard (FSDP2), where each sees its own part of a batch.
Sums are added over the wrapper's group, or over the mesh of a factor's shards, so that the masks stay the same on every
rank. Other ways are refused at the first step.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..masks import due
from .checks import in_several_processes

MOMENTS = "pst_moments"  # a layer's buffer, fp32 (out + in,): the running sums over rows, then over columns
ELSEWHERE = (
    "magnitude='fisher' trains in one process, or in several under DistributedDataParallel or fully_shard; use"
    " magnitude='plain' with tensor parallelism, DataParallel and other kinds"
)

_wrappers: list[weakref.ref[Any]] = []  # every DistributedDataParallel made since the first layer with moments


@functools.cache
def watch_wrappers() -> None:
    """Once a process, when its first moments are made or loaded."""
    register_module_module_registration_hook(_note_wrapper)


def _note_wrapper(parent: nn.Module, *_: object) -> None:
    if isinstance(parent, nn.parallel.DistributedDataParallel):
        _wrappers[:] = [*(known for known in _wrappers if known() is not None), weakref.ref(parent)]


def _before_step(optimizer: torch.optim.Optimizer, owned: Sequence[Any]) -> None:
    """Not after it: masks are made then."""
    layers = [layer for layer in owned if layer.moments is not None]
    if not any(layer.moments.waiting for layer in layers):
        return
    if not in_several_processes():
        _join([layer.moments for layer in layers if layer.moments.waiting])
        return
    left = set(layers)
    for reference in reversed(_wrappers):  # the last that took a layer
        if left and (wrapper := reference()) is not None:
            # All of the model, in its order: each rank gives the same sums, whatever its optimizer owns.
            inside = [module for module in wrapper.modules() if MOMENTS in module._buffers]
            if not left.isdisjoint(inside):
                left -= set(inside)
                _join([layer.moments for layer in inside], [wrapper.process_group])
    _join_shards(_in_order(left, optimizer))


due.before_steps.append(_before_step)


def _in_order(layers: Iterable[Any], optimizer: torch.optim.Optimizer) -> list[Any]:
    """As the optimizer has their factors, which is the same order on every rank.

    Layers without any there are left out: for `owned_layers` every gathered one may be a sharded optimizer's.
    """
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    first = {layer: min(order.get(id(factor), len(order)) for factor in layer.factors) for layer in layers}
    return sorted((layer for layer in first if first[layer] < len(order)), key=first.__getitem__)


def _join_shards(layers: Sequence[Any]) -> None:
    """Of layers whose factors are cut over meshes of processes, of which each has a part of the batch."""
    by_mesh: dict[Any, list[Any]] = {}
    for layer in layers:
        mesh = getattr(layer._parameters["pst_U"], "device_mesh", None)
        if mesh is None:
            raise RuntimeError(ELSEWHERE)
        by_mesh.setdefault(mesh, []).append(layer.moments)
    for mesh, moments in by_mesh.items():
        _join(moments, [mesh.get_group(i) for i in range(mesh.ndim)])


@torch.no_grad()
def _join(every: Sequence[Any], groups: Sequence[dist.ProcessGroup] = ()) -> None:
    """Let each of these moments join what it has seen, or what all ranks of the groups have."""
    if not every:
        return
    device = every[0].held.device
    sums: list[Tensor] = [moments.sums(device) for moments in every]
    if groups:
        flat = torch.cat(sums)
        for group in groups:
            dist.all_reduce(flat, group=group)
        sums = list(flat.split([len(one) for one in sums]))
    for moments, one in zip(every, sums, strict=True):
        moments.join(one)
