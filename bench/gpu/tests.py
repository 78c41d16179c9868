"""Part `tests`: the GPU tests, in several processes at once, because compiling the kernels takes most of the time.

A test that crashes or hangs its process, or leaves the device unusable, loses itself alone: the tests after it run in a
new process. Every outcome is saved as the test ends.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pst_kernels.files import write_json

from . import exits
from .conditions import ROOT, conditions_or_why_not
from .processes import end_children_when_ended, environment, run

FOLDER = "tests/gpu"
# Most valuable first; files that are not named come last.
ORDER = ("ops", "scores_and_masks", "linear", "layers", "routes", "graphs", "blocks", "exports", "compile")
PYTEST = [
    sys.executable, "-m", "pytest", "-q", "-c", "pyproject.toml", "-p", "bench.gpu.recorder", "-p", "no:cacheprovider",
]  # fmt: skip
MOST_PROCESSES = 14
SPARE_CORES = 2  # for the device's driver and this process
EACH = 90.0  # seconds for one test
START = 20.0  # seconds under which no process is started any more


def collect(folder: str = FOLDER, marker: str = "gpu") -> list[str]:
    """The names of the tests, most valuable first. Raises RuntimeError with pytest's words where that fails."""
    command = [*PYTEST, folder, "-m", marker, "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith((" ", "ERROR"))]
    if done.returncode or not names:
        raise RuntimeError(f"pytest collected nothing in {folder}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return sorted(names, key=_value)


def _value(name: str) -> int:
    stem = Path(name.partition("::")[0]).stem.removeprefix("test_gpu_")
    return ORDER.index(stem) if stem in ORDER else len(ORDER)


def run_all(names: list[str], record: Path, deadline: float, processes: int, each: float = EACH) -> None:
    """Every test, until the deadline (of time.monotonic); outcomes are lines of `record`."""
    shards = [names[i::processes] for i in range(min(processes, len(names)))]
    with concurrent.futures.ThreadPoolExecutor(len(shards)) as pool:
        list(pool.map(lambda shard: _run_shard(shard, record, deadline, each), shards))


def _run_shard(names: list[str], record: Path, deadline: float, each: float) -> None:
    left = list(names)
    while left and deadline - time.monotonic() > min(START, each):
        with tempfile.TemporaryDirectory() as folder:
            ids = Path(folder) / "ids.json"
            ids.write_text(json.dumps(left))
            files = sorted({name.partition("::")[0] for name in left})
            command = [*PYTEST, "--record", str(record), "--ids", str(ids), "--each", str(each), *files]
            run(command, deadline)
        rows = outcomes(record)
        before, left = len(left), [name for name in left if name not in rows]
        if before == len(left):  # not one was started: what stops the first would stop the next process too
            print(f"{before} tests were not started: pytest ended before; see above", flush=True)
            return


def outcomes(record: Path) -> dict[str, dict[str, Any]]:
    """The last word on each test; "crashed or hung" where it was started and no more was heard."""
    rows: dict[str, dict[str, Any]] = {}
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else ():
        row = json.loads(line)
        if row["outcome"] == "started":
            row = {"test": row["test"], "outcome": "crashed or hung", "message": "see log.txt"}
        rows[row["test"]] = row
    return rows


def counts(names: list[str], rows: dict[str, dict[str, Any]]) -> dict[str, int]:
    return dict(collections.Counter(rows[name]["outcome"] if name in rows else "not run" for name in names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--seconds", type=float, default=230.0)
    parser.add_argument("--collect", action="store_true", help="collect the tests alone")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    try:
        import pytest
    except ModuleNotFoundError:
        print("pytest is not installed; the GPU tests cannot run")
        return exits.LEFT_OUT
    names = collect()
    if options.collect:
        by_file = collections.Counter(name.partition("::")[0] for name in names)
        print(f"pytest {pytest.__version__}: " + ", ".join(f"{file} {count}" for file, count in by_file.items()))
        print(f"{len(names)} GPU tests collected")
        return exits.PASSED
    end_children_when_ended()
    record = options.output.with_suffix(".jsonl")
    record.unlink(missing_ok=True)
    run_all(names, record, deadline - 5.0, max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - SPARE_CORES)))
    rows = outcomes(record)
    found = counts(names, rows)
    write_json(options.output, {**conditions_or_why_not("cuda"), "counts": found, "tests": list(rows.values())})
    record.unlink(missing_ok=True)
    for row in rows.values():
        if row["outcome"] not in ("passed", "skipped"):
            print(f"{row['outcome']}: {row['test']}\n{row['message'][-600:]}")
    print(f"{len(names)} tests: " + ", ".join(f"{count} {word}" for word, count in sorted(found.items())))
    if found.keys() & {"failed", "crashed or hung"} or "passed" not in found:
        return exits.FAILED  # all skipped: there was no device for them
    return exits.OUT_OF_TIME if "not run" in found else exits.PASSED


if __name__ == "__main__":
    raise SystemExit(main())
