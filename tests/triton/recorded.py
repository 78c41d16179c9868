"""What the compiler made of the shipped binaries, kept beside the tests: compiling all of them for all targets takes a
quarter of an hour of a CPU, and nothing about one changes before its source does.

A row of machine_code.json is found by a digest of all that decides it: the code that Triton's front end makes of the
kernel, the options, the target's numbers, the case with its budget, the versions of Triton and of the assembler, and
the code that reads the result. A second digest, with the kernel's source in the place of that code, leads to the first.
What isn't found either way is compiled, and said, so no test sees an old row.

    make record        compiles what is missing, and writes the rows that tests ask for
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import json
import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from emulator.front_end import FrontEnd
from triton.compiler import ASTSource

from pst_kernels.triton.tools import machine_code

PATH = Path(__file__).with_name("machine_code.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
PRODUCTS, BLOCKS = ("matmul", "gradients"), ("block_lists", "block_matmul", "block_gradients")
PACKED = ("sparse_matmul", "listed_matmul")
SWEEPS, TABLES = ("score", "select", "mask"), ("group_mask",)
FILES = (PRODUCTS, BLOCKS, PACKED, SWEEPS, TABLES)
ASKED_FOR = [(target, files) for target in TARGETS for files in FILES]
NOT_KEPT = ("seconds", "file")  # of a row
READING = ("_row", "_blocks", "_read_cubin", "_read_amdgcn", "_main_loop", "_multiply_adds", "_opcode")


class Kept(NamedTuple):
    rows: dict[str, list[Any]]  # by `digest`
    sources: dict[str, str]  # `source_digest` -> `digest`


@functools.cache
def kept() -> Kept:
    return Kept(**json.loads(PATH.read_text())) if PATH.is_file() else Kept({}, {})


made: dict[str, machine_code.Row] = {}  # of this process


@functools.cache
def _reader() -> str:
    patterns = machine_code.TENSOR_CORE.pattern, machine_code.PRODUCT.pattern, machine_code.TILE
    return repr(patterns) + "".join(inspect.getsource(getattr(machine_code, name)) for name in READING)


def _front_end(architecture: str, binary: machine_code.Compilation) -> FrontEnd:
    source = ASTSource(binary.kernel, binary.signature, binary.constexprs, binary.attributes)
    return FrontEnd.of(source, machine_code.gpu_target(architecture), binary.options)


def digest(architecture: str, binary: machine_code.Compilation) -> str:
    return _front_end(architecture, binary).digest(*_read_by(architecture, binary))


def source_digest(architecture: str, binary: machine_code.Compilation) -> str:
    return _front_end(architecture, binary).source_digest(*_read_by(architecture, binary))


def _read_by(architecture: str, binary: machine_code.Compilation) -> tuple[Any, ...]:
    """What decides a row beside the code."""
    constants = sorted(binary.constants.items(), key=str)
    return _reader(), machine_code.TARGETS[architecture], constants, binary.case.name, binary.case.slots


def key_of(architecture: str, binary: machine_code.Compilation) -> str:
    """`digest`, by the shorter way where the source is as it was."""
    return _front_end(architecture, binary).key(kept().sources, *_read_by(architecture, binary))


def row(architecture: str, files: tuple[str, ...], index: int) -> machine_code.Row:
    """Of one binary of `machine_code.shipped`."""
    binary = machine_code.shipped(architecture, files)[index]
    key = key_of(architecture, binary)
    if key not in made:
        found = kept().rows.get(key)
        if not found:
            warnings.warn(f"{architecture}: {binary.case.name} is compiled anew; run `make record`", stacklevel=2)
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


def _asked(architecture: str, files: tuple[str, ...], index: int) -> tuple[str, str, machine_code.Row]:
    binary = machine_code.shipped(architecture, files)[index]
    return source_digest(architecture, binary), digest(architecture, binary), row(architecture, files, index)


def main() -> None:
    """One row a line, in an order that keeps differences short."""
    before = kept().rows.keys()
    tasks = [(*asked, i) for asked in ASKED_FOR for i in range(len(machine_code.shipped(*asked)))]
    context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        found = [one for one in pool.map(_asked, *zip(*tasks, strict=True), chunksize=8) if not one[2].error]
    rows = {key: values(row) for _, key, row in found}
    sources = {source: key for source, key, _ in found}
    written = PATH.with_suffix(".part")
    written.write_text(f'{{"rows": {_a_line_each(rows)},\n"sources": {_a_line_each(sources)}}}\n')
    written.replace(PATH)
    print(f"{len(rows)} rows, {len(rows.keys() - before)} of them new")


def _a_line_each(values: dict[str, Any]) -> str:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    return "{\n" + ",\n".join(sorted(lines, key=lambda line: line.split(":", 1)[1])) + "\n}"


if __name__ == "__main__":
    main()
