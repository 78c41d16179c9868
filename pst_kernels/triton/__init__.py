"""The ops of ops.py as Triton kernels: for CUDA tensors, and for CPU tensors in the interpreter or an emulator."""

from .mask import masked_weight, prune_mask
from .score import scores
from .select import kth_value

__all__ = ["kth_value", "masked_weight", "prune_mask", "scores"]
