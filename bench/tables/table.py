"""Results as tables: in the terminal, and in the README between two markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pst_kernels.files import replacing

from ..console import Console, Table
from ..speed.cases import MODES
from .rows import Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
REFUSED = "refused"


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """One table a mode: time with its spread, ratio with its spread, and bytes."""
    for mode in MODES:
        chosen = [row for row in rows if row.mode == mode]
        if not chosen:
            continue
        table = Table(title=f"{mode}: times in ms, ratio to {chosen[0].ratio_to} in the same round")
        with_bytes = any(row.kept_bytes is not None for row in chosen)
        table.add_column("case", overflow="fold")
        table.add_column("provider", no_wrap=True)
        for name in ("median", "p20-p80", "runs", "ratio", "p20-p80", "peak MB"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("kept MB", "memory MB") if with_bytes else ():
            table.add_column(name, justify="right", no_wrap=True)
        last = ""
        for row in chosen:
            case = case_name(row)
            if last and case != last:
                table.add_section()
            spread_of_ratio = "" if row.ratio is None else f"{ratio(row.ratio_p20)}-{ratio(row.ratio_p80)}"
            cells = [
                "" if case == last else case, row.provider, number(row.median_ms),
                f"{number(row.p20_ms)}-{number(row.p80_ms)}", str(row.rounds), ratio(row.ratio, row.check),
                spread_of_ratio, megabytes(row.peak_bytes),
            ]  # fmt: skip
            table.add_row(*cells, *map(megabytes, [row.kept_bytes, row.memory_bytes] if with_bytes else []))
            last = case
        console.print(table)


def case_name(row: Row) -> str:
    layer = "" if row.mode == "model" else f" {row.in_features} -> {row.out_features}"
    tokens = f", T = {row.tokens}" if row.tokens and row.mode != "model" else ""
    return f"{row.shape}{layer}{tokens}, {row.dtype}"


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratio(value: float | None, check: str = "ok") -> str:
    if check != "ok":
        return REFUSED
    return "" if value is None else f"{value:.2f}"


def megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


FEWEST_ROUNDS = 3  # a median of fewer is no median: the README shows "-"


def markdown(rows: Iterable[Row]) -> str:
    """The README's first table: step and model cases, a line a case, every provider's time and its ratio to dense."""
    chosen = [row for row in rows if row.mode in ("step", "model") and "@" not in row.provider]
    if not chosen:
        raise ValueError(
            "the CSV has no rows of mode step or model; run `python -m bench` or `python -m bench --quick`"
        )
    providers = list(dict.fromkeys(row.provider for row in chosen))
    cases = list(dict.fromkeys((row.mode, case_name(row), row.machine, row.adamw) for row in chosen))
    lines = [
        f"| one training step, ms (ratio to dense) | {' | '.join(providers)} |",
        f"| --- |{' ---: |' * len(providers)}",
    ]
    for case in cases:
        cells = []
        for provider in providers:
            found = [r for r in chosen if (r.mode, case_name(r), r.machine, r.adamw) == case and r.provider == provider]
            shown = found and (found[0].ratio is None or found[0].rounds >= FEWEST_ROUNDS)
            cells.append(_cell(found[0]) if shown else "-")
        lines.append(f"| {case[1]} | {' | '.join(cells)} |")
    shown_rows = [row for row in chosen if row.rounds >= FEWEST_ROUNDS]
    return "\n".join([*lines, "", caption(shown_rows)])


def _cell(row: Row) -> str:
    if row.ratio is None:
        return (
            f"{number(row.median_ms)} (ratio {REFUSED}: check failed)" if row.check != "ok" else number(row.median_ms)
        )
    return f"{number(row.median_ms)} ({row.ratio:.2f})"


def caption(rows: Sequence[Row]) -> str:
    """Machine, versions, dates and commits of the rows, and how to read them."""

    def each(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    threads = each(f"{row.device}, {row.threads} threads" for row in rows)
    return (
        f"Measured on {each(row.machine for row in rows)} ({threads}), {each(row.versions for row in rows)},"
        f" {each(row.date for row in rows)}, commit {each(row.commit for row in rows)}. A step is mask refresh,"
        f" forward, backward and AdamW ({each(row.adamw for row in rows)}); medians of interleaved runs in one process,"
        f" ratios of the same round. {spread(rows)}"
    )


def spread(rows: Iterable[Row]) -> str:
    """How noisy the ratios were."""
    widths = [r.ratio_p80 / r.ratio_p20 for r in rows if r.ratio and r.ratio_p20 and r.ratio_p80 and r.ratio != 1.0]
    return f"Widest spread of a ratio, p80 over p20: {max(widths):.2f}." if widths else ""


def rewrite_readme(path: Path, rows: Sequence[Row]) -> None:
    """Put the benchmark table between its two markers."""
    replace_between(path, BEGIN, END, markdown(rows))


def replace_between(path: Path, begin: str, end: str, table: str) -> None:
    """Put a table between two markers. Raises ValueError when they are not there, once each and in order."""
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} must hold {begin} and, after it, {end}, once each, around the place of the table")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    with replacing(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
