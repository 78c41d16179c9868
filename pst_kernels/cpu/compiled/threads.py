"""One compiled pass on several threads: those of PyTorch, where its OpenMP library can be found.

A second set of threads would fight with PyTorch's, which keep spinning for a while after each of its loops. So the pass
is handed to the same library by the call that a compiler makes for `#pragma omp parallel`. Where that library is
another one (macOS, Windows), threads of Python's do it, which costs more a pass.

The work is cut into tasks. Each thread takes the next task until none is left, so that a slow core holds nobody up.
What a task computes depends on the task alone: the bits are the same for any number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.ir
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic


@intrinsic
def take_task(typing_context, counter):
    """The value of the int64 at an address, which then counts one more, for one thread at a time."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], llvmlite.ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, llvmlite.ir.Constant(llvmlite.ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def pointer_to(typing_context, address):
    """An address as the pointer that numba.carray takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


def run(compiled: Any, arguments: np.ndarray, tasks: int) -> None:
    """Call a compiled pass with its arguments on as many threads as PyTorch uses, but no more than there are tasks."""
    run_at(compiled, arguments.ctypes.data, tasks)


def run_at(compiled: Any, address: int, tasks: int) -> None:
    """`run` with the address of the arguments."""
    if torch.autograd.profiler._is_profiler_enabled:
        with torch.profiler.record_function(f"pst_kernels.cpu: {compiled.__name__}"):
            _run(compiled, address, min(torch.get_num_threads(), tasks))
    else:
        _run(compiled, address, min(torch.get_num_threads(), tasks))


def run_alone(compiled: Any, address: int) -> None:
    """Call a compiled pass with the address of its arguments on this thread."""
    if torch.autograd.profiler._is_profiler_enabled:
        with torch.profiler.record_function(f"pst_kernels.cpu: {compiled.__name__}"):
            compiled.ctypes(address)
    else:
        compiled.ctypes(address)


def _run(compiled: Any, address: int, threads: int) -> None:
    parallel = _openmp()
    if threads <= 1:
        compiled.ctypes(address)
    elif parallel is not None:
        parallel(compiled.address, address, threads, 0)
    else:
        for done in [_pool().submit(compiled.ctypes, address) for _ in range(threads)]:
            done.result()


@functools.cache
def _openmp() -> Any:
    """GOMP_parallel of the library that PyTorch has loaded, or None."""
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    parallel = library.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="pst_kernels")
