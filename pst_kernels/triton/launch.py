"""Launches of a kernel that differ in nothing but which tensors they take.

`kernel[grid](...)` looks at every argument anew, to find the compiled kernel that serves all of them: 10 to 30 us where
the launch itself takes 2. What stays the same from call to call is given here once, and the compiled kernel is kept.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNED = 16  # bytes; Triton compiles for tensors that begin at a multiple of so many, or not


class Launch:
    """Of one kernel over one grid; `numbers` follow the tensors in its signature, and constants and options these."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...] = (), **constants: Any) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.numbers, self.constants = numbers, constants
        in_order = (constants[name] for name in kernel.arg_names if name in constants)
        self.behind = *numbers, *in_order
        self.compiled: dict[tuple[Any, int], Any] = {}  # by driver and device

    def __call__(self, *tensors: Any) -> None:
        """With tensors of the same dtypes at every call."""
        # Who has put something in the place of Triton's launch, an emulator for instance, gets every call.
        as_ever = type(self.kernel) is JITFunction and JITFunction.run.__module__ == JITFunction.__module__
        if as_ever and not functools.reduce(operator.or_, map(Tensor.data_ptr, tensors)) % ALIGNED:
            active = driver.active
            place = active, active.get_current_device()
            compiled = self.compiled.get(place)
            if compiled is not None:
                compiled[self.grid](*tensors, *self.behind)
            else:
                self.compiled[place] = self._launch(tensors)
        else:
            self._launch(tensors)

    def _launch(self, tensors: tuple[Any, ...]) -> Any:
        return self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
