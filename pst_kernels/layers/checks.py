"""What is asked of a layer's tensors, and of the module that a layer takes the place of."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D, a linear layer with weight (in, out); told without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def whole(tensor: Any) -> Tensor:
    """The tensor itself, or all of one that is sharded over processes (a DTensor), which every process must ask for."""
    if type(tensor) in PLAIN:  # asked for every layer and step, and hasattr is slow to say no
        return tensor
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def in_several_processes() -> bool:
    """Whether this process belongs to a group with others, which may train one model together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_meta(what: str, tensor: Tensor) -> None:
    """Raise RuntimeError for a tensor that holds no data."""
    if tensor.is_meta:
        raise RuntimeError(
            f"{what} is on the meta device: offloaded (device_map, CPU or disk offload) or never loaded; bring the"
            " model into memory first, with accelerate.hooks.remove_hook_from_submodules(model) for instance"
        )


def check_finite(weight: Tensor, what: str, remedy: str) -> None:
    """Raise ValueError when a tensor has NaN or infinite values, saying how many."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(f"{what} has {bad} NaN or infinite values of {weight.numel()}; {remedy}")
