"""What every supported version of Triton makes of the kernels: `python tests/triton/every_triton.py FOLDER`.

Each version is installed by itself into FOLDER, which can be thrown away, beside the torch that is installed, and
compiles every kernel for every target, without a GPU: a table with one line for each pair, and every problem by name.
With --tests each version also runs the interpreted tests, and some emulated ones of each kernel.

The exit status is 1 where a kernel does not compile, spills, is empty, does not fit or exceeds its budget, or a test
fails. Only a budget that is exceeded by nothing but NOPs, which the assembler puts between tensor-core instructions,
does not count; the table shows those too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
COLUMNS = ("triton", "target", "binaries", "do not compile", "spill", "over budget", "by NOPs alone", "other problems")
TESTS = "tests/triton"
INTERPRETED = (f"{TESTS}/test_blocks_interpreted.py", f"{TESTS}/test_linear_interpreted.py")
EMULATED = (  # each kernel on both targets that the emulator has, except where one is enough
    f"{TESTS}/test_linear_emulated.py::test_equals_float64", f"{TESTS}/test_linear_emulated.py::test_widest_tile",
    f"{TESTS}/test_blocks_emulated.py::test_equals_float64",
    f"{TESTS}/test_select_compiled.py::test_masks_equal_the_fallback_bit_for_bit",
    f"{TESTS}/test_select_compiled.py::test_other_layouts",
    f"{TESTS}/test_select_compiled.py::test_mask_and_masked_weight_in_one_pass",
    f"{TESTS}/test_select_compiled.py::test_routes_in_any_order_of_blocks",
    f"{TESTS}/test_group_emulated.py::test_layouts",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the versions, their caches and what they print")
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--targets", nargs="*", default=TARGETS, help="none: compile nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="compiling processes")
    parser.add_argument("--tests", action="store_true", help="run the interpreted and some emulated tests as well")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    lines: list[tuple[object, ...]] = []
    for version in options.versions:
        environment = installed(options.folder.resolve(), version)
        for target in options.targets:
            rows = compiled(options.folder, version, target, environment, options.workers)
            lines.append((version, target, *counts(rows)))
            failed |= any(counts_against(row) for row in rows)
            for row in rows:
                for problem in row["problems"]:
                    print(f"{version} {row['file']}: {row['case']}: {problem}", flush=True)
        if options.tests:
            failed |= not tested(version, environment)
    if lines:
        widths = [max(len(str(line[i])) for line in (COLUMNS, *lines)) for i in range(len(COLUMNS))]
        for line in (COLUMNS, *lines):
            print("  ".join(str(value).ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    return int(failed)


def installed(folder: Path, version: str) -> dict[str, str]:
    """The environment of a process that imports this version, which is installed if it is not there."""
    place = folder / version
    if not (place / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, f"triton=={version}"]
        subprocess.run(command, check=True)
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(REPOSITORY)]), "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(folder / f"cache-{version}"),
    }  # fmt: skip


def compiled(
    folder: Path, version: str, target: str, environment: dict[str, str], workers: int
) -> list[dict[str, Any]]:
    """The rows of `pst-kernels kernels`; what the compilers say goes into a file."""
    command = [sys.executable, "-m", "pst_kernels.cli", "kernels", "--target", target, "--json"]
    with (folder / f"{version}-{target}.log").open("w") as log:
        done = subprocess.run(
            [*command, "--workers", str(workers)], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    if done.returncode > 1:
        raise RuntimeError(f"triton {version} for {target}: exit status {done.returncode}, see {log.name}")
    return json.loads(done.stdout)


def counts(rows: list[dict[str, Any]]) -> tuple[int, ...]:
    """The numbers of a line, in the order of COLUMNS."""
    of = dict.fromkeys(("does not compile", "spills", "main loop", ""), 0)
    for row in rows:
        for problem in row["problems"]:
            of[next(kind for kind in of if problem.startswith(kind))] += 1
    nops = sum(bool(row["problems"]) and not counts_against(row) for row in rows)
    return len(rows), of["does not compile"], of["spills"], of["main loop"], nops, of[""]


def counts_against(row: dict[str, Any]) -> bool:
    return any("without the assembler's NOPs" not in problem for problem in row["problems"])


def tested(version: str, environment: dict[str, str]) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    interpreted = sorted(str(path) for path in (REPOSITORY / TESTS).glob("interpreted_*.py"))
    passed = True
    for name, tests, more in (
        ("interpreted", interpreted, {"TRITON_INTERPRET": "1"}), ("interpreted", INTERPRETED, {}),
        ("emulated", EMULATED, {}),
    ):  # fmt: skip
        done = subprocess.run(
            [*command, *tests], env=environment | more, cwd=REPOSITORY, capture_output=True, text=True
        )
        passed &= done.returncode == 0
        print(f"triton {version}, {name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
        if done.returncode:
            print(done.stdout[-6000:] + done.stderr[-2000:], flush=True)
    return passed


if __name__ == "__main__":
    raise SystemExit(main())
