"""Compile the shipped kernels and configurations ahead of time, without a GPU, and read the machine code.

Behind `pst-kernels kernels`. What is compiled comes from the launchers themselves (see `cases.Case`), so a row is what
a user's call would run. Triton's own cache is used; it is keyed by source, types, constants, options, target and
compiler.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pst_kernels import env

from ..tiles.targets import TARGETS, Target, compiling_for
from . import block_cases, cases, sparse_cases
from .cases import Case

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "score": cases.of_scores, "select": cases.of_selection, "mask": cases.of_masks,
    "group_mask": cases.of_tables, "matmul": cases.of_matmul, "gradients": cases.of_gradients,
    "block_lists": block_cases.of_lists, "block_matmul": block_cases.of_matmul,
    "block_gradients": block_cases.of_gradients, "sparse_matmul": sparse_cases.of_products,
    "listed_matmul": sparse_cases.of_lists,
}  # fmt: skip
KERNEL_FILES = tuple(CASES)
TENSOR_CORE = re.compile(r"[HQI]?G?MMA$|UTC\w*MMA$")
PRODUCT = re.compile(r"warp_group_dot|tc_gen5_mma|nvidia_mma|amd_mfma")  # in Triton's GPU code
FEWEST_REGISTERS = 10  # of an NVIDIA GPU: an empty kernel has 4 there; on AMD's, small ones that are whole have 8
TILE = ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH")


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

    @property
    def constants(self) -> dict[str, Any]:
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constexprs.items()}

    def compile(self, target: GPUTarget) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        return triton.compile(source, target=target, options=self.options)


class Row(NamedTuple):
    """What the machine code of one binary says. `slots` and `budget` are issue slots per tensor-core cycle."""

    target: str
    kernel: str
    case: str
    warps: int
    stages: int
    registers: int
    stack: int  # bytes a thread, spills included
    local: int
    shared: int  # bytes a block
    blocks: int  # resident blocks a multiprocessor; 0: does not fit
    products: bool  # whether Triton's code gives a product to tensor cores
    tensor_core: str  # the most frequent tensor-core instruction, and how many of them there are
    loop: int | None  # instructions of the main loop that are not the tensor core's
    slots: float | None
    budget: float | None
    seconds: float
    file: str  # in the folder of --dump, without suffix
    nops: int = 0  # of `loop`: an assembler puts them between tensor-core instructions to keep their pace
    error: str = ""  # the first line of the compiler's; the numbers are then 0

    @property
    def problems(self) -> list[str]:
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.stack or self.local:
            found.append(f"spills {self.stack + self.local} B")
        # sm_100 compiles a tile that its tensor memory cannot hold to a kernel that returns at once.
        few = self.registers < FEWEST_REGISTERS and self.target.startswith("sm_")
        if few or (self.products and not self.tensor_core):
            found.append(
                f"is empty: {self.registers} registers, tensor-core instructions: {self.tensor_core or 'none'}"
            )
        if not self.blocks:
            found.append(f"{self.shared} B of shared memory do not fit")
        if self.budget is not None and (self.slots is None or self.slots > self.budget):
            found.append(f"main loop takes {self.slots} issue slots per tensor-core cycle, budget {self.budget}")
            if self.slots_without_nops is not None and self.slots_without_nops <= self.budget:
                found[-1] += f"; {self.slots_without_nops} without the assembler's NOPs"
        return found

    @property
    def slots_without_nops(self) -> float | None:
        if self.slots is None or not self.loop:
            return self.slots
        return round(self.slots * (1 - self.nops / self.loop), 3)


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


@functools.lru_cache(maxsize=1)
def shipped(architecture: str, files: tuple[str, ...] = KERNEL_FILES) -> list[Compilation]:
    """The binaries that the cases of these kernel files ask for on one target, once each."""
    found: dict[str, Compilation] = {}
    for name in files:
        with compiling_for(architecture), recorded(gpu_target(architecture)) as launches:
            for case in CASES[name]():
                launches.clear()
                case.call()
                for kernel, signature, constexprs, attributes, options in launches:
                    binary = Compilation(kernel, case, signature, constexprs, attributes, options)
                    found.setdefault(binary.key, binary)
    return list(found.values())


def report(
    architecture: str, dump: Path | None = None, workers: int | None = None, files: tuple[str, ...] = KERNEL_FILES
) -> list[Row]:
    """A row for each binary of `shipped`. `dump` is a folder for one .ptx and .cubin a row."""
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    count = len(shipped(architecture, files))
    if workers == 1:
        return [_row(architecture, files, index, dump) for index in range(count)]
    context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(_row, [architecture] * count, [files] * count, range(count), [dump] * count))


def _row(architecture: str, files: tuple[str, ...], index: int, dump: Path | None) -> Row:
    binary, target = shipped(architecture, files)[index], TARGETS[architecture]
    name = f"{architecture}-{index:03d}-{binary.kernel.__name__}"
    start = time.monotonic()
    try:
        compiled = binary.compile(gpu_target(architecture))
    except Exception as error:  # Triton raises what it likes; a reader wants the other rows as well
        return _failed(architecture, binary, name, error)
    seconds = time.monotonic() - start
    if dump is not None:
        for kind in ("ptx", "cubin", "amdgcn", "hsaco"):
            if kind in compiled.asm:
                code = compiled.asm[kind]
                (dump / f"{name}.{kind}").write_bytes(code.encode() if isinstance(code, str) else code)
    if "cubin" in compiled.asm:  # disassembling takes as long as compiling: only what has a product in it
        read = _read_cubin(compiled.asm["cubin"], code="mma" in compiled.asm["ptx"])
    else:
        read = _read_amdgcn(compiled.asm["amdgcn"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    tile = [binary.constants[side] for side in TILE if side in binary.constants]
    slots = None
    if read["loop"] is not None and len(tile) == len(TILE) and not binary.constants.get("G_STORED"):
        cycles = math.prod(tile) / target.fma_per_cycle
        slots = round(read["loop"] * warps / 4 / cycles, 3)  # a multiprocessor issues four instructions a cycle
    return Row(
        architecture, binary.kernel.__name__, binary.case.name, warps, compiled.metadata.num_stages,
        read["registers"], read["stack"], read["local"], shared, _blocks(target, read["registers"], warps, shared),
        PRODUCT.search(compiled.asm["ttgir"]) is not None, read["tensor_core"], read["loop"], slots,
        binary.case.slots if len(tile) == len(TILE) else None, round(seconds, 2), name, read["nops"],
    )  # fmt: skip


def _failed(architecture: str, binary: Compilation, name: str, error: Exception) -> Row:
    """The row of a binary that does not compile."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return Row(
        architecture, binary.kernel.__name__, binary.case.name, binary.options.get("num_warps", 4),
        binary.options.get("num_stages", 0), 0, 0, 0, 0, 0, False, "", None, None, binary.case.slots, 0.0, name,
        error=f"{type(error).__name__}: {first}",
    )  # fmt: skip


