"""`python -m bench [--quick]`: run the cases, and leave a CSV, a terminal table and plots."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from ..console import console, progress
from ..tables import rows as results
from ..tables import table
from . import cases, ceilings, run
from .check import OK
from .compare import base_version

QUICK_SECONDS, FULL_SECONDS = 4.0, 8.0
QUICK_TOTAL = 75.0  # seconds of all quick cases; where a slow machine falls behind, the later cases get fewer rounds
# (warm-up rounds, most rounds) of a case, by device. On a CPU the run that counts bytes warms up. A GPU takes more: its
# libraries choose their kernels, its clock rises; and a round there takes milliseconds.
ROUNDS = {"cpu": (1, 50), "cuda": (3, 200)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the README's cases alone, under two minutes")
    parser.add_argument("--base", metavar="GITREF", help="run another version of pst_kernels in the same rounds")
    parser.add_argument("--modes", nargs="+", choices=cases.MODES, metavar="MODE", help=f"of {', '.join(cases.MODES)}")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="shapes whose name holds one of these")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T", help="these token counts alone")
    parser.add_argument("--dtypes", nargs="+", choices=[cases.short(d) for d in cases.DTYPES], metavar="DTYPE")
    parser.add_argument(
        "--providers", nargs="+", default=(), metavar="NAME", help="these beside dense, such as 'PST block:64'"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--adamw", choices=("fused", "default"), default="fused", help="for every provider")
    parser.add_argument("--seconds", type=float, default=None, help="time for one case")
    parser.add_argument(
        "--total",
        type=float,
        help=f"time for all quick cases, {QUICK_TOTAL:.0f}; with it, later cases are left out when it is over",
    )
    parser.add_argument("--list", action="store_true", help="print the cases and who takes part, and measure nothing")
    parser.add_argument(
        "--plots", action=argparse.BooleanOptionalAction, default=True, help="draw the plots (matplotlib)"
    )
    parser.add_argument("--longest-step", type=float, default=4.0, help="leave out cases whose dense step takes longer")
    parser.add_argument("--output", type=Path, help="folder; default bench/results, with --quick runs/bench")


def chosen(options: argparse.Namespace) -> list[cases.Case]:
    """The cases of the command line. Raises ValueError when there are none."""
    found = [
        case
        for case in (cases.quick(options.device) if options.quick else cases.full())
        if (not options.modes or case.mode in options.modes)
        and (not options.shapes or any(text.lower() in case.shape.name.lower() for text in options.shapes))
        and (not options.tokens or not case.tokens or case.tokens in options.tokens)
        and (not options.dtypes or cases.short(case.dtype) in options.dtypes)
    ]
    if not found:
        names = ", ".join(shape.name for shape in (*cases.SHAPES, cases.MINILM))
        raise ValueError(f"no case is left; shapes are {names}, token counts {', '.join(map(str, cases.TOKENS))}")
    return found


def main(options: argparse.Namespace) -> int:
    out = console()
    start = time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = chosen(options)
    if options.list:
        return _list(wanted, options)
    output = options.output or (results.ROOT / "runs" / "bench" if options.quick else results.RESULTS)
    limits = ceilings.measured(options.device, cases.DTYPES, 0.3 if options.quick else 1.0)
    out.print(
        f"{results.machine()}, {torch.get_num_threads()} threads, {results.versions()}\nmeasured: {limits}; {_load()}"
    )
    machine = run.machine(options.device, limits.gemm, options.longest_step)
    rows: list[results.Row] = []
    with base_version(options.base, options.device) as base, progress(out) as bars:
        settings = run.Options(
            device=options.device, adamw=options.adamw, only=options.providers, base=base, say=bars.console.print,
            everyone=not options.quick, seconds=options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS),
            warmup=0 if options.quick and options.device == "cpu" else ROUNDS[options.device][0],
            max_rounds=ROUNDS[options.device][1],
        )  # fmt: skip
        bar = bars.add_task("", total=len(wanted))
        for number, case in enumerate(wanted):
            if options.quick:
                left = ((options.total or QUICK_TOTAL) - (time.perf_counter() - start)) / (len(wanted) - number)
                settings.seconds = min(settings.seconds, max(0.5, 0.5 * left))
                settings.min_rounds = 3 if left > 0 else 1
            bars.update(bar, description=str(case))
            late = options.total is not None and time.perf_counter() - start > options.total
            reason = "no time is left" if late else cases.lacking(case) or cases.too_much(case, machine)
            if reason:
                bars.console.print(f"left out: {case}: {reason}")
            else:
                rows += run.run_case(case, settings)
                _write(output, rows)  # after every case: an interrupted run keeps what it has
            bars.advance(bar)
    table.print_rows(rows, out)
    out.print(table.spread(rows))
    out.print(_load())
    if options.plots:
        _plot(output, limits)
    out.print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s, written to {output / results.CSV_NAME}")
    return int(any(row.check != OK for row in rows))


def _list(wanted: list[cases.Case], options: argparse.Namespace) -> int:
    who = run.Options(device=options.device, only=options.providers, everyone=not options.quick).providers
    for case in wanted:
        print(f"{case}{f': left out: {cases.lacking(case)}' if cases.lacking(case) else ''}")
    print(f"{len(wanted)} cases; {', '.join(provider.name for provider in who)}")
    return 0


def _load() -> str:
    """Whether others used the machine: the load of the last minute against its cores."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load <= cores + 0.7:
        return f"load of the last minute {load:.1f} on {cores} cores"
    return (
        f"[bold]load of the last minute {load:.1f} on {cores} cores: others ran too, do not trust these numbers[/bold]"
    )


def _write(output: Path, rows: list[results.Row]) -> None:
    path = output / results.CSV_NAME
    results.write_csv(path, results.merge(results.read_csv(path) if path.is_file() else [], rows))


def _plot(output: Path, limits: ceilings.Ceilings) -> None:
    from ..tables import plots

    plots.draw(results.read_csv(output / results.CSV_NAME), output, limits)
