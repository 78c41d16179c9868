"""Command lines of several jobs, each in the module that does it: `pst-kernels` and `python -m bench`.

A job's module has `add_arguments(parser)` and `main(options) -> exit status`, and is imported only when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

Jobs = Mapping[str, tuple[str, str]]  # by name: the module, and what it does


def run(program: str, description: str | None, jobs: Jobs, given: Sequence[str]) -> int:
    """Run one job; its exit status, or 2 after one line on an error that a user can mend."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    commands = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    try:
        for name, (module, summary) in jobs.items():
            command = commands.add_parser(name, help=summary, description=summary)
            if given[:1] == [name]:
                importlib.import_module(module).add_arguments(command)
        options = parser.parse_args(given)
        return importlib.import_module(jobs[options.job][0]).main(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"{program} {given[0]}: {error}", file=sys.stderr)
        return 2
