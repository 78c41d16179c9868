"""`pst-kernels convert DIR OUT`: a transformers folder with zeros into a packed one, or back, file by file.

No model is built with its data: its class on the meta device tells which tensors are linear layers' weights. Whoever
made the zeros, what is not zero stays bit for bit, and `--to dense` gives the first folder's tensors back. The signs of
zeros, where a weight has negative ones, lie in a file of their own that nothing else reads.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bypass import weights_read_past_their_layers
from ..files import read_json
from ..layers.checks import is_conv1d
from ..operands import FLOATING
from . import checked
from .classes import without_data
from .folder import INDEX, LEAST_ZEROS, WEIGHT_FILES, block_size, compact, mostly_zero, move_in, write_index
from .packed import WEIGHT, Shape, pack, unpack

logger = logging.getLogger("pst_kernels")
SIGNS = "negative_zeros.safetensors"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="a transformers folder with safetensors files")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--to", default="sparse", help="sparse (the default), block:B (block:64, say) or dense")


def main(options: argparse.Namespace) -> int:
    convert(options.directory, options.out, to=options.to)
    before, after = (sum(path.stat().st_size for path in weight_files(d)) for d in (options.directory, options.out))
    print(f"{options.out}: {after:,} bytes of weights, from {before:,}")
    return 0


def convert(directory: str | Path, out: str | Path, *, to: str = "sparse") -> None:
    """Pack the weights of a dense transformers folder that are zero at 40 % of their places or more, or unpack them.

    Raises ValueError or OSError before `out` is touched.
    """
    directory, out = Path(directory), Path(out)
    if out.resolve() == directory.resolve():
        raise ValueError(f"OUT must be another folder than {directory}")
    if to == "block":
        raise ValueError("to='block' needs a size; use 'block:64', say")
    block_size(to)
    config, files = read_json(directory / "config.json", "a transformers folder"), weight_files(directory)
    given = config.pop("quantization_config", None)
    if to != "dense" and given is not None:
        method = given.get("quant_method")
        raise ValueError(f"{directory} is quantised or packed already ({method}); use its dense form")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        target = Path(temporary)
        if to == "dense":
            digest = checked.check_entry(given or {}, str(directory))
            checked.check(files, digest)
            _write(target, _dense_files(directory, files))
        else:
            config["quantization_config"] = _pack(directory, files, target, to)
        _copy_others(directory, target, without=SIGNS if to == "dense" else "")
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        move_in(target, out)


Shard = tuple[str, dict[str, Tensor], dict[str, str]]  # a file's name, tensors and metadata


def weight_files(directory: Path) -> list[Path]:
    """The files of weights that transformers would load. Raises FileNotFoundError where there are none."""
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX, "an index of shards")
        files = [directory / name for name in sorted(set(index.get("weight_map", {}).values()))]
    else:
        files = [directory / "model.safetensors"]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; save the model with safetensors (save_pretrained) first")
    return files


def _pack(directory: Path, files: list[Path], target: Path, to: str) -> dict[str, Any]:
    """Write all files packed; the `quantization_config`."""
    linears = _linears(directory)
    sums: dict[str, str] = {}
    signs: dict[str, Tensor] = {}

    def shards() -> Iterator[Shard]:
        for path in files:
            tensors, metadata = _read(path)
            made, layers, its_signs = _packed(tensors, linears, to)
            its_sums = checked.checksums(made)
            sums.update(its_sums)
            signs.update(its_signs)
            yield path.name, made, checked.metadata(layers, its_sums, metadata)

    if not _write(target, shards()):
        raise ValueError(f"no linear layer of {directory} is zero at {LEAST_ZEROS:.0%} of its places; prune it first")
    if signs:
        from safetensors.torch import save_file

        save_file(signs, target / SIGNS)
    return checked.entry(checked.digest_of(sums))


def _packed(
    tensors: dict[str, Tensor], linears: Mapping[str, nn.Module], to: str
) -> tuple[dict[str, Tensor], dict[str, Shape], dict[str, Tensor]]:
    made: dict[str, Tensor] = {}
    layers: dict[str, Shape] = {}
    signs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, dot, part = name.rpartition(".")
        packed = None
        if part == WEIGHT and tensor.dim() == 2 and tensor.dtype in FLOATING and mostly_zero(tensor):
            kind: Any = linears.get(layer)
            if kind is None or kind.weight.shape != tensor.shape:
                logger.warning("%s stays dense: it has zeros, but is no weight of a linear layer", name)
            else:
                kind.weight = nn.Parameter(tensor, requires_grad=False)
                packed = compact(kind, layer, to, block_size(to))
                kind.weight = nn.Parameter(tensor.to("meta"), requires_grad=False)
        if packed is None:
            made[name] = tensor
            continue
        made |= {f"{layer}{dot}{key}": value for key, value in pack(packed).items()}
        layers[layer] = Shape.of(packed, is_conv1d(kind))
        negative = torch.signbit(tensor) & (tensor == 0)
        if bool(negative.any()):
            signs[name] = torch.from_numpy(np.packbits(negative.flatten().numpy(), bitorder="little"))
    return made, layers, signs


def _linears(directory: Path) -> dict[str, nn.Module]:
    """The linear layers of the model that the config names, without data, by their names in files.

    Without those that are tied, or whose weights its code reads past them.
    """
    model = without_data(directory)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    bypassed = weights_read_past_their_layers(model)
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = f"{name}.{WEIGHT}"
        linear = type(module) is nn.Linear or is_conv1d(module)
        if linear and name not in bypassed and weight not in {*tied, *tied.values()}:
            found[name] = module
    prefix = f"{model.base_model_prefix}."  # files of a base model's own class go without
    return {name.removeprefix(prefix): module for name, module in found.items()} | found


def _dense_files(directory: Path, files: list[Path]) -> Iterator[Shard]:
    signs, _ = _read(directory / SIGNS) if (directory / SIGNS).is_file() else ({}, {})
    halves: dict[str, Tensor] = {}  # values and bits of layers, which may lie in two files
    layers: dict[str, Shape] = {}
    for path in files:
        tensors, metadata = _read(path)
        its_layers, _, before = checked.read_metadata(metadata)
        layers |= its_layers
        for layer, shape in list(layers.items()):
            weight, bits = f"{layer}.{WEIGHT}", f"{layer}.{shape.bits}"
            halves |= {name: tensors.pop(name) for name in (weight, bits) if name in tensors}
            if weight in halves and bits in halves:
                tensors[weight] = unpack(shape, halves.pop(weight), halves.pop(bits))
                del layers[layer]
                if weight in signs:
                    _negate(tensors[weight], signs[weight])
        yield path.name, tensors, before


def _negate(weight: Tensor, signs: Tensor) -> None:
    """Make zeros negative."""
    flags = np.unpackbits(signs.numpy(), count=weight.numel(), bitorder="little")
    weight.view(-1)[torch.from_numpy(flags).bool()] = -0.0


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _write(target: Path, shards: Iterator[Shard]) -> bool:
    """Files, and an index where there are several; whether any holds packed layers."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    size, numbers, any_packed = 0, 0, False
    names = []
    for name, tensors, metadata in shards:
        save_file(tensors, target / name, metadata)
        names.append(name)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        numbers += sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
        any_packed |= checked.KEY in metadata and bool(checked.read_metadata(metadata)[0])
    if names != ["model.safetensors"]:
        write_index(target / INDEX, {"total_parameters": numbers, "total_size": size}, weight_map)
    return any_packed


def _copy_others(directory: Path, target: Path, without: str) -> None:
    """All that is neither weights nor config: tokenizer, generation config, text."""
    for path in sorted(directory.iterdir()):
        if path.name in ("config.json", without) or WEIGHT_FILES.fullmatch(path.name) or (target / path.name).exists():
            continue
        if path.suffix in OTHER_WEIGHTS:
            logger.warning("%s is not copied: it holds weights in another form", path.name)
        elif path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)
