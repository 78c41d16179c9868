"""The lines of the table that compares two runs, for the terminal and for the README; needs nothing but Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Number = Callable[[dict[str, Any], dict[str, Any]], str]  # of a run's row and its details

LINES: dict[str, Number] = {
    "test accuracy": lambda row, more: f"{100 * row['test_accuracy']:.2f} %",
    "zeros in the pruned layers": lambda row, more: f"{100 * row['zeros_pruned']:.2f} %",
    "zeros in the whole model": lambda row, more: f"{100 * row['zeros_model']:.2f} %",
    "trainable parameters": lambda row, more: f"{row['trainable']:,}",
    "of the model": lambda row, more: f"{100 * more['trainable_of_model']:.2f} %",
    "of what movement pruning trains": lambda row, more: f"{100 * more['trainable_of_movement']:.2f} %",
    "median training step": lambda row, more: f"{row['step_ms']:,.0f} ms",
    "forward of 16 texts, saved model": lambda row, more: _forward(row, more),
    "peak memory of the process": lambda row, more: f"{row['peak_mb']:,.0f} MB",
    "before the model was loaded": lambda row, more: f"{more['memory_before_model_mb']:,.0f} MB",
    "checkpoint": lambda row, more: f"{row['checkpoint_mb']:.1f} MB",
    "folder of the whole model": lambda row, more: f"{row['folder_mb']:.1f} MB" if "folder_mb" in row else "-",
}


def _forward(row: dict[str, Any], more: dict[str, Any]) -> str:
    """With its share of the dense model's in the same rounds, where both ran."""
    if "inference_ms" not in row:
        return "-"
    times = more["inference"]
    share = f" ({times['this'] / times['dense']:.2f} of dense)" if "dense" in times else ""
    return f"{row['inference_ms']:,.0f} ms{share}"


def heading(method: str, sparsity: float) -> str:
    return "dense" if method == "dense" else f"PST, {100 * sparsity:g} %"
