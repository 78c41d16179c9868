"""Pictures of the accuracy CSV: against sparsity with the spread of seeds, against what trains, and mask overlap."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pst_kernels.files import save_figure

from .catalogue import BASELINES, DENSE, RECIPES
from .record import FINAL, Cell, Row
from .table import HEADINGS, tasks_of
from .tasks import TASKS

GOLDEN = (math.sqrt(5) - 1) / 2  # hues this far apart on the circle come near each other after 8, 13 and 21 alone
LIGHTNESS = (0.32, 0.62, 0.45, 0.72, 0.52)  # and differ in this then


def _colour(index: int) -> tuple[float, float, float]:
    """Of the method at a place in the catalogue."""
    return colorsys.hls_to_rgb(index * GOLDEN % 1.0, LIGHTNESS[index % len(LIGHTNESS)], 0.62)


COLOURS = {method.name: _colour(index) for index, method in enumerate((*BASELINES, *RECIPES))}
COLOURS[DENSE] = colorsys.hls_to_rgb(0.0, 0.27, 0.0)
OTHER_COLOUR = colorsys.hls_to_rgb(0.5, 0.5, 0.5)
CUT_OFF = 40.0  # percentage points of accuracy


def draw(rows: Mapping[Cell, Row], overlaps: Sequence[Sequence[str]], output: Path) -> list[Path]:
    """Write every picture that the rows have data for."""
    tested = [row for row in rows.values() if row.cell.stage == FINAL and row.test is not None]
    pictures = {
        "accuracy_by_sparsity": by_sparsity(tested), "accuracy_by_trainable": by_trainable(tested),
        "accuracy_overlap": overlap_picture(overlaps),
    }  # fmt: skip
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            path = output / f"{name}.png"
            save_figure(figure, path)
            written.append(path)
    return written


def by_sparsity(rows: Sequence[Row]) -> Any:
    """A panel a task: the mean over seeds and their range at every sparsity; what prunes nothing is a level line."""
    return _panels(rows, "share of the block weights pruned, %", _lines_of_sparsity)


def _lines_of_sparsity(axis: Any, method: str, rows: Sequence[Row]) -> None:
    """Over the sparsity that was reached, which some methods choose themselves."""
    colour = COLOURS.get(method, OTHER_COLOUR)
    by_place: dict[float, list[Row]] = {}
    for row in rows:
        by_place.setdefault(row.cell.sparsity, []).append(row)
    places = [by_place[sparsity] for sparsity in sorted(by_place)]
    values = [[_value(row) for row in of_place] for of_place in places]
    middle = [_mean(of_place) for of_place in values]
    if set(by_place) == {0.0}:
        axis.axhline(middle[0], color=colour, linewidth=1, linestyle="--", label=method)
        return
    x = [100 * _mean([row.sparsity_reached for row in of_place]) for of_place in places]
    spread = [
        [m - min(of_place) for of_place, m in zip(values, middle, strict=True)],
        [max(of_place) - m for of_place, m in zip(values, middle, strict=True)],
    ]
    axis.errorbar(x, middle, spread, color=colour, marker="o", markersize=4, capsize=2, linewidth=1.2, label=method)


def _cut_off(axis: Any, by_method: Mapping[str, Sequence[float]]) -> None:
    """Methods far below all others would flatten them: they are named at the bottom instead."""
    best = max(max(values) for values in by_method.values())
    low = {method: values for method, values in by_method.items() if max(values) < best - CUT_OFF}
    if low and len(low) < len(by_method):
        least = min(min(values) for method, values in by_method.items() if method not in low)
        axis.set_ylim(least - 2.0, None)
        told = ", ".join(f"{method} {min(values):.0f} to {max(values):.0f}" for method, values in low.items())
        axis.annotate(f"below: {told}", (0.02, 0.02), xycoords="axes fraction", fontsize=7)


def by_trainable(rows: Sequence[Row]) -> Any:
    """A panel a task: a point a method and sparsity, the mean over seeds against how many numbers train."""
    return _panels(rows, "trainable numbers", _points_of_trainable, xscale="log")


def _points_of_trainable(axis: Any, method: str, rows: Sequence[Row]) -> None:
    for sparsity in sorted({row.cell.sparsity for row in rows}):
        chosen = [row for row in rows if row.cell.sparsity == sparsity]
        x, y = chosen[0].trainable, _mean([_value(row) for row in chosen])
        first = sparsity == min(row.cell.sparsity for row in rows)
        axis.scatter(x, y, s=24, color=COLOURS.get(method, OTHER_COLOUR), label=method if first else None, zorder=3)
        if sparsity:
            axis.annotate(f"{100 * sparsity:g} %", (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6)


def overlap_picture(overlaps: Sequence[Sequence[str]]) -> Any:
    """A row of panels a task, a panel a sparsity, of the lowest seed: which share of the row's kept weights the column
    keeps too. Blank where two masks were never at hand together.
    """
    if not overlaps:
        return None
    first = min(int(row[2]) for row in overlaps)
    of_first = [row for row in overlaps if int(row[2]) == first]
    tasks = [task for task in TASKS if any(row[0] == task for row in of_first)]
    sparsities = {task: sorted({float(row[1]) for row in of_first if row[0] == task}) for task in tasks}
    across = max(map(len, sparsities.values()))
    figure, axes = _figure(across, 4.2, len(tasks))
    for line, task in zip(axes, tasks, strict=True):
        for axis in line[len(sparsities[task]) :]:
            axis.axis("off")
        for axis, sparsity in zip(line, sparsities[task], strict=False):
            _overlap_panel(axis, [row for row in of_first if (row[0], float(row[1])) == (task, sparsity)])
            axis.set_title(f"{task}, {100 * sparsity:g} %, seed {first}", fontsize=9)
    return figure


def _overlap_panel(axis: Any, overlaps: Sequence[Sequence[str]]) -> None:
    found = {row[3] for row in overlaps}
    names = [*(name for name in COLOURS if name in found), *sorted(found - COLOURS.keys())]
    shares = {(row[3], row[4]): float(row[7]) for row in overlaps} | {(name, name): 1.0 for name in names}
    values = [[shares.get((one, other), math.nan) for other in names] for one in names]
    axis.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis")
    axis.grid(False)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if not math.isnan(value):
                colour = "w" if value < 0.6 else "k"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)


def _panels(rows: Sequence[Row], xlabel: str, draw_method: Any, **axis_settings: Any) -> Any:
    tasks = tasks_of(rows)
    if not tasks:
        return None
    figure, (axes,) = _figure(len(tasks), 5.6)
    for axis, task in zip(axes, tasks, strict=True):
        chosen = [row for row in rows if row.cell.task == task]
        found = {row.cell.method for row in chosen}
        for method in [*(name for name in COLOURS if name in found), *sorted(found - COLOURS.keys())]:
            draw_method(axis, method, [row for row in chosen if row.cell.method == method])
        seeds = sorted({row.cell.seed for row in chosen})
        title = f"{task}: mean and range of up to {len(seeds)} seeds" if len(seeds) > 1 else f"{task}: one seed"
        axis.set(xlabel=xlabel, ylabel=HEADINGS[chosen[0].metric], title=title, **axis_settings)
        axis.title.set_fontsize(9)
        if chosen[0].metric == "accuracy":
            _cut_off(axis, {name: [_value(row) for row in chosen if row.cell.method == name] for name in found})
    labelled = dict(pair[::-1] for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    names = [*(name for name in COLOURS if name in labelled), *sorted(labelled.keys() - COLOURS.keys())]
    figure.legend([labelled[name] for name in names], names, loc="outside right upper", frameon=False, fontsize=7)
    return figure


def _figure(across: int, width: float, down: int = 1) -> tuple[Any, list[list[Any]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * across, 4.4 * down), layout="constrained")
    axes = [list(line) for line in figure.subplots(down, across, squeeze=False)]
    for axis in itertools.chain(*axes):
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _value(row: Row) -> float:
    value = row.test if row.test is not None else float("nan")
    return 100 * value if row.metric == "accuracy" else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
