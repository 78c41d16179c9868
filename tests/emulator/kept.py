"""The PTX of the kernels that tests execute, kept beside the emulator: to compile it takes longer than to execute it.

A file a kernel; in it a program is found by the digests of `front_end`, of all that decides it. What is not found is
compiled, and said, so that no test executes an old program.

    make record        runs the tests that execute PTX, and keeps what they asked for
"""

from __future__ import annotations

import functools
import json
import lzma
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import triton

from .front_end import FrontEnd

FOLDER = Path(__file__).with_name("programs")
ASKED_FOR = "PST_PROGRAMS_ASKED_FOR"  # the environment variable of a folder: what is asked for is written there
TESTS = ("-m", "compiled and not gpu", "-k", "not interpreted", "tests/triton", "tests/gpu")


class Ptx(NamedTuple):
    shared: int  # bytes of shared memory
    text: str


class Kept(NamedTuple):
    """Of one kernel."""

    triton: str  # the version
    sources: dict[str, str]  # source digest -> digest
    programs: dict[str, Ptx]  # by digest


@functools.cache
def kept(kernel: str) -> Kept:
    path = FOLDER / f"{kernel}.json.xz"
    if not path.is_file():
        return Kept(triton.__version__, {}, {})
    version, sources, programs = json.loads(lzma.decompress(path.read_bytes()))
    return Kept(version, sources, {digest: Ptx(*program) for digest, program in programs.items()})


def compiled(front: FrontEnd) -> Ptx:
    made = triton.compile(front.source, target=front.target, options=vars(front.options))
    return Ptx(made.metadata.shared, made.asm["ptx"])


def program(front: FrontEnd) -> Ptx:
    """What the compiler makes of a kernel, kept or made now."""
    kernel = front.source.fn.__name__
    here = kept(kernel)
    if here.triton != triton.__version__:
        return compiled(front)
    digest = front.key(here.sources)
    found = here.programs.get(digest)
    if found is None:
        found = compiled(front)
        if ASKED_FOR not in os.environ:
            warnings.warn(f"{kernel}: its PTX is compiled anew; run `make record`", stacklevel=2)
    if folder := os.environ.get(ASKED_FOR):
        source = front.source_digest()
        written = Path(folder) / f"{source}.{os.getpid()}"
        written.write_text(json.dumps([kernel, source, digest, found]))
        written.replace(written.with_suffix(".json"))
    return found


def keep(folder: Path) -> None:
    """What tests have asked for, and nothing else."""
    by_kernel: dict[str, Kept] = {}
    for path in sorted(folder.glob("*.json")):
        kernel, source, digest, found = json.loads(path.read_text())
        here = by_kernel.setdefault(kernel, Kept(triton.__version__, {}, {}))
        here.sources[source], here.programs[digest] = digest, Ptx(*found)
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        if path.name.removesuffix(".json.xz") not in by_kernel:
            path.unlink()
    for kernel, here in by_kernel.items():
        text = json.dumps([here.triton, here.sources, here.programs], sort_keys=True)
        path = FOLDER / f"{kernel}.json.xz"
        if not path.is_file() or lzma.decompress(path.read_bytes()) != text.encode():
            path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
            print(f"{kernel}: {len(here.programs)} programs, {path.stat().st_size >> 10} KiB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {ASKED_FOR: folder, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "auto", *TESTS], env=environment, check=True)
        keep(Path(folder))


if __name__ == "__main__":
    main()
