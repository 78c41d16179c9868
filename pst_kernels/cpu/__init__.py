"""The ops of ops.py for CPUs, and in plain PyTorch for any device that has no Triton."""

from . import lists
from .block_matmul import block_forward, block_split, kept_block_gradients
from .ops import (
    block_backward,
    forward_scratch,
    kth_value,
    linear_backward,
    linear_forward,
    masked_weight,
    prune_mask,
    scores,
    split_for,
    weighed_backward,
)
from .rested import rested_backward
from .scratch import release as release_scratch
from .small_layer import bound_to

__all__ = [
    "block_backward",
    "block_forward",
    "block_split",
    "bound_to",
    "forward_scratch",
    "kept_block_gradients",
    "kth_value",
    "linear_backward",
    "linear_forward",
    "lists",
    "masked_weight",
    "prune_mask",
    "release_scratch",
    "rested_backward",
    "scores",
    "split_for",
    "weighed_backward",
]  # fmt: skip
