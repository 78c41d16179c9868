"""Execute, on the CPU, the PTX that Triton compiles for sm_80 to sm_90 GPUs.

Triton's interpreter never sees the compiled code, and its bf16 arithmetic is wrong. This emulator compiles a kernel
ahead of time (no GPU, no driver) and executes the resulting PTX, thread block after thread block, on numpy arrays:
tensor-core instructions (mma.sync, and wgmma without TMA), shared memory, shuffles and atomics included. It checks
results, alignment and bounds. It models no timing, and no concurrency between thread blocks (`order` lets a test run
them in another order).

    with emulator.emulate(90) as session:        # every kernel[grid](...) inside runs on CPU tensors
        launcher(cpu_tensor, ...)
    emulator.launch(kernel, grid, args, constexprs, num_warps=4, num_stages=2)   # or one launch by hand

    with emulator.behind(table, tensors): ...    # a launch given `table` finds the addresses of `tensors` in it

`session.stats` counts launches, instructions, and bytes loaded from and stored to global memory, by kernel name. An
instruction that the emulator does not know raises `Unsupported` with its text, when it is reached.

    formats     number formats, as numpy holds them
    parsing     PTX text to a Program
    memory      global and shared memory, with their checks
    block       one thread block: registers and control flow
    decoding    from an instruction to a function that executes it, and the table of instructions
    moves, arithmetic, bits, comparison, lanes, tensor_cores, atomics     the instructions
    launching   compile, bind the arguments, run the grid
"""

from __future__ import annotations

from . import launching
from .block import Block
from .launching import Session, Stats, emulate, launch
from .memory import MemoryFault, behind
from .parsing import Unsupported

__all__ = ["Block", "MemoryFault", "Session", "Stats", "Unsupported", "behind", "emulate", "launch", "launching"]
