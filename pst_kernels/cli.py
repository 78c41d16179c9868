"""The console script `pst-kernels`: one subcommand a job, each in the file that does it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pst_kernels import subcommands as jobs

JOBS = {
    "finetune": ("pst_kernels.finetune", "fine-tune a model dense and sparse, and compare the two"),
    "convert": ("pst_kernels.export.convert", "pack a sparse transformers folder into a small one, or back"),
    "show": ("pst_kernels.show", "show where the zeros of a saved folder lie, in a table and a picture"),
    "env": ("pst_kernels.env_report", "print versions, devices, and the backend of every op"),
    "kernels": (
        "pst_kernels.triton.tools.machine_code",
        "compile every GPU kernel without a GPU and report its machine code",
    ),
    "tune": ("pst_kernels.triton.tools.tune", "time tile shapes on this machine's GPU and write a tuning file"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; 0 when it succeeded. Errors a user can mend are printed as one line, exit code 2."""
    return jobs.run("pst-kernels", __doc__, JOBS, list(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    raise SystemExit(main())
