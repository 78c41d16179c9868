"""Host time and launches of Triton code, without a GPU.

`silent(arch)` gives Triton a driver whose launches do nothing. Every call takes the path that it takes on a GPU
(specialisation, look-up of the compiled kernel, packing of arguments), up to the driver's own launch. What a step costs
on the host is then its time on small CPU tensors, whose own products cost next to nothing. The C launcher and
cuLaunchKernel, some 2 to 4 us a launch, are not in it.

    with silent(90) as launches:
        step()
    print(launches)          # name -> how often

Results are garbage, for nothing is written: the emulator is for values.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from emulator.launching import ptx_only
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class H100:
    """What Triton asks of a device: whether a kernel fits, and for a handle of it."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
            "sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 5120,
        }  # fmt: skip

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 0, 0, 64, 0, 1024  # module, function, registers, spills, most threads


class Silent(DriverBase):
    def __init__(self, arch: int, launches: collections.Counter[str]) -> None:
        self.arch, self.launches, self.utils = arch, launches, H100()

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            active = driver.active  # kernels and their launchers outlive the driver that they were made for
            active.launches[metadata.name] += 1

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 1000 + self.arch  # Triton keeps compiled kernels by device: none of a GPU's, nor of another target's

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_device_interface(self) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def silent(arch: int = 90) -> Iterator[collections.Counter[str]]:
    """Inside, launches are counted by kernel and do nothing. `arch`: 80, 90, 100, ..."""
    launches: collections.Counter[str] = collections.Counter()
    before = driver._active  # None where nothing has asked for a driver: without a GPU, asking is an error
    driver.set_active(Silent(arch, launches))
    try:
        with ptx_only():
            yield launches
    finally:
        driver.set_active(before)
