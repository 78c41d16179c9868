"""`python -m bench plots`: pictures of the CSV, ratio against T and shape, memory bars, and a roofline."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pst_kernels.files import save_figure

from ..speed import ceilings, roofline
from ..speed.cases import BY_NAME, DTYPES, short
from ..speed.providers import DENSE
from . import rows as results
from .rows import Row

COLOURS = {"dense": "#444444", "LoRA": "#3b7dd8", "PST released": "#c8553d", "PST (torch)": "#2a9d62"}
OTHER_COLOURS = ("#8e5bb5", "#d99a2b", "#4fb3bf", "#9a7b4f")  # PST (triton), and other versions with --base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, default=results.RESULTS / results.CSV_NAME)
    parser.add_argument("--output", type=Path, help="folder; default that of the CSV")


def main(options: argparse.Namespace) -> int:
    """Draw all plots; the roofline's ceilings are measured now, on the machine at hand."""
    rows = results.read_csv(options.csv)
    here = [row for row in rows if row.machine == results.machine()]
    limits = ceilings.measured(here[-1].device, DTYPES) if here else None
    for path in draw(rows, options.output or options.csv.parent, limits):
        print(path)
    return 0


def draw(rows: Sequence[Row], output: Path, limits: ceilings.Ceilings | None) -> list[Path]:
    """Write every plot that the rows have data for, from the rows of the last row's machine: machines are not mixed."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    last = rows[-1].machine if rows else ""
    rows = [row for row in rows if row.machine == last]
    pictures: dict[str, Callable[[Sequence[Row]], Any]] = {
        "ratio_by_tokens": ratio_by_tokens, "ratio_by_shape": ratio_by_shape, "memory": memory,
        "roofline_measured": lambda rows: roofline_plot(rows, limits),
    }  # fmt: skip
    for name, picture in pictures.items():
        figure = picture(rows)
        if figure is not None:
            figure.get_layout_engine().set(rect=(0.0, 0.05, 1.0, 0.95))  # room for the source below
            figure.text(0.005, 0.01, _source(rows), fontsize=6, color="#777777")
            path = output / f"{name}.png"
            save_figure(figure, path)
            written.append(path)
    return written


def _source(rows: Sequence[Row]) -> str:
    row = rows[-1]
    return f"measured: {row.machine}, {row.threads} threads\n{row.versions}, {row.date}, commit {row.commit}"


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * panels, 4.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, list(axes)


def _colour(provider: str, providers: Sequence[str]) -> str:
    others = [p for p in providers if p not in COLOURS]
    return COLOURS.get(provider) or OTHER_COLOURS[others.index(provider) % len(OTHER_COLOURS)]


def _providers(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.provider for row in rows))


def ratio_by_tokens(rows: Sequence[Row]) -> Any:
    """Step time over dense against T: a line a provider through the medians over shapes, a band over the shapes."""
    steps = [row for row in rows if row.mode == "step" and row.ratio is not None and row.provider != DENSE]
    dtypes = list(dict.fromkeys(row.dtype for row in steps))
    if not dtypes:
        return None
    figure, axes = _figure(len(dtypes))
    for one, dtype in zip(axes, dtypes, strict=True):
        chosen = [row for row in steps if row.dtype == dtype]
        for provider in _providers(chosen):
            by_tokens: dict[int, list[float]] = {}
            for row in chosen:
                if row.provider == provider and row.ratio is not None:
                    by_tokens.setdefault(row.tokens, []).append(row.ratio)
            x = sorted(by_tokens)
            middle = [sorted(by_tokens[t])[len(by_tokens[t]) // 2] for t in x]
            colour = _colour(provider, _providers(steps))
            one.plot(x, middle, marker="o", markersize=4, color=colour, label=provider)
            one.fill_between(
                x, [min(by_tokens[t]) for t in x], [max(by_tokens[t]) for t in x], color=colour, alpha=0.15
            )
        one.axhline(1.0, color=COLOURS[DENSE], linewidth=1)
        one.set(xscale="log", yscale="log", xlabel="tokens T", title=f"{dtype}: median and range over shapes")
        ticks = sorted({row.tokens for row in chosen})
        one.set_xticks(ticks, [str(t) for t in ticks], minor=False)
        one.set_xticks([], minor=True)
        _plain_ratios(one)
    axes[0].set_ylabel("training step, time over dense")
    axes[0].legend(frameon=False)
    return figure


def ratio_by_shape(rows: Sequence[Row]) -> Any:
    """Step time over dense for every shape, at the largest T that all shapes were measured at; p20 to p80 as a bar."""
    steps = [row for row in rows if row.mode == "step" and row.ratio is not None and row.dtype == "float32"]
    steps = [row for row in steps if row.provider != DENSE]
    shapes = list(dict.fromkeys(row.shape for row in steps))
    if not shapes:
        return None
    figure, (one,) = _figure(1)
    providers = _providers(steps)
    width = 0.8 / len(providers)
    for number, provider in enumerate(providers):
        for place, shape in enumerate(shapes):
            found = [row for row in steps if row.provider == provider and row.shape == shape]
            if not found:
                continue
            row = min(found, key=lambda row: abs(row.tokens - 1024))
            if row.ratio is None or row.ratio_p20 is None or row.ratio_p80 is None:
                continue
            x = place - 0.4 + (number + 0.5) * width
            spread = [[max(0.0, row.ratio - row.ratio_p20)], [max(0.0, row.ratio_p80 - row.ratio)]]
            label = provider if place == 0 else None
            one.bar(x, row.ratio, width, color=_colour(provider, providers), label=label)
            one.errorbar(x, row.ratio, spread, color="black", linewidth=0.8, capsize=2)
    one.axhline(1.0, color=COLOURS[DENSE], linewidth=1)
    near = {shape: min((r.tokens for r in steps if r.shape == shape), key=lambda t: abs(t - 1024)) for shape in shapes}
    one.set_xticks(range(len(shapes)), [f"{s}\nT = {near[s]}" for s in shapes], rotation=35, ha="right", fontsize=7)
    one.set(ylabel="training step, time over dense", yscale="log", title="float32, p20 to p80 of the rounds")
    _plain_ratios(one)
    one.legend(frameon=False)
    return figure


def _plain_ratios(one: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    one.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    one.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    one.yaxis.set_minor_formatter(NullFormatter())


def memory(rows: Sequence[Row]) -> Any:
    """Stacked bytes a weight: parameters, optimizer state, peak of a step; the whole model if it was measured."""
    found = [row for row in rows if row.mode in ("model", "step") and row.memory_bytes is not None]
    if not found:
        return None
    best = next((row for row in found if row.mode == "model"), found[0])
    chosen = [
        r for r in found if (r.mode, r.shape, r.tokens, r.dtype) == (best.mode, best.shape, best.tokens, best.dtype)
    ]
    figure, (one,) = _figure(1)
    bottoms = [0.0] * len(chosen)
    for label, colour, values in (
        ("parameters and masks", "#444444", [r.parameter_bytes or 0 for r in chosen]),
        ("optimizer state", "#3b7dd8", [r.optimizer_bytes or 0 for r in chosen]),
        ("peak of a step beside them", "#d99a2b", [r.peak_bytes or 0 for r in chosen]),
    ):
        heights = [value / 1e6 for value in values]
        one.bar([r.provider for r in chosen], heights, 0.6, bottom=bottoms, color=colour, label=label)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    for x, total in enumerate(bottoms):
        one.text(x, total, f"{total:.0f}", ha="center", va="bottom")
    one.set(ylabel="MB", title=f"memory of one training step: {best.shape}, {best.dtype}")
    one.margins(y=0.12)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def roofline_plot(rows: Sequence[Row], limits: ceilings.Ceilings | None) -> Any:
    """Achieved speed against the operations a byte that a step needs, under the ceilings measured in the same run.

    Operations and compulsory bytes are those of the computed roofline; a dense step's for every provider, so that the
    height of a point says how fast the same work was done.
    """
    steps = [row for row in rows if row.mode == "step" and row.shape in BY_NAME]
    if not steps or limits is None:
        return None
    dtypes = [d for d in DTYPES if any(row.dtype == short(d) for row in steps) and d in limits.gemm]
    if not dtypes:
        return None
    figure, axes = _figure(len(dtypes))
    for one, dtype in zip(axes, dtypes, strict=True):
        chosen = [row for row in steps if row.dtype == short(dtype)]
        for provider in _providers(chosen):
            points = [_point(row, dtype) for row in chosen if row.provider == provider]
            colour = _colour(provider, _providers(steps))
            one.scatter(*zip(*points, strict=True), s=22, color=colour, label=provider, zorder=3)
        knee = limits.gemm[dtype] / limits.bandwidth
        left = min([knee / 8, *(_point(row, dtype)[0] / 2 for row in chosen)])
        right = max([knee * 8, *(_point(row, dtype)[0] * 2 for row in chosen)])
        ceiling = [left * limits.bandwidth / 1e9, limits.gemm[dtype] / 1e9, limits.gemm[dtype] / 1e9]
        one.plot([left, knee, right], ceiling, color="black", linewidth=1.2)
        text = f"GEMM {limits.gemm[dtype] / 1e9:.0f} GFLOP/s, memory {limits.bandwidth / 1e9:.0f} GB/s, measured"
        one.set(xscale="log", yscale="log", xlabel="operations a byte of a dense step", title=f"{short(dtype)}: {text}")
        one.title.set_fontsize(9)
    axes[0].set_ylabel("GFLOP/s of a dense step's operations")
    axes[0].legend(frameon=False)
    return figure


def _point(row: Row, dtype: torch.dtype) -> tuple[float, float]:
    passes = roofline.dense_step(BY_NAME[row.shape], row.tokens, dtype.itemsize, 7 * dtype.itemsize)
    operations = sum(one.operations for one in passes)
    return operations / sum(one.nbytes for one in passes), operations / (row.median_ms * 1e-3) / 1e9
