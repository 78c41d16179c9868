"""A job's few rows in a JSON file of their own, with the conditions they were made under, and the table of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from pst_kernels.files import read_json, write_json

from ..console import Table, console
from . import rows as results
from .table import replace_between

Row = TypeVar("Row")


@dataclass(frozen=True)
class Report(Generic[Row]):
    """`row` is a dataclass. `name` is that of the job, of its file and of the two markers in the README."""

    name: str
    row: type[Row]
    title: str
    columns: Sequence[str]
    cells: Callable[[Row], list[str]]
    caption: Callable[[dict[str, Any]], str]  # of the conditions
    left: int = 2  # columns that are text

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--readme", type=Path, default=None, help="rewrite the table between the markers there")
        parser.add_argument("--show", action="store_true", help="measure nothing: the table of the results as they are")
        parser.add_argument("--output", type=Path, default=results.RESULTS, help=f"folder of {self.name}.json")

    def run(self, options: argparse.Namespace, rows: Callable[[], Sequence[Row]]) -> list[Row]:
        """The job: make rows and write them, unless they are only to be shown; then the table of the file."""
        path = options.output / f"{self.name}.json"
        if not options.show:
            write_json(path, {**conditions(), "rows": [dataclasses.asdict(row) for row in rows()]})  # type: ignore[call-overload]
        found, under = self.read(path)
        table = Table(title=self.title)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number < self.left else "right")
        for row in found:
            table.add_row(*self.cells(row))
        console().print(table)
        if options.readme is not None:
            begin, end = (f"<!-- {self.name}:{where} -->" for where in ("begin", "end"))
            replace_between(options.readme, begin, end, self.markdown(found, under))
        return found

    def read(self, path: Path) -> tuple[list[Row], dict[str, Any]]:
        """Rows and conditions. Raises FileNotFoundError or ValueError that say what to do."""
        again = f"run `python -m bench {self.name}`"
        found = read_json(path, f"the results of `python -m bench {self.name}`")
        under = {name: value for name, value in found.items() if name != "rows"}
        try:
            if missing := conditions().keys() - under.keys():
                raise KeyError(*missing)
            return [self.row(**row) for row in found["rows"]], under
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} was not written by this version ({error}); {again} again") from error

    def markdown(self, rows: Sequence[Row], under: dict[str, Any]) -> str:
        lines = [f"| {' | '.join(self.columns)} |"]
        lines.append(f"|{' --- |' * self.left}{' ---: |' * (len(self.columns) - self.left)}")
        lines += [f"| {' | '.join(self.cells(row))} |" for row in rows]
        return "\n".join([*lines, "", self.caption(under)])


def conditions() -> dict[str, Any]:
    return {
        "machine": results.machine(), "threads": torch.get_num_threads(), "versions": results.versions(),
        "date": results.today(), "commit": results.commit(),
    }  # fmt: skip


def measured_on(under: dict[str, Any]) -> str:
    return (
        f"Measured on {under['machine']} (cpu, {under['threads']} threads), {under['versions']}, {under['date']},"
        f" commit {under['commit']}."
    )
