"""Compile a kernel as Triton would, bind its arguments, and run its grid."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import (  # noqa: F401  (the instructions register themselves)
    arithmetic,
    atomics,
    bits,
    comparison,
    kept,
    lanes,
    moves,
    tensor_cores,
)
from .block import Block
from .decoding import Decoder
from .formats import Array
from .front_end import FrontEnd
from .memory import Global
from .parsing import Program, parse

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
    torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64",
}  # fmt: skip
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass
class Stats:
    """Of the launches of one kernel. Bytes are those of global memory that lanes ask for."""

    launches: int = 0
    instructions: int = 0  # a warp's worth or a block's: each counts once a block
    load_bytes: int = 0
    store_bytes: int = 0
    ops: Counter = field(default_factory=Counter)  # by the instruction's first word; control flow is not in it


def _no_machine_code(*given: Any) -> Any:
    if not given:
        return "PTX only", "PTX only"  # for the key of Triton's cache
    stages = given[1]
    stages["cubin"] = lambda ptx, metadata: b""
    return None


@contextlib.contextmanager
def ptx_only() -> Iterator[None]:
    """Inside, Triton compiles to PTX and no further: what ptxas makes of it, half of the time, nobody here runs."""
    with knobs.runtime.scope(), knobs.compilation.scope():
        knobs.runtime.add_stages_inspection_hook = _no_machine_code
        knobs.compilation.disable_line_info = True  # which takes 5 % of the time
        yield


def compile_ptx(
    kernel: JITFunction, signature: dict, constants: dict, attributes: dict, options: dict, arch: int
) -> Program:
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    with ptx_only():
        made = kept.program(FrontEnd.of(source, GPUTarget("cuda", arch, 32), options))
    return parse(made.text, made.shared)


@dataclass
class Bound:
    """Arguments, specialised as by Triton's own launch, but for integers that are 1: they stay arguments here."""

    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[int, ...], Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: dict[str, Array] = field(default_factory=dict)


def bind(kernel: JITFunction, given: dict[str, Any], constants: dict[str, Any]) -> Bound:
    bound = Bound()
    for i, param in enumerate(kernel.params):
        name = param.name
        value = constants[name] if name in constants else given.get(name, param.default if param.has_default else None)
        if name in constants or param.is_constexpr or not isinstance(value, (torch.Tensor, bool, int, float)):
            bound.signature[name], bound.constants[name] = "constexpr", getattr(value, "value", value)
        elif isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise ValueError(f"{name}: the emulator takes CPU tensors, got one on {value.device}")
            bound.signature[name], bound.tensors[name] = "*" + TYPES[value.dtype], value
            if value.data_ptr() % 16 == 0 and not param.do_not_specialize_on_alignment:
                bound.attributes[(i,)] = DIVISIBLE
        elif isinstance(value, bool):
            bound.signature[name], bound.numbers[name] = "i1", np.array(value, np.uint8)
        elif isinstance(value, int):
            wide = not -(2**31) <= value < 2**31
            bound.signature[name] = "i64" if wide else "i32"
            bound.numbers[name] = np.array(value, np.int64 if wide else np.int32)
            if value % 16 == 0 and not (param.do_not_specialize or param.do_not_specialize_on_alignment):
                bound.attributes[(i,)] = DIVISIBLE
        else:
            bound.signature[name], bound.numbers[name] = "fp32", np.array(value, np.float32)
    return bound


_programs: dict[tuple, tuple[Program, Decoder]] = {}


def launch(
    fn: JITFunction, grid: Any, args: Any, constexprs: dict[str, Any] | None = None, *, num_warps: int = 4,
    num_stages: int = 3, arch: int = 80, order: str = "forward", stats: Stats | None = None, **options: Any,
) -> Stats:  # fmt: skip
    """Compile `fn` for sm_`arch` (80, 86, 89, 90; 120 where it uses mma.sync) and run it over `grid`, in place.

    args: positional or by name, CPU tensors, ints, floats, bools or None; constexprs: name -> value; options: more of
    Triton's, such as maxnreg. order: "forward", "reversed" or "shuffled" thread blocks.
    Raises MemoryFault, Unsupported, or whatever Triton's compiler raises.
    """
    constants = dict(constexprs or {})
    given = args if isinstance(args, dict) else dict(zip([n for n in fn.arg_names if n not in constants], args))  # noqa: B905
    bound = bind(fn, given, constants)
    options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    known = sorted((name, str(value)) for name, value in bound.constants.items())
    key = fn.cache_key, str((bound.signature, known, bound.attributes, sorted(options.items()))), arch
    if key not in _programs:
        program = compile_ptx(fn, bound.signature, bound.constants, bound.attributes, options, arch)
        _programs[key] = program, Decoder(program, program.threads or 32 * num_warps)
    program, decoder = _programs[key]
    memory = Global(list(bound.tensors.values()))
    values = bound.numbers | {n: np.array(memory.address(t), np.uint64) for n, t in bound.tensors.items()}
    live = [values[name] for name in fn.arg_names if name in values]
    live += [np.array(0, np.uint64)] * (len(program.parameters) - len(live))  # scratch memory, which no kernel uses
    parameters = {
        name: np.full(decoder.threads, value) for (name, _), value in zip(program.parameters, live, strict=True)
    }
    stats = stats if stats is not None else Stats()
    stats.launches += 1
    size = _extent(grid, given | bound.constants)
    with np.errstate(all="ignore"):
        for place in _places(size, order):
            Block(program, decoder, memory, parameters, place, size, stats).run()
    memory.copy_back()
    return stats


def _extent(grid: Any, arguments: dict[str, Any]) -> tuple[int, ...]:
    sides = tuple(int(side) for side in (grid(arguments) if callable(grid) else grid))
    return sides + (1,) * (3 - len(sides))


def _places(size: tuple[int, ...], order: str) -> list[tuple[int, ...]]:
    places = [(x, y, z) for z in range(size[2]) for y in range(size[1]) for x in range(size[0])]
    if order == "reversed":
        places.reverse()
    elif order == "shuffled":
        np.random.default_rng(0).shuffle(places)
    elif order != "forward":
        raise ValueError(f"order must be 'forward', 'reversed' or 'shuffled', got {order!r}")
    return places


@dataclass
class Session:
    stats: dict[str, Stats] = field(default_factory=dict)


@contextlib.contextmanager
def emulate(arch: int = 80, order: str = "forward") -> Iterator[Session]:
    """Inside, `kernel[grid](...)` on CPU tensors compiles for sm_`arch` and runs in the emulator."""
    session, original = Session(), JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        if warmup:
            return
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        given = dict(zip(self.arg_names, args)) | kwargs  # noqa: B905  (the rest has defaults)
        constants = {p.name: given.get(p.name, p.default) for p in self.params if p.is_constexpr}
        stats = session.stats.setdefault(self.fn.__name__, Stats())
        launch(self, grid, given, constants, arch=arch, order=order, stats=stats, **options)

    run_of_class: Callable = run
    JITFunction.run = run_of_class
    try:
        yield session
    finally:
        JITFunction.run = original
