"""The console script `pst-kernels`: one subcommand a job, each in the file that does it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

JOBS = {
    "finetune": ("pst_kernels.finetune", "fine-tune a model dense and sparse, and compare the two"),
    "env": ("pst_kernels.report", "print versions, devices, and the backend of every op"),
    "kernels": ("pst_kernels.triton.compile", "compile every GPU kernel without a GPU and report its machine code"),
    "tune": ("pst_kernels.triton.tune", "time tile shapes on this machine's GPU and write a tuning file"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; 0 when it succeeded. Errors a user can mend are printed as one line, exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="pst-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    try:
        for name, (module, summary) in JOBS.items():
            command = commands.add_parser(name, help=summary, description=summary)
            if given[:1] == [name]:  # import the one job that runs: `finetune` needs transformers, `kernels` triton
                importlib.import_module(module).add_arguments(command)
        options = parser.parse_args(given)
        return importlib.import_module(JOBS[options.job][0]).main(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"pst-kernels {given[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
