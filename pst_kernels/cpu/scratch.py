"""Scratch buffers on CPUs, used again by every call: the system maps and clears fresh memory a page at a time.

Each thread has buffers of its own. One of a name and dtype is as large as the largest that was asked for.
"""

from __future__ import annotations

import math
import threading
import weakref

import torch
from torch import Tensor


class _Buffers:
    """Those of one thread."""

    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    @torch.inference_mode(False)  # a buffer made while evaluating must be writable in training
    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        flat = self.flat.get((name, dtype))
        if flat is None or flat.numel() < numel:
            flat = self.flat[name, dtype] = torch.empty(numel, dtype=dtype)
            self.views.clear()  # they would keep the smaller buffer
        view = self.views[name, dtype, shape] = flat[:numel].view(shape)
        return view


class _OfThisThread(threading.local):
    def __init__(self) -> None:  # called once in each thread that asks
        self.buffers = _Buffers()
        with _lock:
            _of_all_threads.add(self.buffers)


_lock = threading.Lock()
_of_all_threads: weakref.WeakSet[_Buffers] = weakref.WeakSet()  # those of a thread go when it ends
_of_this_thread = _OfThisThread()


def get(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer of this shape whose content is whatever the last user of `name` left."""
    if device.type != "cpu":  # other devices have caching allocators
        return torch.empty(shape, dtype=dtype, device=device)
    buffers = _of_this_thread.buffers
    view = buffers.views.get((name, dtype, shape))
    return buffers.make(name, shape, dtype) if view is None else view


def release() -> None:
    """Let go of the buffers of all threads, say after training; the next call makes new ones.

    A thread that is at work keeps those in its hands until it is done with them.
    """
    with _lock:
        everyones = list(_of_all_threads)
    for buffers in everyones:
        buffers.flat.clear()
        buffers.views.clear()
