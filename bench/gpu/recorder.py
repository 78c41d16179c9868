"""A pytest plugin: every outcome is a line of a file as soon as its test ends; a test that hangs ends the process.

Used by tests.py, which runs what is then left in a new process. So is a process whose device fails for good: after an
illegal memory access every later call fails as well.
"""

from __future__ import annotations

import faulthandler
import json
import os
from pathlib import Path
from typing import Any

import pytest

STICKY = 70  # exit status where the device does not answer any more
MOST = 3000  # characters of a failure that are kept
# Copied before pytest takes stderr, so that the stacks of a test that hangs are seen.
_stderr = os.fdopen(os.dup(2), "w")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("recorder")
    group.addoption("--record", type=Path, help="append a JSON line a test to this file")
    group.addoption("--ids", type=Path, help="a JSON list: run these tests alone, in this order")
    group.addoption("--each", type=float, default=90.0, help="seconds for one test; then the process ends")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Recorder(config.getoption("--record"), config.getoption("--each")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (path := config.getoption("--ids")) is None:
        return
    found = {item.nodeid: item for item in items}
    items[:] = [found[name] for name in json.loads(path.read_text()) if name in found]


class Recorder:
    def __init__(self, path: Path, each: float):
        self.path, self.each = path, each
        self.row: dict[str, Any] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.row = {"test": nodeid, "outcome": "passed", "seconds": 0.0}
        self._write({"test": nodeid, "outcome": "started"})
        faulthandler.dump_traceback_later(self.each, exit=True, file=_stderr)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.row["seconds"] = round(self.row["seconds"] + report.duration, 2)
        if report.failed:
            self.row |= {"outcome": "failed", "message": report.longreprtext[-MOST:]}
        elif report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.row |= {"outcome": "skipped", "message": str(reason)}

    def pytest_runtest_logfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._write(self.row)
        if self.row["outcome"] == "failed" and not _device_answers():
            os._exit(STICKY)

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _device_answers() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
