"""`python -m bench gpu`: all that a GPU is needed for, in one command of at most nine minutes, behind `make gpu`.

It installs nothing and needs no network: torch with CUDA, Triton and NumPy are enough, and what cannot run without
another package is left out by name. Each part runs in a process of its own with a deadline, and its result is saved
when it ends, so that a crash or a hang loses no other part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst_kernels.files import write_json

from ..tables.rows import RESULTS
from . import conditions as under
from . import exits
from .parts import PARTS, Part
from .processes import environment, run
from .show import show

SECONDS = 540.0  # for everything
LOG, SUMMARY = "log.txt", "summary.json"
DESCRIBE_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [part.name for part in PARTS]
    parser.add_argument("--dry-run", action="store_true", help="go through all parts without a GPU: import and collect")
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything, default {SECONDS:.0f}")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="gets a folder of the device's name")
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="run nothing: the tables of a device's folder")
    parser.add_argument("--readme", type=Path, help="with --show, rewrite the tables between the markers there")


def main(options: argparse.Namespace) -> int:
    if options.show is not None:
        show(options.show, options.readme)
        return 0
    if options.readme is not None:
        raise ValueError("--readme needs --show FOLDER, whose tables it writes")
    deadline = time.monotonic() + options.seconds
    parts = [part for part in PARTS if not options.parts or part.name in options.parts]
    found = describe("cpu" if options.dry_run else "cuda")
    print(_heading(found), flush=True)
    if options.dry_run:
        print(_plan(parts, options.seconds), flush=True)
        return _status([_dry_run(part, deadline) for part in parts])
    folder = options.output / under.slug(found["device"])
    return _status(run_parts(parts, folder, deadline, found))


def describe(device: str) -> dict[str, Any]:
    """The conditions, by another process: this one never touches the device, and goes on where that hangs."""
    command = [sys.executable, "-m", "bench.gpu.conditions", device]
    try:
        done = subprocess.run(
            command, cwd=under.ROOT, env=environment(), capture_output=True, text=True, timeout=DESCRIBE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"asking for the device took over {DESCRIBE_SECONDS:.0f} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(
            f"{sys.executable} finds no CUDA device ({last}); name a Python that has torch with CUDA, `make gpu"
            " PYTHON=...`, or see what would run with ARGS=--dry-run"
        )
    return json.loads(done.stdout.splitlines()[-1])


def run_parts(parts: Sequence[Part], folder: Path, deadline: float, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the summary, which is written anew after every part."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    for part in parts:
        rows.append(_run_part(part, folder, deadline))
        write_json(folder / SUMMARY, {**found, "parts": rows})
        print(_line(rows[-1]), flush=True)
    print(f"written to {folder}")
    return rows


def _run_part(part: Part, folder: Path, deadline: float) -> dict[str, Any]:
    start = time.monotonic()
    seconds = min(part.most, deadline - start)
    if seconds < part.least:
        detail = f"{max(0.0, seconds):.0f} s are left, it needs {part.least:.0f}"
        return _row(part, exits.WORDS[exits.OUT_OF_TIME], 0.0, detail)
    (folder / part.file).unlink(missing_ok=True)  # of an earlier day: it must not pass for today's
    print(f"{part.name}: {part.what}; at most {seconds:.0f} s", flush=True)
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n=== {part.name} ===\n")
        log.flush()
        begin = log.tell()
        status = run(part.command(folder / part.file, seconds), start + seconds, log)
    with (folder / LOG).open("rb") as file:
        file.seek(begin)
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return _row(part, exits.word(status), time.monotonic() - start, lines[-1].strip() if lines else "said nothing")


def _dry_run(part: Part, deadline: float) -> dict[str, Any]:
    start = time.monotonic()
    left = max(1.0, deadline - start)
    try:
        done = subprocess.run(
            part.dry_run, cwd=under.ROOT, env=environment(), capture_output=True, text=True, timeout=left
        )
        status: int | None = done.returncode
        said = (done.stdout if status in exits.WORDS and done.stdout.strip() else done.stderr).strip().splitlines()
    except subprocess.TimeoutExpired:
        status, said = None, []
    for line in said[-12:]:
        print(f"    {line}")
    row = _row(part, exits.word(status), time.monotonic() - start, said[-1] if said else "said nothing")
    print(_line(row), flush=True)
    return row


def _row(part: Part, outcome: str, seconds: float, detail: str) -> dict[str, Any]:
    detail = detail.replace(f"{under.ROOT}/", "")  # a results file names no folder of a machine
    return {
        "part": part.name, "outcome": outcome, "seconds": round(seconds, 1), "detail": detail, "file": part.file,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    return f"{row['part']}: {row['outcome']} after {row['seconds']:.0f} s: {row['detail']}"


def _status(rows: Sequence[dict[str, Any]]) -> int:
    """0 where nothing failed; what was left out by name is no failure."""
    good = {exits.WORDS[exits.PASSED], exits.WORDS[exits.LEFT_OUT]}
    return int(any(row["outcome"] not in good for row in rows))


def _heading(found: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in found.items() if name != "not_installed")]
    lines += [f"not installed: {name}: left out: {effect}" for name, effect in found["not_installed"].items()]
    return "\n".join(lines)


def _plan(parts: Sequence[Part], seconds: float) -> str:
    lines = [f"{seconds:.0f} s for everything; a part gets what is left, and at most:"]
    return "\n".join(lines + [f"  {part.name:<8} {part.most:>4.0f} s  {part.what}" for part in parts])
