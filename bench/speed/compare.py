"""`--base GITREF`: another version of pst_kernels beside this one, in its own process, run in the same rounds.

Two versions of one package cannot live in one process (they register the same ops). So the other one runs in a worker
that waits on a pipe, does one run when told to, and answers with its seconds: the rounds stay interleaved, and both
versions are measured by this checkout's benchmark.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch

from ..tables.rows import ROOT
from . import cases, measure, modes


class BaseVersion:
    """The worker process of one git ref."""

    def __init__(self, ref: str, folder: Path, device: str):
        self.ref, self.device = ref, device
        self.commit = _git("rev-parse", "--short", f"{ref}^{{commit}}").decode().strip()
        with tarfile.open(fileobj=BytesIO(_git("archive", self.commit, "pst_kernels"))) as archive:
            archive.extractall(folder, filter="data")
        (folder / "bench").symlink_to(Path(__file__).resolve().parents[1], target_is_directory=True)
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from bench.speed.compare import serve; serve()"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        where = self._ask({"what": "where"})
        if not Path(where).is_relative_to(folder.resolve()):
            raise RuntimeError(f"the worker of {ref} imported {where} instead of the files of {ref} in {folder}")

    def timers(self, case: cases.Case, options: Any) -> Iterator[tuple[str, str, measure.Timer]]:
        """(name, check, timer) of each of our providers in the other version."""
        request = {
            "what": "case", "mode": case.mode, "shape": case.shape, "tokens": case.tokens,
            "dtype": cases.short(case.dtype), "device": self.device, "adamw": options.adamw,
        }  # fmt: skip
        for name, check in self._ask(request).items():
            yield f"{name} @ {self.ref}", check, self._timer(name)

    def _timer(self, name: str) -> measure.Timer:
        return lambda: float(self._ask({"what": "run", "name": name}))

    def _ask(self, request: dict[str, Any]) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker of {self.ref} ended; its error is printed above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.ref} cannot run this case: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)


@contextlib.contextmanager
def base_version(ref: str | None, device: str) -> Iterator[BaseVersion | None]:
    """The worker of a git ref, or None for no ref. Raises ValueError for a ref that git does not know."""
    if ref is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="bench-base-") as folder:
        base = BaseVersion(ref, Path(folder), device)
        try:
            yield base
        finally:
            base.close()


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise ValueError(f"--base: git {' '.join(arguments)} failed: {done.stderr.decode().strip()}")
    return done.stdout


def serve() -> None:
    """The worker: one JSON request a line, one answer a line. What the package prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    timers: dict[str, measure.Timer] = {}
    for line in sys.stdin:
        _answer(json.loads(line), timers, answers)


def _answer(request: dict[str, Any], timers: dict[str, measure.Timer], answers: IO[str]) -> None:
    try:
        answer: dict[str, Any] = {"answer": _do(request, timers)}
    except Exception as error:  # the other version may lack what this benchmark asks for; the parent says so
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)


def _do(request: dict[str, Any], timers: dict[str, measure.Timer]) -> Any:
    from . import run  # it imports this file

    if request["what"] == "where":
        import pst_kernels

        return str(Path(str(pst_kernels.__file__)).resolve())
    if request["what"] == "run":
        return timers[request["name"]]()
    shape = cases.Shape(*request["shape"])
    case = cases.Case(request["mode"], shape, request["tokens"], getattr(torch, request["dtype"]))
    device = request["device"]
    options = run.Options(device=device, adamw=request["adamw"])
    checks = {}
    timers.clear()
    if case.mode == "threshold":
        tasks = modes.threshold_tasks(case, device)
        for name in (modes.COLD, modes.WARM):
            checks[name] = modes.check_threshold(name, case, tasks[name], device)
            timers[name] = measure.timer(tasks[name].run, tasks[name].prepare, device)
        return checks
    for provider in options.providers:
        task = run.task_of(provider, case, options) if provider.ours else None
        if task is not None:
            checks[provider.name] = run.checked(provider, case, device, options.adamw)
            timers[provider.name] = measure.timer(task.run, task.prepare, device)
    return checks
