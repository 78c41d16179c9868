"""Compiled passes over W for CPUs: each reads a row once, uses it up in a core's own cache, and goes on to the next.

Numba compiles them at their first use, for this processor, and keeps the machine code on disk. threads.py runs them on
PyTorch's own threads where it can. row_loops.py holds what is done to one row or two, kernels.py the passes, jit.py how
both are compiled, arguments.py brings tensors into the form that a pass takes, and launch.py is what the ops call.

sparse_lists.py makes lists of kept weights, sparse_passes.py multiplies by them with the loops of vectors.py, and
sparse_launch.py is what the sparse products call.

What they do not take (float64, fp16, a weight that is not contiguous, such as Conv1D's) goes the way of row_blocks.py
in the package above, and so does everything where Numba is not installed.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from pst_kernels import env
from pst_kernels.notices import say_once

DTYPES = (torch.float32, torch.bfloat16)


def passes_for(weight: Tensor, dtype: torch.dtype | None = None) -> ModuleType | None:
    """launch.py where the passes take this weight and a result of this dtype, or None.

    Raises ImportError where PST_KERNELS_CPU=numba and Numba cannot be had.
    """
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or (dtype is not None and dtype not in DTYPES):
        return None
    if not weight.is_contiguous() or weight.numel() == 0:
        return None
    return module("launch", "runs its CPU passes in plain PyTorch")


def module(name: str, without: str) -> ModuleType | None:
    """A module of this folder, or None where it is not wanted or, which is said once, Numba cannot be had.

    Raises ImportError where PST_KERNELS_CPU=numba and Numba cannot be had. `without`: what the package does then.
    """
    requested = env.cpu()
    if requested == "torch":
        return None
    found, reason = _import(name)
    if found is None:
        if requested == "numba":
            raise ImportError(f"PST_KERNELS_CPU=numba, but {reason}; install numba or unset the variable")
        say_once(f"pst_kernels {without}, slower: {reason}; install numba")
    return found


@functools.cache
def _import(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f".{name}", __name__), ""
    except ImportError as error:  # not installed, or not for this version of NumPy
        return None, str(error)
