"""Checked files: safetensors that say of every tensor what its bytes add up to, and a digest over all of them.

The metadata of a file holds, as JSON under `pst_kernels`, the shapes of the packed layers (see packed.py) and a CRC-32
of every tensor; the config of the folder holds the digest, so that a shard of another save is noticed too. All is
checked before anything is loaded.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .packed import WEIGHT, Shape

KEY = "pst_kernels"  # of the metadata
METHOD = "pst_kernels.hf"  # transformers names it where it is not known: the module to import
VERSION = 1
PIECE = 1 << 20  # bytes read at once
HINT = "import pst_kernels.hf before from_pretrained, or call pst_kernels.load_sparse(folder)"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    contents = {name: tensor.detach().contiguous().flatten().view(torch.uint8) for name, tensor in tensors.items()}
    return {name: _sum(t.dtype, t.shape, [contents[name].numpy()]) for name, t in tensors.items()}


def metadata(
    layers: Mapping[str, Shape], sums: Mapping[str, str], before: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Of a file; with what it had `before` it was packed.

    One entry, with a sum of its own: safetensors writes several in any order, and a model would make files of other
    bytes each time.
    """
    about: dict[str, Any] = {"layers": {name: list(shape) for name, shape in layers.items()}, "checksums": dict(sums)}
    if before is not None:
        about["before"] = dict(before)
    text = json.dumps(about, sort_keys=True)
    return {KEY: f"{_sum_of(text)} {text}"}


def read_metadata(metadata: Mapping[str, str] | None) -> tuple[dict[str, Shape], dict[str, str], dict[str, str]]:
    """Layers, checksums, and what the file had before it was packed. Raises ValueError where that is damaged."""
    total, _, text = (metadata or {}).get(KEY, "").partition(" ")
    if total != _sum_of(text):
        raise ValueError("its metadata are not those that were saved")
    about = json.loads(text)
    layers = {name: Shape(*fields) for name, fields in about["layers"].items()}
    return layers, about["checksums"], about.get("before", {"format": "pt"})


def entry(digest: str) -> dict[str, Any]:
    """The `quantization_config` of a folder."""
    return {"quant_method": METHOD, "version": VERSION, "digest": digest, "load_with": HINT}


def check_entry(given: Mapping[str, Any], where: str) -> str:
    """The digest of a `quantization_config`. Raises ValueError for one that is not of this version or damaged."""
    if given.get("quant_method") != METHOD:
        raise ValueError(f"{where} was not written by save_sparse; load it with transformers' from_pretrained")
    version, digest = given.get("version"), given.get("digest")
    if version != VERSION:
        raise ValueError(f"{where} has version {version!r}, this pst_kernels reads {VERSION}; update pst_kernels")
    if not isinstance(digest, str) or set(given) - {"quant_method", "version", "digest", "load_with"}:
        raise ValueError(f"{where} has a damaged quantization_config; save the folder again with save_sparse")
    return digest


class _Found(NamedTuple):
    """What the files hold."""

    sums: dict[str, str]
    sizes: dict[str, tuple[int, ...]]
    layers: dict[str, Shape]
    kept: dict[str, int]  # by the bits of each layer


def check(files: Sequence[str | Path], digest: str) -> dict[str, tuple[Shape, int]]:
    """Every packed layer's shape and number of kept weights or blocks.

    Raises ValueError for a file that is damaged, cut, or not part of this folder; nothing has been loaded then.
    """
    found = _Found({}, {}, {}, {})
    for path in files:
        try:
            _look(path, found)
        except Exception as error:  # whatever damaged JSON, shapes and tensors raise
            reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is damaged or foreign ({reason}); save the folder again") from error
    where = Path(files[0]).parent
    if digest_of(found.sums) != digest:
        raise ValueError(
            f"{where} lacks files, or holds some of another save: its tensors are not those that its config.json was"
            " written for; save the folder again"
        )
    for name, shape in found.layers.items():
        values, kept = found.sizes.get(f"{name}.{WEIGHT}"), found.kept.get(name)
        if kept is None or values != shape.values(kept):
            raise ValueError(
                f"{where} is damaged: the bits of {name} keep {kept} weights or blocks, but its values are {values};"
                " save the folder again"
            )
    return {name: (shape, found.kept[name]) for name, shape in found.layers.items()}


def _look(path: str | Path, found: _Found) -> None:
    """Check one file, read in pieces: of a mapped file every page that was touched would count as memory in use."""
    from safetensors import safe_open  # needed for files alone, and so not by those who import the package

    with safe_open(path, "pt") as file, open(path, "rb") as data:
        layers, sums, _ = read_metadata(file.metadata())
        bits = {f"{name}.{shape.bits}": name for name, shape in layers.items()}
        start = 8 + int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(start - 8))
        for tensor_name in file.keys():  # noqa: SIM118 (not a dict)
            empty, shape = _without_data(file, tensor_name), header[tensor_name]["shape"]
            begin, end = header[tensor_name]["data_offsets"]
            data.seek(start + begin)
            name = bits.get(tensor_name)
            if name is not None:
                content = np.frombuffer(data.read(end - begin), np.uint8)
                total = _sum(empty.dtype, shape, [content])
                found.kept[name] = layers[name].count(torch.from_numpy(content.copy()).view(empty.dtype).view(shape))
            else:
                total = _sum(empty.dtype, shape, _pieces(data, end - begin))
            if total != sums[tensor_name]:
                raise ValueError(f"the bytes of {tensor_name} are not those that were saved")
            if tensor_name in found.sums:
                raise ValueError(f"it holds {tensor_name}, as another file does")
            found.sums[tensor_name], found.sizes[tensor_name] = total, tuple(shape)
        found.layers.update(layers)


def _without_data(file: Any, name: str) -> Tensor:
    """A tensor of a file's dtype."""
    piece = file.get_slice(name)
    return piece[:0] if piece.get_shape() else file.get_tensor(name)


def _pieces(data: BinaryIO, size: int) -> Iterator[bytes]:
    for first in range(0, size, PIECE):
        yield data.read(min(PIECE, size - first))


def _sum(dtype: torch.dtype, shape: Iterable[int], pieces: Iterable[Any]) -> str:
    total = zlib.crc32(f"{dtype} {list(shape)}".encode())
    for piece in pieces:
        total = zlib.crc32(piece, total)
    return f"{total:08x}"


def _sum_of(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def digest_of(sums: Mapping[str, str]) -> str:
    return _sum_of(json.dumps(dict(sorted(sums.items()))))
