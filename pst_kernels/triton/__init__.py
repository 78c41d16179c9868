"""The ops of ops.py as Triton kernels: for CUDA tensors, and for CPU tensors in the interpreter or an emulator."""

from .gradients import linear_backward
from .matmul import linear_forward

__all__ = ["linear_backward", "linear_forward"]
