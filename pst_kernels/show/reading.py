"""What a saved folder holds of each pruned layer: zeros, empty rows and columns, bytes, and the spread of its numbers.

Of a folder one layer is dense in memory at a time, of an adapter with its base model all pruned layers are. Of a folder
of `save_sparse` every checksum is compared first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from ..checkpoint import ADAPTER_NAME, check_mask, compare_base, read_adapter
from ..config import PSTConfig
from ..export import checked
from ..export.classes import possible_names, without_data
from ..export.convert import weight_files
from ..export.packed import WEIGHT, unpack
from ..files import read_json
from ..functional import scores as scores_of
from ..layers.checks import is_conv1d
from ..layers.fisher import MOMENTS
from ..layers.pst_layer import FACTORS
from ..masks.packing import unpack_mask
from ..masks.patterns import Unstructured, parse
from ..operands import FLOATING, Factors
from ..weighing import weighed

STEPS = 1000  # from the smallest number of a layer to its largest, in equal shares of them
MAGNITUDES, SCORES = "|weight| of what is not zero", "score"


class Layer(NamedTuple):
    """Rows are outputs and columns inputs, also of a Conv1D; each expert has its own."""

    name: str
    shape: tuple[int, ...]  # (out, in), or (experts, out, in)
    zeros: int
    empty_rows: int
    empty_columns: int
    bytes: int  # of its tensors in the files, bias included
    quantiles: np.ndarray | None = None  # STEPS + 1 of them; None where there is nothing to measure
    threshold: float | None = None  # the largest of the `zeros` smallest scores


class Folder(NamedTuple):
    path: Path
    kind: str
    layers: list[Layer]
    bytes: int  # of all files of weights
    measured: str  # what the quantiles are of
    notes: list[str]


def look(directory: str | Path, base: str | Path | None = None) -> Folder:
    """All about a folder of `save_sparse`, an adapter of `save_pretrained`, or a dense transformers folder with zeros.

    An adapter's scores need its base model: a dense transformers folder with safetensors files. Raises
    FileNotFoundError or ValueError, which name what is wrong with the folder.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file; give the folder that it lies in" if directory.exists() else "does not exist; give a folder"
        raise FileNotFoundError(f"{directory} {what}")
    if (directory / ADAPTER_NAME).is_file():
        return _adapter(directory, Path(base) if base is not None else None)
    if base is not None:
        raise ValueError(f"--model is for adapters, but {directory} has no {ADAPTER_NAME}; leave --model out")
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} has neither {ADAPTER_NAME} nor config.json; give a folder that save_sparse or save_pretrained"
            " has written"
        )
    given = read_json(directory / "config.json", "a transformers folder").get("quantization_config")
    return _dense(directory) if given is None else _packed(directory, given)


class _Tensors:
    """The tensors of some files, each read when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.place: dict[str, Path] = {}
        self.of_owner: dict[str, list[str]] = {}
        self.bytes = sum(path.stat().st_size for path in files)
        for path in files:
            with _opened(path) as file:
                self.place |= dict.fromkeys(file.keys(), path)
        for name in self.place:
            self.of_owner.setdefault(name.rpartition(".")[0], []).append(name)

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.place[name]) as file:
            return file.get_tensor(name)

    def bytes_of(self, layer: str) -> int:
        return sum(self[name].nbytes for name in self.of_owner[layer])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save the folder again") from error


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10; files hold names in the order of their letters."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _packed(directory: Path, given: dict[str, Any]) -> Folder:
    files = weight_files(directory)
    shapes = checked.check(files, checked.check_entry(given, str(directory)))
    tensors = _Tensors(files)
    layers = []
    for name in sorted(shapes, key=_in_order):
        shape, _ = shapes[name]
        weight = unpack(shape, tensors[f"{name}.{WEIGHT}"], tensors[f"{name}.{shape.bits}"])
        layers.append(_of_weight(name, weight.T if shape.transposed else weight, tensors.bytes_of(name)))
    notes = ["Layers that are stored dense, experts among them, are not shown."]
    return Folder(directory, "sparse folder", layers, tensors.bytes, MAGNITUDES, notes)


def _dense(directory: Path) -> Folder:
    tensors, model = _Tensors(weight_files(directory)), without_data(directory)
    layers, whole = [], 0
    for name, module in _linears(model):
        saved = _saved_name(name, model, tensors)
        if saved is None or (weight := tensors[f"{saved}.{WEIGHT}"]).dtype not in FLOATING:
            continue  # tied to another tensor, or quantised
        if bool((weight == 0).any()):
            layers.append(_of_weight(name, weight.T if is_conv1d(module) else weight, tensors.bytes_of(saved)))
        else:
            whole += 1
    if not layers:
        raise ValueError(f"no linear layer of {directory} has a zero; give a folder of a pruned model, or an adapter")
    notes = [f"Linear layers without a zero, which are not shown: {whole}."] if whole else []
    if any("experts" in name and parameter.dim() == 3 for name, parameter in model.named_parameters()):
        notes.append("Experts are shown of adapters alone.")
    return Folder(directory, "dense folder", layers, tensors.bytes, MAGNITUDES, notes)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear or is_conv1d(module):
            yield name, module


def _saved_name(name: str, model: Any, tensors: _Tensors) -> str | None:
    """A layer's name in files, which hold a base model with the prefix of its larger classes or without it."""
    return next((n for n in possible_names(model, name) if f"{n}.{WEIGHT}" in tensors.place), None)


