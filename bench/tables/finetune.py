"""The README's first table, from the results.json of `pst-kernels finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_kernels.files import read_json
from pst_kernels.finetune.lines import LINES, heading

from .table import replace_between

BEGIN, END = "<!-- finetune:begin -->", "<!-- finetune:end -->"


def _teacher(settings: dict[str, Any]) -> str:
    if not settings.get("hardness") or settings["method"] != "both":
        return ""
    return f", PST ({settings['preset']}) with the dense model as its teacher"


def markdown(results: dict[str, Any]) -> str:
    """One column a method, and under the table the conditions."""
    settings, machine, data = results["settings"], results["machine"], results["data"]
    rows, details = results["rows"], results["details"]
    lines = [
        f"| | {' | '.join(heading(row['method'], settings['sparsity']) for row in rows)} |",
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
        f" batches for both{_teacher(settings)}, seed {results['seed']}. Measured on CPU: {machine['processor']},"
        f" {machine['threads']} threads, fp32, torch {versions['torch']}, transformers"
        f" {versions['transformers']}, {results['date'][:10]}."
        " Zeros are counted in the saved file; memory is the process's own, Python and libraries included"
        f"{', that of PST also what asking the teacher takes' if _teacher(settings) else ''}."
    )
    return "\n".join([*lines, "", conditions])


def rewrite_readme(path: Path, results: Path) -> None:
    expected = "the results.json of `pst-kernels finetune`"
    replace_between(path, BEGIN, END, markdown(read_json(results, expected)))
