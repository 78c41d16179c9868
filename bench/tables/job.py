"""`python -m bench table`: the tables of a CSV, in the terminal or in the README."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import console
from . import finetune as finetune_table
from . import rows as results
from . import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, default=results.RESULTS / results.CSV_NAME)
    parser.add_argument("--finetune", type=Path, help="results.json of `make finetune`, for the README's first table")
    parser.add_argument("--readme", type=Path, help="rewrite what stands between the markers of the two tables there")


def main(options: argparse.Namespace) -> int:
    rows = results.read_csv(options.csv)
    if options.readme is None:
        table.print_rows(rows, console())
    else:
        table.rewrite_readme(options.readme, rows)
        if options.finetune is not None:
            finetune_table.rewrite_readme(options.readme, options.finetune)
        print(f"{options.readme}: written from {options.csv}{f' and {options.finetune}' if options.finetune else ''}")
    return 0
