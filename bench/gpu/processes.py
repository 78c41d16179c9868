"""Processes with a deadline, each in a group of its own, so that what it started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from .conditions import ROOT

GRACE = 3.0  # seconds between asking a process to end and ending it
_running: set[subprocess.Popen] = set()


def environment() -> dict[str, str]:
    """Of a part: this checkout comes first, output is not held back, and pytest takes no plugin that happens to be
    installed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run(command: Sequence[str], deadline: float, log: IO[str] | None = None) -> int | None:
    """The exit status, or None where the process had to be ended at the deadline (of time.monotonic)."""
    process = subprocess.Popen(
        list(command), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=log,
        stderr=None if log is None else subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    _running.add(process)
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
        _running.discard(process)


def end_children_when_ended() -> None:
    """A process that is asked to end ends those that it runs: they are in groups of their own."""

    def end(number: int, _: FrameType | None) -> None:
        for process in list(_running):
            _end(process)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _end(process: subprocess.Popen) -> None:
    for signal_, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, signal_)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        if signal_ == signal.SIGTERM:
            continue  # what it started may still run
    process.wait()
