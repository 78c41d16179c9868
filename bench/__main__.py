"""`python -m bench`: measure, and show what was measured. One subcommand a job; without one, `run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pst_kernels import subcommands as jobs

JOBS = {
    "run": ("bench.speed.job", "measure every case and write the CSV, the tables and the plots (the default)"),
    "table": ("bench.tables.job", "print the tables of a CSV again, or write the README's first table from it"),
    "plots": ("bench.tables.plots", "draw the plots of a CSV again"),
    "blocks": ("bench.speed.blocks", "what block patterns cost beside dense training and torch's block-sparse product"),
    "sparse": (
        "bench.speed.sparse",
        "products that skip unstructured zeros on a CPU beside dense ones and other loops",
    ),
    "training": ("bench.speed.training", "whole training runs of MiniLM: time and memory of each method"),
    "front": (
        "bench.tables.front",
        "the README's one table and its measured sentences, from the results files of their figures",
    ),
    "host": ("bench.speed.host", "launches and host time of a GPU step, counted and timed without a GPU"),
    "serve": (
        "bench.speed.serve",
        "decoding with a sparse language model on a CPU: tokens/s, disk, load time and memory",
    ),
    "export": ("bench.speed.export", "how large the files of a sparse model are, and that they load back bit for bit"),
    "profile": ("bench.speed.profile", "where the time of one PST step goes, pass by pass"),
    "accuracy": ("bench.accuracy", "how good the sparse models are: methods x sparsities x seeds, resumable"),
    "gpu": (
        "bench.gpu.job",
        "all that a GPU is needed for, in nine minutes: smoke, tests, benchmark, compiled kernels",
    ),
    "roofline": ("bench.speed.roofline", "bytes, operations and floor times of a GPU, computed, not measured"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; 0 when it succeeded, 1 when a provider was wrong, 2 for an error a user can mend."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0] not in JOBS and given[0] not in ("-h", "--help")):
        given = ["run", *given]
    return jobs.run("python -m bench", __doc__, JOBS, given)


if __name__ == "__main__":
    raise SystemExit(main())
