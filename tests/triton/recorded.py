"""What the compiler made of the shipped binaries, kept beside the tests: compiling all of them for all targets takes a
quarter of an hour of a CPU, and nothing about one changes before its source does.

A row of machine_code.json is found by a digest of all that decides it: the code that Triton's front end makes of the
kernel (made anew each time), the options, the target's numbers, the case with its budget, the versions of Triton and of
the assembler, and the code that reads the result. What isn't found is compiled, so no test sees an old row.

    make record        compiles what is missing, and writes the rows that tests ask for
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend

from pst_kernels.triton.tools import machine_code

PATH = Path(__file__).with_name("machine_code.json")
NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
PRODUCTS, BLOCKS = ("matmul", "gradients"), ("block_lists", "block_matmul", "block_gradients")
PACKED = ("sparse_matmul", "listed_matmul")
SWEEPS, SELECTION, TABLES = ("score", "select", "mask"), ("select", "mask"), ("group_mask",)
ASKED_FOR = [
    *((target, files) for target in NVIDIA for files in (PRODUCTS, BLOCKS, PACKED, SWEEPS, TABLES)),
    ("gfx942", SELECTION),
]  # fmt: skip
NOT_KEPT = ("seconds", "file")  # of a row
READING = ("_row", "_blocks", "_read_cubin", "_read_amdgcn", "_main_loop", "_multiply_adds", "_opcode")


@functools.cache
def kept() -> dict[str, list[Any]]:
    return json.loads(PATH.read_text()) if PATH.is_file() else {}


made: dict[str, machine_code.Row] = {}  # of this process


@functools.cache
def _reader() -> str:
    patterns = machine_code.TENSOR_CORE.pattern, machine_code.PRODUCT.pattern, machine_code.TILE
    return repr(patterns) + "".join(inspect.getsource(getattr(machine_code, name)) for name in READING)


@functools.cache
def _context(backend: str) -> Any:
    return ir.context()


def digest(architecture: str, binary: machine_code.Compilation) -> str:
    target = machine_code.gpu_target(architecture)
    backend = make_backend(target)
    source = ASTSource(binary.kernel, binary.signature, binary.constexprs, binary.attributes)
    options = backend.parse_options(binary.options | source.parse_options())
    context = _context(target.backend)
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    text = source.make_ir(target, options, *functions, context).str_nodebug()
    decided = (
        triton.__version__, backend.hash(), text, sorted(vars(options).items(), key=str), _reader(),
        machine_code.TARGETS[architecture], sorted(binary.constants.items(), key=str), binary.case.name,
        binary.case.slots,
    )  # fmt: skip
    return hashlib.sha256(repr(decided).encode()).hexdigest()[:24]


def row(architecture: str, files: tuple[str, ...], index: int) -> machine_code.Row:
    """Of one binary of `machine_code.shipped`."""
    key = digest(architecture, machine_code.shipped(architecture, files)[index])
    if key not in made:
        found = kept().get(key)
        made[key] = _row_of(found) if found else machine_code._row(architecture, files, index, None)
    return made[key]


def report(architecture: str, files: tuple[str, ...]) -> list[machine_code.Row]:
    """As of `machine_code.report`."""
    return [row(architecture, files, index) for index in range(len(machine_code.shipped(architecture, files)))]


def values(found: machine_code.Row) -> list[Any]:
    return [value for name, value in found._asdict().items() if name not in NOT_KEPT]


def _row_of(found: list[Any]) -> machine_code.Row:
    names = [name for name in machine_code.Row._fields if name not in NOT_KEPT]
    return machine_code.Row(**dict(zip(names, found, strict=True)), seconds=0.0, file="kept")


def _asked(architecture: str, files: tuple[str, ...], index: int) -> tuple[str, machine_code.Row]:
    binary = machine_code.shipped(architecture, files)[index]
    return digest(architecture, binary), row(architecture, files, index)


def main() -> None:
    """One row a line, in an order that keeps differences short."""
    before = kept().keys()
    tasks = [(*asked, i) for asked in ASKED_FOR for i in range(len(machine_code.shipped(*asked)))]
    context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        found = pool.map(_asked, *zip(*tasks, strict=True), chunksize=8)
        rows = {key: values(row) for key, row in found if not row.error}
    lines = [f"{json.dumps(key)}: {json.dumps(found)}" for key, found in rows.items()]
    written = PATH.with_suffix(".part")
    written.write_text("{\n" + ",\n".join(sorted(lines, key=lambda line: line.split(":", 1)[1])) + "\n}\n")
    written.replace(PATH)
    print(f"{len(rows)} rows, {len(rows.keys() - before)} of them new")


if __name__ == "__main__":
    main()
