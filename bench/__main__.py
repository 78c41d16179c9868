"""`python -m bench`: measure, and show what was measured. One subcommand a job; without one, `run`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

JOBS = {
    "run": ("bench.job", "measure every case and write the CSV, the tables and the plots (the default)"),
    "table": ("bench.table_job", "print the tables of a CSV again, or write the README's first table from it"),
    "plots": ("bench.plots", "draw the plots of a CSV again"),
    "profile": ("bench.profile", "where the time of one PST step goes, pass by pass"),
    "accuracy": ("bench.accuracy", "how good the sparse models are: methods x sparsities x seeds, resumable"),
    "roofline": ("bench.roofline", "bytes, operations and floor times of a GPU, computed, not measured"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; 0 when it succeeded, 1 when a provider was wrong, 2 for an error a user can mend."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0] not in JOBS and given[0] not in ("-h", "--help")):
        given = ["run", *given]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, (module, summary) in JOBS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if given[0] == name:  # import the one job that runs
            importlib.import_module(module).add_arguments(command)
    options = parser.parse_args(given)
    try:
        return importlib.import_module(JOBS[options.job][0]).main(options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"python -m bench {options.job}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
