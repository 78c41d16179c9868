"""One buffer per device, stream and dtype for what is used up before the next layer runs: its masked weight, or its G.

All layers share it, so that it has the size of the largest layer, not of their sum. Work on one stream runs in order,
so the next layer cannot overwrite it too early; another stream gets a buffer of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_buffers: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}


@torch.inference_mode(False)  # a buffer made while evaluating must be writable in training
def get(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, valid until the next call for the same device, stream and dtype."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, dtype)
    size = math.prod(shape)
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        _buffers.pop(key, None)  # freed first: never two of them
        buffer = _buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)


def release() -> None:
    """Free all buffers, say after training; the next call makes new ones."""
    _buffers.clear()