def _of_weight(name: str, weight: Tensor, size: int) -> Layer:
    """Of a dense (out, in) weight."""
    kept = weight != 0
    return _of_mask(name, kept, size)._replace(quantiles=_quantiles(weight[kept].abs()))


def _of_mask(name: str, kept: Tensor, size: int) -> Layer:
    """Of a bool mask (out, in) or (experts, out, in)."""
    empty_rows, empty_columns = (int((~kept.any(axis)).sum()) for axis in (-1, -2))
    return Layer(name, tuple(kept.shape), int((~kept).sum()), empty_rows, empty_columns, size)


def _quantiles(values: Tensor) -> np.ndarray | None:
    """Of the finite ones."""
    ordered = np.sort(values.float().flatten().numpy())
    ordered = ordered[np.isfinite(ordered)]
    return ordered[np.linspace(0, len(ordered) - 1, STEPS + 1).round().astype(int)] if len(ordered) else None


def _adapter(directory: Path, base: Path | None) -> Folder:
    path = directory / ADAPTER_NAME
    tensors, config = read_adapter(path)
    names = [name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] == "pst_mask"]
    masks = {}
    for name in sorted(names, key=_in_order):
        try:
            masks[name] = _mask(name, tensors, config, path)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is damaged at {name}: {error}; save the checkpoint again") from error
    layers = [
        _of_mask(name, mask, sum(t.nbytes for key, t in tensors.items() if key.rpartition(".")[0] == name))
        for name, mask in masks.items()
    ]
    folder = Folder(directory, "adapter", layers, path.stat().st_size, "", [])
    if base is None:
        return folder._replace(notes=["Scores need the base model: --model BASE."])
    linears = [layer for layer in layers if len(layer.shape) == 2]
    weights = _base_weights(base, linears)
    has_threshold = type(parse(config.pattern)) is Unstructured
    notes = [] if has_threshold else [f"pattern={config.pattern!r} has no threshold of single scores."]
    if len(linears) == len(layers):
        compare_base(weights, path)
    else:
        notes.append("The scores of experts are not shown.")
    stale = 0
    for place, layer in enumerate(layers):
        if layer.name not in weights:
            continue
        weight, factors = weights[layer.name], Factors(*(tensors[_entry(layer.name, factor)] for factor in FACTORS))
        if config.magnitude == "fisher":
            weight, factors = weighed(weight, factors, tensors[_entry(layer.name, MOMENTS)])
        scores = scores_of(weight, *factors, beta=config.beta, alpha1=config.alpha1, alpha2=config.alpha2)
        threshold = _smallest(scores, layer.zeros) if has_threshold and layer.zeros else None
        stale += threshold is not None and bool((scores[~masks[layer.name]] > threshold).any())
        layers[place] = layer._replace(quantiles=_quantiles(scores), threshold=threshold)
    if stale:
        notes.append(f"Masks of an earlier step than their scores, or fixed: {stale}.")
    return folder._replace(measured=SCORES, notes=notes)


def _smallest(scores: Tensor, count: int) -> float:
    """The largest of the `count` smallest."""
    return float(np.partition(scores.flatten().numpy(), count - 1)[count - 1])


def _entry(name: str, what: str) -> str:
    return f"{name}.{what}" if name else what


def _mask(name: str, tensors: dict[str, Tensor], config: PSTConfig, path: Path) -> Tensor:
    """bool, in the shape of the weight."""
    packed, columns = tensors[_entry(name, "pst_mask")], tensors[_entry(name, "pst_V")].shape[-1]
    check_mask(name, columns, parse(config.pattern), packed, int(tensors[_entry(name, "pst_num_pruned")]), path)
    return unpack_mask(packed.flatten(0, -2), columns).view(*packed.shape[:-1], columns)


def _base_weights(base: Path, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """By layer: its weight in the base model, (out, in)."""
    if not base.is_dir():
        raise FileNotFoundError(f"--model {base} is not a folder; give that of the base model")
    if "quantization_config" in read_json(base / "config.json", "a transformers folder"):
        raise ValueError(f"--model {base} is quantised or packed; give the dense model that the adapter was trained on")
    tensors, model = _Tensors(weight_files(base)), without_data(base)
    kinds = dict(_linears(model))
    prefix = f"{model.base_model_prefix}."
    found = {}
    for layer in layers:
        saved = _saved_name(layer.name, model, tensors)
        kind = kinds.get(layer.name) or kinds.get(layer.name.removeprefix(prefix)) or kinds.get(prefix + layer.name)
        weight = None
        if saved is not None and kind is not None:
            weight = tensors[f"{saved}.{WEIGHT}"]
            weight = weight.T if is_conv1d(kind) else weight
        if weight is None or tuple(weight.shape) != layer.shape:
            raise ValueError(
                f"--model {base} is not this adapter's base model: it has no layer {layer.name} of shape {layer.shape}"
            )
        found[layer.name] = weight
    return found
