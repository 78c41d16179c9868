"""The tables of a GPU day's captured steps and decoding, from its folder: `python -m bench gpu --show FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_kernels.files import read_json

from ..tables.table import replace_between
from .captured import DENSE, SETTINGS

CONTESTANTS = (DENSE, "LoRA", *SETTINGS)


def tables(folder: Path) -> str:
    """Markdown, with the conditions of each file under its table."""
    parts = []
    for name, make in (("captured", captured_table), ("decoding", decoding_table)):
        found = read_json(folder / f"{name}.json", "the results of `python -m bench gpu`")
        parts += [make(found["rows"]), _under(found)]
    return "\n\n".join(parts)


def show(folder: Path, readme: Path | None) -> None:
    text = tables(folder)
    print(text)
    if readme is not None:
        replace_between(readme, "<!-- gpu:begin -->", "<!-- gpu:end -->", text)


def captured_table(rows: list[dict[str, Any]]) -> str:
    """A line a case: dense's microseconds, and the others' over dense's."""
    lines = [
        f"| step | dense, us | {' | '.join(CONTESTANTS[1:])} |",
        f"| --- |{' ---: |' * len(CONTESTANTS)}",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        by_name = {row["contestant"]: row for row in rows if row["case"] == case}
        ratios = [f"{by_name[n]['ratio']:.2f}" if n in by_name else "-" for n in CONTESTANTS[1:]]
        dense = f"{by_name[DENSE]['median_us']:,.0f}" if DENSE in by_name else "-"
        lines.append(f"| {case.partition(', ')[2]} | {dense} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def decoding_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | weights | pruned | batch | a token, us | tokens/s over dense | blocks, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['what']} | {100 * row['sparsity']:g} % | {row['batch']} | {row['step_us']:,.0f} |"
            f" {row['ratio']:.2f} | {row['weights_mb']:,.0f} |"
        )
    return "\n".join(lines)


def _under(found: dict[str, Any]) -> str:
    return (
        f"Measured on {found['device']}, driver {found['driver']}, CUDA {found['cuda']}, {found['versions']},"
        f" {found['date']}, commit {found['commit']}."
    )
