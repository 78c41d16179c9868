"""`python -m bench table`: the tables of a CSV, in the terminal or in the README."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import results, table
from .console import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, default=results.RESULTS / results.CSV_NAME)
    parser.add_argument("--readme", type=Path, help=f"rewrite what stands between {table.BEGIN} and {table.END} there")


def main(options: argparse.Namespace) -> int:
    rows = results.read_csv(options.csv)
    if options.readme is None:
        table.print_rows(rows, console())
    else:
        table.rewrite_readme(options.readme, rows)
        print(f"{options.readme}: table written from {options.csv}")
    return 0
