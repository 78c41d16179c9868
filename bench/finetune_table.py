"""The README's first table, from the results.json of `pst-kernels finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_kernels.files import read_json

from .table import replace_between

BEGIN, END = "<!-- finetune:begin -->", "<!-- finetune:end -->"
LINES = {
    "test accuracy": lambda row, more: f"{100 * row['test_accuracy']:.1f} %",
    "zeros in the pruned layers": lambda row, more: f"{100 * row['zeros_pruned']:.2f} %",
    "zeros in the whole model": lambda row, more: f"{100 * row['zeros_model']:.1f} %",
    "trainable parameters": lambda row, more: f"{row['trainable']:,}",
    "of the model": lambda row, more: f"{100 * more['trainable_of_model']:.2f} %",
    "of what movement pruning trains": lambda row, more: f"{100 * more['trainable_of_movement']:.2f} %",
    "median training step": lambda row, more: f"{row['step_ms']:,.0f} ms",
    "peak memory of the process": lambda row, more: f"{row['peak_mb']:,.0f} MB",
    "before the model was loaded": lambda row, more: f"{more['memory_before_model_mb']:,.0f} MB",
    "checkpoint": lambda row, more: f"{row['checkpoint_mb']:.1f} MB",
}


def markdown(results: dict[str, Any]) -> str:
    """One column a method, and under the table the conditions."""
    settings, machine, data = results["settings"], results["machine"], results["data"]
    names = {"dense": "dense", "pst": f"PST, {100 * settings['sparsity']:g} %"}
    rows, details = results["rows"], results["details"]
    lines = [
        f"| | {' | '.join(names[row['method']] for row in rows)} |",
        f"| --- |{' ---: |' * len(rows)}",
        *(
            f"| {name} | {' | '.join(text(row, details[row['method']]) for row in rows)} |"
            for name, text in LINES.items()
        ),
    ]
    versions = results["versions"]
    conditions = (
        f"MiniLM (6 layers, 384 wide) on BBC News, {data['train']:,} articles for training and {data['test']:,} for the"
        f" test; {settings['steps']} steps of {settings['batch_size']} x {settings['max_length']} tokens, the same"
        f" batches for both, seed {results['seed']}. Measured on CPU: {machine['processor']}, {machine['threads']}"
        f" threads, fp32, torch {versions['torch']}, transformers {versions['transformers']}, {results['date'][:10]}."
        " Zeros are counted in the saved file; memory is the process's own, Python and libraries included."
    )
    return "\n".join([*lines, "", conditions])


def rewrite_readme(path: Path, results: Path) -> None:
    expected = "the results.json of `pst-kernels finetune`"
    replace_between(path, BEGIN, END, markdown(read_json(results, expected)))
