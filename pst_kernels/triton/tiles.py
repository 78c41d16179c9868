"""Which tile a kernel runs with: tables by architecture, dtype and shape bucket, with their budgets beside them.

Also what every kernel file needs to say about its launches: the target at hand, and `Case`, one call that makes the
kernels of a file compile, from which `compile.py` takes each shipped configuration.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton

from .. import env


class Target(NamedTuple):
    """What one architecture offers a thread block and a multiprocessor."""

    capability: int | str
    warp_size: int
    shared_block: int  # bytes
    shared_multiprocessor: int  # bytes
    registers: int  # 32-bit, a multiprocessor
    warps: int  # resident, a multiprocessor
    fma_per_cycle: int  # dense 16-bit tensor-core multiply-adds of a multiprocessor


TARGETS = {
    "sm_80": Target(80, 32, 166912, 167936, 65536, 64, 1024),
    "sm_86": Target(86, 32, 101376, 102400, 65536, 48, 512),
    "sm_89": Target(89, 32, 101376, 102400, 65536, 48, 512),
    "sm_90": Target(90, 32, 232448, 233472, 65536, 64, 2048),
    "sm_100": Target(100, 32, 232448, 233472, 65536, 64, 4096),
    "sm_120": Target(120, 32, 101376, 102400, 65536, 48, 1024),
    "gfx942": Target("gfx942", 64, 65536, 65536, 131072, 32, 2048),
}

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[None]:
    """Inside, launchers choose the tiles of `architecture`, whatever device or variable says otherwise."""
    token = _target.set(architecture)
    try:
        yield
    finally:
        _target.reset(token)


def architecture(device: torch.device) -> str:
    """The name of the target that a launch on `device` chooses its tiles for, a key of TARGETS."""
    return _target.get() or env.architecture() or _architecture_of(device)


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


class Case(NamedTuple):
    """One call of a launcher that makes its kernels compile as a user's call would.

    Every kernel file has `cases() -> Iterator[Case]`: one for each configuration, dtype and variant that it ships for the
    target of `compiling_for`. `call` runs the launcher on tensors of device "meta" (`torch.empty(..., device="meta")`,
    which have a shape, a dtype and an aligned address, but no memory); `compile.py` replaces the launch, and takes kernel,
    signature, constexprs, attributes, warps and stages as Triton itself binds them. So a launcher must not look at values.
    Two cases that launch the same thing count once.

    A kernel whose main loop feeds tensor cores names the constexprs of its tile BLOCK_OUT, BLOCK_IN and BLOCK_T: the
    product is the multiply-adds of one loop step, from which the issue slots per tensor-core cycle are computed.
    """

    name: str  # "bf16 weight, fp32 factors, aligned"
    call: Callable[[], object]
    slots: dict[str, float] | None = None  # budget by kernel: issue slots per tensor-core cycle that it must not exceed
