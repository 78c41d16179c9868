"""`python -m bench export`: how large a sparse model is on disk in each format, against the dense file.

The model is the MiniLM of the demo, its blocks' linear layers pruned by magnitude (PST before its first step; sizes
follow from counts, not from which weights are kept). Every file is written, loaded back, and compared bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pst_kernels as pst
from pst_kernels.export.compressed import load_compressed, save_compressed
from pst_kernels.finetune import models
from pst_kernels.finetune.settings import Settings
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear

from ..tables.report import Report, measured_on

State = dict[str, Tensor]
COMPRESSED, BLOCKS = "compressed", "kept blocks"
FILES = (
    ("unstructured", 0.9, COMPRESSED),
    ("block:32", 0.9, COMPRESSED),
    ("block:32", 0.9, BLOCKS),
    ("2:4", 0.5, COMPRESSED),
)
LABELS = ("a", "b", "c", "d", "e")


@dataclass
class Row:
    """Sizes of files in bytes. The pruned part is the weights of the pruned layers."""

    pattern: str
    sparsity: float
    format: str
    pruned_part: int
    pruned_part_dense: int
    model: int
    model_dense: int
    same_bits: bool  # what was loaded equals what was saved, in every bit

    @property
    def ratio(self) -> float:
        return self.pruned_part / self.pruned_part_dense


def _cells(row: Row) -> list[str]:
    def megabytes(value: int) -> str:
        return f"{value / 1e6:.1f}"

    return [
        row.pattern, row.format, f"{100 * row.sparsity:g} %", megabytes(row.pruned_part),
        megabytes(row.pruned_part_dense), f"{row.ratio:.3f}", megabytes(row.model), megabytes(row.model_dense),
        "yes" if row.same_bits else "NO",
    ]  # fmt: skip


REPORT = Report(
    "export", Row, "files of a sparse MiniLM",
    ("pattern", "file", "pruned", "pruned layers, MB", "dense, MB", "ratio", "whole model, MB", "dense, MB",
     "same bits"),
    _cells,
    lambda under: (
        "MiniLM (6 layers, 384 wide), fp32, its blocks pruned by magnitude; safetensors files, each loaded back and"
        f" compared bit for bit. {measured_on(under)}"
    ),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    REPORT.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """0 if every file loaded back bit for bit, else 1."""
    transformers.logging.set_verbosity_error()  # it warns that the head is new
    transformers.logging.disable_progress_bar()
    rows = REPORT.run(options, lambda: [measure(*file) for file in FILES])
    return int(not all(row.same_bits for row in rows))


def measure(pattern: str, sparsity: float, format: str) -> Row:
    """Write the files of a pruned MiniLM, and load the sparse one back."""
    model = _minilm(pattern, sparsity)
    names = [name for name, module in model.named_modules() if isinstance(module, pst.PSTLinear)]
    model = pst.merge_and_unload(model, format="bsr" if format == BLOCKS else "dense")
    state, part = model.state_dict(), _parts(model, names)
    if format == BLOCKS:
        twin = pst.merge_and_unload(_minilm(pattern, 0.5), format="bsr")
        twin.load_state_dict(_round_trip(state, format))
        loaded = twin.state_dict()
        state_dense = pst.merge_and_unload(_minilm(pattern, sparsity)).state_dict()
    else:
        loaded, state_dense = _round_trip(state, format), state
    dense = {f"{name}.weight": state_dense[f"{name}.weight"] for name in names}
    return Row(
        pattern, sparsity, format, _size(part, format), _size(dense, None), _size(state, format),
        _size(state_dense, None), _same_bits(state, loaded),
    )  # fmt: skip


def _minilm(pattern: str, sparsity: float) -> nn.Module:
    model = models.load_model(Settings(), LABELS)
    return pst.replace_linear(model, pst.PSTConfig(pattern=pattern, sparsity=sparsity))


def _parts(model: nn.Module, names: Sequence[str]) -> State:
    """What stands for the weights of these layers."""
    state: State = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        parts = ("weight", "crow_indices", "col_indices") if isinstance(layer, BlockSparseLinear) else ("weight",)
        state |= {f"{name}.{part}": getattr(layer, part).detach() for part in parts}
    return state


def _write(state: State, path: Path, format: str | None) -> None:
    if format == COMPRESSED:
        save_compressed(state, path)
    else:
        save_file(state, path)


def _size(state: State, format: str | None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        _write(state, Path(folder, "file"), format)
        return Path(folder, "file").stat().st_size


def _round_trip(state: State, format: str) -> State:
    with tempfile.TemporaryDirectory() as folder:
        _write(state, Path(folder, "file"), format)
        return (load_compressed if format == COMPRESSED else load_file)(Path(folder, "file"))


def _same_bits(one: State, other: State) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().flatten().view(torch.uint8)

    return one.keys() == other.keys() and all(
        t.dtype == other[name].dtype and t.shape == other[name].shape and torch.equal(bits(t), bits(other[name]))
        for name, t in one.items()
    )
