"""The README's sentences that hold measured figures, from the results files that hold these."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from pst_kernels.files import read_json

from ..speed import serve
from . import rows as results

WIDTH = 124
LANGUAGE_MODEL = "Llama-3.2-1B"
DEVICE, SHORT_NAME = "nvidia-h100-80gb-hbm3", "H100"
DENSE, OURS = "dense", "PST"
LARGE, LARGE_WEIGHT, MANY = "Llama-8B", 4096**2, 4096  # cases, numbers, tokens
BLOCKS, FIXED = "PST, block:64, between masks", "PST, mask fixed"


def sentences(folder: Path) -> dict[str, str]:
    """By the name of their markers, in lines of the README's width."""
    return {
        name: "\n".join(textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False))
        for name, text in {"decoding": _decoding(folder), "on-a-gpu": _on_a_gpu(folder)}.items()
    }


def _decoding(folder: Path) -> str:
    rows, under = serve.REPORT.read(folder / "serve.json")
    by_kind = {(row.what, row.sparsity): row for row in rows if row.model == LANGUAGE_MODEL and row.batch == 1}
    half, most, blocks = (by_kind[kind] for kind in (("sparse", 0.5), ("sparse", 0.9), ("block:64", 0.9)))
    whole = _megabytes(by_kind[DENSE, 0.0])
    sizes = [f"{_megabytes(row) / whole:.2f}" for row in (half, most, blocks)]
    return (
        f"On {under['threads']} CPU cores a language model of {LANGUAGE_MODEL}'s shapes decodes {half.ratio:.1f} times"
        f" as fast as dense with half of its blocks' weights gone and {most.ratio:.1f} times with 90 %,"
        f" {blocks.ratio:.1f} times with whole blocks of 64, from files of {sizes[0]}, {sizes[1]} and {sizes[2]}"
        " of the size ([decoding](docs/performance.md#decoding-with-a-sparse-language-model))."
    )


def _megabytes(row: serve.Row) -> float:
    if row.disk_mb is None:
        raise ValueError(f"{row.model}, {row.what}: serve.json has no size of its files; run `python -m bench serve`")
    return row.disk_mb


def _on_a_gpu(folder: Path) -> str:
    own = folder / "gpu" / DEVICE
    captured = read_json(own / "captured.json", "the results of `make gpu`")["rows"]
    ratios = {(row["case"], row["contestant"]): row["ratio"] for row in captured}
    steps, fixed = (
        [r for (case, name), r in ratios.items() if name == one and "step" in case] for one in (OURS, FIXED)
    )
    model = [ratios[case, name] for case, name in ratios if name in (OURS, FIXED) and case.startswith("model")]
    blocks = [
        ratio for (case, name), ratio in ratios.items()
        if name == BLOCKS and LARGE in case and int(case.partition("T = ")[2].partition(",")[0]) >= MANY
    ]  # fmt: skip
    decoding = read_json(own / "decoding.json", "the results of `make gpu`")["rows"]
    fastest = max(row["ratio"] for row in decoding if row["what"] == "sparse" and row["sparsity"] == 0.9)
    eager = [row.ratio for row in results.read_csv(own / "benchmark.csv") if _is_small_step(row) and row.ratio]
    return (
        f"On a GPU unstructured zeros save memory, not time: on an {SHORT_NAME} a step takes {_range(_memory(own))} of"
        f" dense's memory, and as a CUDA graph {_range(steps)} times its time for one layer while the mask moves,"
        f" {_range(fixed)} once it is fixed, {_range(model)} for MiniLM as a whole."
        f' `pattern="block:64"` prunes whole blocks, which the products skip: {_range(blocks)} of dense\'s'
        f" step for layers of 8B models from {MANY:,} tokens on. Decoding with 90 % zeros has at best {fastest:.2f} of"
        f" dense's speed there. Launched one by one from Python, small layers take {_range(eager)} times dense's time"
        " ([all of it](docs/performance.md#on-a-gpu))."
    )


def _range(found: Iterable[float]) -> str:
    texts = [f"{value:.2f}" for value in sorted(found)]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _is_ours(row: results.Row) -> bool:
    return row.provider.startswith(f"{OURS} (")  # and the backend


def _is_small_step(row: results.Row) -> bool:
    return row.mode == "step" and _is_ours(row) and row.in_features * row.out_features < LARGE_WEIGHT


def _memory(folder: Path) -> list[float]:
    """Of every step that was measured for both, a whole model's too."""
    measured = [row for row in results.read_csv(folder / "benchmark.csv") if row.mode in ("step", "model")]
    dense = {(row.shape, row.tokens, row.dtype): row.memory_bytes for row in measured if row.provider == DENSE}
    pairs = [
        (row.memory_bytes, dense.get((row.shape, row.tokens, row.dtype)))
        for row in measured if _is_ours(row)
    ]  # fmt: skip
    return [own / its for own, its in pairs if own and its]
