"""The ops of ops.py as Triton kernels: for CUDA tensors, and for CPU tensors in the interpreter or an emulator."""

from .score import scores

__all__ = ["scores"]
