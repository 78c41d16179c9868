"""A sparse model's weights on disk: one bit a weight, the values that are not zero, and the signs of the zeros.

A tensor of which at least half is zero becomes three in the safetensors file, and the metadata holds its shape:
`NAME:kept` (uint8, one bit a value in flat order, the lowest bit first), `NAME:values` (what is not zero, in order) and
`NAME:negative` (one bit a zero: a pruned negative weight is -0.0, and comes back so). At 90 % in fp32 that is a
sixth of the dense size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import replacing
from ..operands import FLOATING

FORMAT = "pst_kernels compressed"
PARTS = ("kept", "values", "negative")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # torch compares and writes these as bits alone; 0x80 is -0.0


def save_compressed(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict, such as that of a model after `merge_and_unload`, to a file, in one step."""
    from safetensors.torch import save_file  # needed for files alone, and so not by those who import the package

    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        flat = tensor.detach().cpu().contiguous().flatten()
        kept = _kept(flat)
        if kept is None or 2 * int(kept.sum()) > kept.numel() or not kept.numel():
            tensors[name] = flat.clone().view(tensor.shape)
            continue
        shapes[name] = list(tensor.shape)
        bits = flat.view(torch.uint8) if flat.dtype in FLOAT8 else flat
        negative = bits[~kept] != 0 if flat.dtype in FLOAT8 else torch.signbit(flat[~kept])
        parts = (_packed(kept), bits[kept].view(flat.dtype), _packed(negative))
        tensors |= {f"{name}:{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "shapes": json.dumps(shapes)})


def load_compressed(path: str | Path) -> dict[str, Tensor]:
    """The state dict that was saved, bit for bit, on the CPU.

    Raises FileNotFoundError when there is no file, ValueError when it is damaged or was written by something else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {path}; pass a file written by save_compressed")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("format") != FORMAT:
            raise ValueError("it is not of this format")
        for name, shape in json.loads(metadata["shapes"]).items():
            kept, values, negative = (tensors.pop(f"{name}:{part}") for part in PARTS)
            tensors[name] = _dense(name, math.prod(shape), kept, values, negative).view(shape)
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or foreign ({error}); write it again with save_compressed") from error
    return tensors


def _kept(flat: Tensor) -> Tensor | None:
    """Where a tensor is not zero (NaN is not); None for one that is stored as it is."""
    if flat.dtype in FLOAT8:
        return flat.view(torch.uint8) & 0x7F != 0
    return flat != 0 if flat.dtype in FLOATING else None


def _dense(name: str, numel: int, kept: Tensor, values: Tensor, negative: Tensor) -> Tensor:
    places = _unpacked(kept, numel)
    zeros = numel - len(values)
    if len(kept) != -(-numel // 8) or int(places.sum()) != len(values) or len(negative) != -(-zeros // 8):
        raise ValueError(f"{name} has {len(values)} values for {int(places.sum())} places")
    eight = values.dtype in FLOAT8
    dense = torch.zeros(numel, dtype=torch.uint8 if eight else values.dtype)
    dense[places] = values.view(dense.dtype)
    dense[torch.nonzero(~places)[_unpacked(negative, zeros)]] = 0x80 if eight else -0.0
    return dense.view(values.dtype)


def _packed(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))


def _unpacked(bits: Tensor, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little")).bool()
