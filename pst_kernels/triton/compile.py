"""Compile every shipped kernel and configuration ahead of time, without a GPU, and read the machine code.

Behind `pst-kernels kernels`. What is compiled comes from the launchers themselves (see `tiles.Case`).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .tiles import TARGETS, Case, compiling_for

KERNEL_FILES = ("score", "select", "mask", "matmul", "gradients")  # each has cases() -> Iterator[tiles.Case]


class Compilation(NamedTuple):
    """One binary: a kernel, bound to types and constants as Triton's own launch would bind them."""

    kernel: JITFunction
    case: Case
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return str((self.kernel.__name__, self.signature, self.constexprs, self.attributes, self.options))

    def compile(self, target: GPUTarget) -> Any:
        import triton

        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        return triton.compile(source, target=target, options=self.options)


def gpu_target(architecture: str) -> GPUTarget:
    target = TARGETS[architecture]
    return GPUTarget("cuda" if isinstance(target.capability, int) else "hip", target.capability, target.warp_size)


@contextlib.contextmanager
def recorded(target: GPUTarget) -> Iterator[list[tuple[JITFunction, Any, Any, Any, dict[str, Any]]]]:
    """Inside, launches do nothing but leave what Triton would have compiled for them."""
    launches: list[tuple[JITFunction, Any, Any, Any, dict[str, Any]]] = []
    backend, original = make_backend(target), JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        binder = create_function_from_signature(self.signature, self.params, backend)
        given = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        bound, specialization, extra = binder(*args, **kwargs)
        _, signature, constexprs, attributes = self._pack_args(backend, kwargs, bound, specialization, extra)
        launches.append((self, signature, constexprs, attributes, given))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def shipped(architecture: str) -> list[Compilation]:
    """Every binary that the launchers can ask for on one target, once each."""
    found: dict[str, Compilation] = {}
    for name in KERNEL_FILES:
        module = importlib.import_module(f"{__package__}.{name}")
        with compiling_for(architecture), recorded(gpu_target(architecture)) as launches:
            for case in module.cases():
                launches.clear()
                case.call()
                for kernel, signature, constexprs, attributes, options in launches:
                    binary = Compilation(kernel, case, signature, constexprs, attributes, options)
                    found.setdefault(binary.key, binary)
    return list(found.values())