def _blocks(target: Target, registers: int, warps: int, shared: int) -> int:
    """Blocks that fit one multiprocessor at a time, by shared memory, registers and warps."""
    if shared > target.shared_block:
        return 0
    a_warp = max(1, -(-registers * target.warp_size // 256) * 256)
    reserved = shared + (1024 if isinstance(target.capability, int) else 0)
    return min(
        target.registers // (a_warp * warps),
        target.warps // warps,
        target.shared_multiprocessor // max(1, reserved),
        32,
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(cubin: bytes, code: bool = True) -> dict[str, Any]:
    """Without `code` no tensor-core instruction and no main loop is looked for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=True).stdout
            if wanted
            else ""
            for option, wanted in (("-res-usage", True), ("-sass", code))
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = [
        (int(address, 16), text.strip())
        for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.M)
    ]
    kinds = collections.Counter(kind for _, text in lines if TENSOR_CORE.match((kind := _opcode(text)).split(".")[0]))
    loop = _main_loop(lines)
    most = max(kinds, key=lambda kind: (_multiply_adds(kind), kinds[kind])) if kinds else ""
    # wgmma takes its left operand from registers or from shared memory; the instruction says which.
    in_registers = any(re.search(rf"{re.escape(most)} R\d+, R\d+, gdesc", text) for _, text in lines) if most else False
    return {
        "registers": used.get("REG", 0), "stack": used.get("STACK", 0), "local": used.get("LOCAL", 0),
        "tensor_core": f"{most} x{kinds[most]}" + ", left operand in registers" * in_registers if most else "",
        "loop": None if loop is None else sum(not TENSOR_CORE.match(_opcode(text).split(".")[0]) for text in loop),
        "nops": sum(_opcode(text) == "NOP" for text in loop or ()),
    }  # fmt: skip


def _multiply_adds(opcode: str) -> int:
    """Of an instruction such as HGMMA.64x256x16.F32.BF16, to tell the main product from small ones."""
    shape = re.search(r"(\d+)x(\d+)x(\d+)", opcode)
    return int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0


def _main_loop(code: list[tuple[int, str]]) -> list[str] | None:
    """The shortest loop body that holds a tensor-core instruction."""
    position = {address: i for i, (address, _) in enumerate(code)}
    bodies = []
    for i, (_, text) in enumerate(code):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and (first := position.get(int(branch[1], 16), i + 1)) <= i:
            body = [line for _, line in code[first : i + 1]]
            if any(TENSOR_CORE.match(_opcode(line).split(".")[0]) for line in body):
                bodies.append(body)
    return min(bodies, key=len, default=None)


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _read_amdgcn(text: str) -> dict[str, Any]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    kinds = collections.Counter(re.findall(r"^\s+(v_mfma_\w+)", text, re.M))
    most = kinds.most_common(1)
    return {
        "registers": field("vgpr_count") + field("agpr_count"), "stack": field("private_segment_fixed_size"),
        "local": 4 * field("vgpr_spill_count"), "tensor_core": f"{most[0][0]} x{most[0][1]}" if most else "",
        "loop": None, "nops": 0,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=list(TARGETS), help="default: PST_KERNELS_ARCH, else the GPU's, else sm_90")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write one .ptx and .cubin a row into this folder")
    parser.add_argument("--workers", type=int, help="compiling processes, default one a core")


def main(args: argparse.Namespace) -> int:
    """Print the report; 1 when a row does not compile, spills, does not fit or exceeds its budget."""
    rows = report(args.target or env.architecture() or _device_target(), args.dump, args.workers)
    if args.json:
        print(json.dumps([row._asdict() | {"problems": row.problems} for row in rows], indent=1))
    else:
        _print_table(rows)
    return int(any(row.problems for row in rows))


def _device_target() -> str:
    import torch

    from ..tiles.targets import architecture

    return architecture(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else "sm_90"


def _print_table(rows: list[Row]) -> None:
    head = (
        "kernel",
        "case",
        "warps",
        "regs",
        "stack",
        "local",
        "shared",
        "blocks/SM",
        "slots",
        "budget",
        "tensor core",
    )
    lines = [
        (row.kernel, row.case, row.warps, row.registers, row.stack, row.local, row.shared, row.blocks,
         "" if row.slots is None else row.slots, "" if row.budget is None else row.budget, row.tensor_core)
        for row in rows
    ]  # fmt: skip
    widths = [max(len(str(line[i])) for line in (head, *lines)) for i in range(len(head))]
    for line in (head, *lines):
        print("  ".join(str(value).ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        for problem in row.problems:
            print(f"{row.file}: {row.case}: {problem}", file=sys.stderr)
    print(
        f"{len(rows)} binaries for {rows[0].target if rows else 'nothing'}; computed from machine code, not measured."
    )
