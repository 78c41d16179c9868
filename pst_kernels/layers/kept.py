"""Whether a layer keeps M * W' from one change of its factors to the next, or makes it anew for each product.

Kept it costs a number a weight, and makes forward and dx one product of the library each. `PSTConfig(masked_weight=)`:
"keep" and "remake" decide; "auto" keeps it

- on a CPU for up to 65,536 weights, whose products take less time than making it again;
- on a GPU where all layers together keep at most a sixteenth of the device's memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..masks.due import layers_on

CPU_WEIGHTS = 1 << 16
SHARE_OF_MEMORY = 1 / 16


def keeps(choice: str, weight: Tensor, dtype: torch.dtype) -> bool:
    """For a product in this dtype."""
    if choice != "auto":
        return choice == "keep"
    if weight.device.type == "cpu":
        return weight.numel() <= CPU_WEIGHTS
    if weight.device.type != "cuda":
        return False
    weights = sum(layer.weight.numel() for layer in layers_on(weight.device))
    return weights * dtype.itemsize <= SHARE_OF_MEMORY * _memory(weight.device)


@functools.cache
def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def takes_lists(choice: str, kernels: Any, weight: Tensor, dtype: torch.dtype, num_pruned: Tensor) -> bool:
    """Whether a layer in training multiplies with lists of its kept weights.

    Raises RuntimeError where `PSTConfig(products="sparse")` asks for it and it can't be had.
    """
    if choice == "dense":
        return False
    lists = getattr(kernels, "lists", None)
    if choice == "sparse":
        if lists is None or weight.device.type != "cpu" or not lists.serve(weight, dtype):
            raise RuntimeError(
                f"products='sparse' needs a float32 or bfloat16 weight on a CPU, and Numba, but the weight is"
                f" {weight.dtype} on {weight.device} and the product {dtype}; use products='auto'"
            )
        return True
    return lists is not None and weight.device.type == "cpu" and lists.pay(weight, dtype, int(num_pruned))
