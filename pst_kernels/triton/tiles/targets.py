"""What kernels are compiled for, and what a launch runs on."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
import triton

from pst_kernels import env


class Target(NamedTuple):
    """What one architecture offers a thread block, a multiprocessor and the whole device."""

    capability: int | str
    warp_size: int
    shared_block: int  # bytes
    shared_multiprocessor: int  # bytes
    registers: int  # 32-bit, a multiprocessor
    warps: int  # resident, a multiprocessor
    fma_per_cycle: int  # dense 16-bit tensor-core multiply-adds of a multiprocessor
    multiprocessors: int
    bandwidth: float  # bytes a second, of device memory
    rate: float  # 16-bit multiply-adds a second that a good GEMM reaches


TARGETS = {
    "sm_80": Target(80, 32, 166912, 167936, 65536, 64, 1024, 108, 2.0e12, 125e12),
    "sm_86": Target(86, 32, 101376, 102400, 65536, 48, 512, 84, 0.94e12, 32e12),
    "sm_89": Target(89, 32, 101376, 102400, 65536, 48, 512, 128, 1.0e12, 75e12),
    "sm_90": Target(90, 32, 232448, 233472, 65536, 64, 2048, 132, 3.35e12, 325e12),
    "sm_100": Target(100, 32, 232448, 233472, 65536, 64, 4096, 148, 8.0e12, 790e12),
    "sm_120": Target(120, 32, 101376, 102400, 65536, 48, 1024, 170, 1.8e12, 95e12),
    "gfx942": Target("gfx942", 64, 65536, 65536, 131072, 32, 2048, 304, 5.3e12, 325e12),
}


class Platform(NamedTuple):
    """What a launch runs on, looked up once a call: tiles, assembly and launch options follow from it."""

    architecture: str  # a key of TARGETS
    interpreted: bool

    @property
    def assembly(self) -> bool:
        """Whether kernels may use PTX."""
        return not self.interpreted and not self.architecture.startswith("gfx")

    @property
    def all_registers(self) -> dict[str, int]:
        """A launch option: without it ptxas spills a register or two so that one more block may fit."""
        return self.registers_for(8)

    def registers_for(self, warps: int) -> dict[str, int]:
        """The same for a program of so many warps, of the 65,536 registers of a multiprocessor."""
        return {} if self.architecture.startswith("gfx") else {"maxnreg": min(255, 2048 // warps)}

    def pairs(self, x: torch.dtype) -> bool:
        """Whether products of fp32 numbers are made of bf16 pairs; else, as for fp32 x, of fp32 multiply-adds."""
        return x != torch.float32 and not self.interpreted


_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)
_Value = TypeVar("_Value")


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar[_Value], value: _Value) -> Iterator[None]:
    """Inside, the variable has that value, in this thread."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def compiling_for(architecture: str) -> contextlib.AbstractContextManager[None]:
    """Inside, launchers choose the tiles of `architecture`, whatever device or variable says otherwise."""
    return setting(_target, architecture)


def architecture(device: torch.device) -> str:
    """The name of the target that a launch on `device` chooses its tiles for, a key of TARGETS."""
    return _target.get() or env.architecture() or _architecture_of(device)


def platform(device: torch.device) -> Platform:
    return Platform(architecture(device), interpreted())


@functools.cache
def _architecture_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_80"  # the interpreter, which any table suits
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(t.capability for t in TARGETS.values() if isinstance(t.capability, int))
    at_most = [c for c in known if c <= 10 * major + minor]
    if not at_most:
        raise RuntimeError(
            f"this GPU has compute capability {major}.{minor}, but the kernels need 8.0; set PST_KERNELS_BACKEND=torch"
        )
    return f"sm_{at_most[-1]}"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose bf16 arithmetic is wrong and which has no inline assembly."""
    return triton.knobs.runtime.interpret


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up. Triton's own serves kernels too, and takes several times as long here."""
    return -(-numerator // denominator)
