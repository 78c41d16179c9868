"""Buffers that are used again: each thread has one set, of which every buffer is as large as the largest so far.

Fresh memory costs half as much as a pass over it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of this shape whose content is whatever the last user of `name` left."""
        if device.type != "cpu":  # other devices have caching allocators
            return torch.empty(shape, dtype=dtype, device=device)
        view = self.views.get((name, dtype, shape))
        return self._made(name, shape, dtype) if view is None else view

    @torch.inference_mode(False)  # a buffer made while evaluating must be writable in training
    def _made(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        flat = self.flat.get((name, dtype))
        if flat is None or flat.numel() < numel:
            flat = self.flat[name, dtype] = torch.empty(numel, dtype=dtype)
            self.views.clear()  # they would keep the smaller buffer
        view = self.views[name, dtype, shape] = flat[:numel].view(shape)
        return view


buffers = _Buffers()
