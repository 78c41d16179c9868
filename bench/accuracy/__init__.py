"""How good the sparse models are: `python -m bench accuracy` trains a grid of methods, sparsities and seeds.

`tasks` holds the data and the losses, `methods` what is trained, `train` trains one cell, `choose` picks learning rates
on validation, `final` alone reads test data, `record` is the CSV that a run resumes from, `table` and `plots` show it.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .job import add_arguments as add

    add(parser)


def main(options: argparse.Namespace) -> int:
    from .job import main as job

    return job(options)
