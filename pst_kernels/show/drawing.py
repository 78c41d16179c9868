"""A folder's table and picture: one row a layer in both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..files import save_figure
from .reading import STEPS, Folder, Layer

BINS = 160
TAIL = 0.002  # share of a layer's numbers, at either end, that need not fit into the picture


def print_table(folder: Folder) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=escape(f"Zeros of {folder.path} ({folder.kind})"), show_footer=True)
    rows = [_cells(layer, folder) for layer in folder.layers]
    footer = dict.fromkeys(rows[0], "") | _total(folder.layers)
    for name in rows[0]:
        table.add_column(name, footer[name], justify="left" if name == "layer" else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print(f"{folder.bytes:,} bytes in all its files of weights.", style="dim")
    for note in folder.notes:
        console.print(note, style="dim", markup=False)


def _cells(layer: Layer, folder: Folder) -> dict[str, str]:
    shape = " x ".join(map(str, layer.shape))
    cells = {
        "layer": layer.name or "(the model)", "out x in": shape, "zeros": f"{layer.zeros:,}",
        "share": f"{layer.zeros / math.prod(layer.shape):.1%}", "empty rows": f"{layer.empty_rows:,}",
        "empty columns": f"{layer.empty_columns:,}", "bytes": f"{layer.bytes:,}",
    }  # fmt: skip
    if any(other.threshold is not None for other in folder.layers):
        cells["threshold"] = "" if layer.threshold is None else f"{layer.threshold:.4g}"
    return cells


def _total(layers: Sequence[Layer]) -> dict[str, str]:
    zeros, places = sum(layer.zeros for layer in layers), sum(math.prod(layer.shape) for layer in layers)
    return {
        "layer": f"{len(layers)} layers", "zeros": f"{zeros:,}", "share": f"{zeros / places:.1%}",
        "empty rows": f"{sum(layer.empty_rows for layer in layers):,}",
        "empty columns": f"{sum(layer.empty_columns for layer in layers):,}",
        "bytes": f"{sum(layer.bytes for layer in layers):,}",
    }  # fmt: skip


def draw(folder: Folder, path: Path) -> None:
    """Panels with an axis of layers in common: zeros, histograms where there is anything to measure, empty lines,
    bytes.
    """
    from matplotlib.figure import Figure  # not pyplot, whose backend belongs to the caller

    layers = folder.layers
    measured = any(layer.quantiles is not None for layer in layers)
    widths = [3, *([5] if measured else []), 2, 2]
    height = min(max(0.22 * len(layers) + 1.6, 3.0), 60.0)
    figure = Figure(figsize=(sum(widths) + 2, height), layout="constrained")
    axes = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    first, *middle, lines, sizes = axes
    places = np.arange(len(layers))
    numbers = [math.prod(layer.shape) for layer in layers]
    first.barh(places, [100 * layer.zeros / count for layer, count in zip(layers, numbers, strict=True)])
    first.set(xlim=(0, 100), xlabel="zeros, %", ylim=(len(layers) - 0.5, -0.5))
    first.set_yticks(places, _short([layer.name for layer in layers]), fontsize=7)
    if measured:
        _draw_histograms(middle[0], folder)
    rows = [100 * layer.empty_rows / math.prod(layer.shape[:-1]) for layer in layers]
    columns = [100 * layer.empty_columns * layer.shape[-2] / math.prod(layer.shape) for layer in layers]
    lines.barh(places - 0.2, rows, 0.4, label="rows")
    lines.barh(places + 0.2, columns, 0.4, label="columns")
    lines.set(xlabel="empty, %", xlim=(0, 1.05 * max(1.0, *rows, *columns)))
    lines.legend(fontsize=7)
    sizes.barh(places, [layer.bytes / 1e3 for layer in layers], color="tab:gray")
    sizes.set(xlabel="on disk, kB")
    figure.suptitle(f"{folder.path.resolve().name} ({folder.kind}): {folder.bytes / 1e6:,.3g} MB", fontsize=9)
    save_figure(figure, path)


def _draw_histograms(axes: Any, folder: Folder) -> None:
    """One row a layer, as dark as there are numbers, and a stroke at its threshold."""
    spread = [layer.quantiles for layer in folder.layers if layer.quantiles is not None]
    tail = round(TAIL * STEPS)
    low, high = min(float(q[tail]) for q in spread), max(float(q[-1 - tail]) for q in spread)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    image = np.stack([histogram(layer.quantiles, edges) for layer in folder.layers])
    image /= np.maximum(image.max(1, keepdims=True), 1e-12)
    axes.imshow(image, aspect="auto", cmap="Blues", extent=(low, high, len(image) - 0.5, -0.5), interpolation="nearest")
    known = [(layer.threshold, place) for place, layer in enumerate(folder.layers) if layer.threshold is not None]
    if known:
        thresholds, places = np.array(known).T
        axes.vlines(thresholds, places - 0.5, places + 0.5, color="tab:red", label="threshold")
        axes.legend(fontsize=7)
    axes.set(xlabel=folder.measured, xlim=(low, high))


def histogram(quantiles: np.ndarray | None, edges: np.ndarray) -> np.ndarray:
    """Which share of the numbers lies in each bin, of their quantiles; zeros where these are unknown."""
    if quantiles is None:
        return np.zeros(len(edges) - 1)
    shares = np.linspace(0, 1, len(quantiles))
    return np.diff(np.interp(edges, quantiles, shares, left=0.0, right=1.0))


def _short(names: Sequence[str]) -> list[str]:
    """Without the modules that all lie in."""
    parts = [name.split(".") for name in names]
    heads = zip(*(part[:-1] for part in parts), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda head: len(set(head)) == 1, heads)) if len(names) > 1 else 0
    return [".".join(part[common:]) for part in parts]
