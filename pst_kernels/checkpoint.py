"""Adapter checkpoints: the factors, the packed masks and the modules to save, without the base model.

A checkpoint is a directory with `pst_adapter.safetensors`, which is complete in itself (its metadata holds the config),
and `pst_config.json`, the same config for people and for `PSTConfig.from_pretrained`. Each file is replaced in one
step, so a process killed while saving leaves the previous checkpoint usable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import PSTConfig
from .files import replacing
from .layers.averages import fits
from .layers.checks import is_conv1d, refuse_meta, whole
from .layers.embedding import PSTEmbedding, word_shapes
from .layers.experts import ExpertWeights, PSTExperts
from .layers.fisher import MOMENTS
from .layers.pst_layer import FACTORS, PSTLayer
from .layers.resting import KEPT
from .masks.packing import packed_width
from .masks.patterns import Pattern, parse
from .model import get_config, modules_to_save, pst_layers, replace_linear
from .operands import factor_shapes
from .targets import find_targets
from .words import find_words

logger = logging.getLogger("pst_kernels")
ADAPTER_NAME = "pst_adapter.safetensors"
FORMAT, VERSION = "pst_kernels", "1"
WHOLE_NUMBERS = {"pst_mask": torch.int32, "pst_num_pruned": torch.int64, "pst_frozen": torch.uint8}
RELEASED_NAMES = {
    "weight_U": "pst_U", "weight_V": "pst_V", "mask_scores_A": "pst_A",
    "mask_scores_B": "pst_B", "mask_scores_R": "pst_R", "mask_scores_C": "pst_C",
}  # fmt: skip


def save_pretrained(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter checkpoint of a converted model into a directory, which is made if need be.

    Saved are the factors, masks and pruned counts of every PST layer, the modules to save (the head, say) with their
    buffers, and whatever else is trainable. Of a model sharded over processes every process must call this; each
    gathers and writes the same files. Raises ValueError when the model has no PST layers.
    """
    from safetensors.torch import save_file  # needed for files alone, and so not by those who import the package

    config = _saved_config(model)
    layers = dict(pst_layers(model))
    names = _factor_shapes(layers, config).keys() | _word_shapes(model, config).keys()
    names |= _trained_beside(model, layers, config)
    names |= {name for name, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    for name in names:
        refuse_meta(name, state[name])
    tensors = {name: whole(state[name]).detach().contiguous().cpu().clone() for name in sorted(names)}
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(config.to_dict())}
    if base := _fingerprint({name: state[layer.entry(name, "weight")] for name, layer in layers.items()}):
        metadata["base"] = base
    with replacing(Path(directory) / ADAPTER_NAME) as temporary:
        save_file(tensors, temporary, metadata)
    config.save_pretrained(directory)


def load_pretrained(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load an adapter checkpoint into a model with the same base weights; returns the model.

    A dense model is converted first, with the saved config; a converted one must have the same layers and ranks.
    Factors on the meta device are replaced by the loaded ones. Strict: raises FileNotFoundError when there is no
    checkpoint, and ValueError when it is damaged, foreign, or does not fit the model; the model is then as it was.

    Also reads a state dict of the authors' release (`weight_U`, `mask_scores_A`, ... in `model.safetensors` or
    `pytorch_model.bin`) into a converted model. It holds neither masks nor sparsity: set the layers' sparsity yourself.
    """
    directory = Path(directory)
    path = directory / ADAPTER_NAME
    if not path.is_file():
        return _load_released(model, directory)
    tensors, config = read_adapter(path)
    converted = dict(pst_layers(model))
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise RuntimeError(
            "the model is sharded over processes; call load_pretrained before fully_shard or parallelize_module"
        )
    layers: dict[str, Any] = converted or _without_duplicates(_to_be(find_targets(model, config)))
    _check_settings(converted, config, path)
    _check_fit(model, layers, config, tensors, path)
    compare_base({name: layer.weight for name, layer in layers.items()}, path)
    if not converted:
        model = replace_linear(model, config)
    _fill(model, tensors)
    for _, layer in pst_layers(model):
        layer.after_load(with_mask=True)
    return model


def _fingerprint(weights: dict[str, Tensor]) -> str:
    """Dtypes and checksum of the frozen weights; "" where a look at them would cost much, or they are not here."""
    if any(weight.is_meta or hasattr(weight, "full_tensor") for weight in weights.values()):
        return ""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        whole_numbers = weight.detach().contiguous().view(bits[weight.element_size()])
        digest.update(f"{name} {int(whole_numbers.sum(dtype=torch.int64))};".encode())
    dtypes = sorted({str(weight.dtype) for weight in weights.values()})
    return " ".join((*dtypes, digest.hexdigest()[:16]))


def compare_base(weights: dict[str, Tensor], path: Path) -> None:
    """Warn when an adapter meets other base weights than it was trained on; the same ones in another dtype pass."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        saved = (file.metadata() or {}).get("base")
    here = _fingerprint(weights) if saved else ""
    if saved and here and saved != here and saved.split()[:-1] == here.split()[:-1]:
        logger.warning(
            "%s was trained over other base weights than this model's, which fit in shape alone; load the adapter into"
            " the base it was made for",
            path,
        )


def _saved_config(model: nn.Module) -> PSTConfig:
    config = get_config(model)
    if not callable(config.target_modules) and not callable(config.exclude_modules):
        return config
    # a file cannot hold a callable, but what it chose; a list of suffixes could match more than these names
    layers = dict(pst_layers(model))
    names = (layer.entry(n, "weight") if isinstance(layer, PSTExperts) else n for n, layer in layers.items())
    chosen = "|".join(map(re.escape, names))
    return dataclasses.replace(config, target_modules=chosen, exclude_modules=None)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the model's state dict holds, without bringing any mask up to date."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def _trained_beside(model: nn.Module, layers: dict[str, Any], config: PSTConfig) -> set[str]:
    """Names of what is saved beside the factors, by the config alone: freezing a trained head does not unsave it."""
    prefixes = tuple(f"{name}." for name in modules_to_save(model, config))
    of_layers = {f"{name}." if name else "" for name in layers}
    names = {name for name in _tensors(model) if name.startswith(prefixes)}
    names = {name for name in names if f"{name.rpartition('.')[0]}." not in of_layers}
    names -= {_entry(name, layer, "weight") for name, layer in layers.items()}
    if config.train_bias:
        names |= {_entry(name, layer, "bias") for name, layer in layers.items() if layer.bias is not None}
    return names


def _entry(name: str, layer: Any, what: str) -> str:
    """What the state dict calls the weight or bias of a layer, dense or under PST."""
    return layer.entry(name, what) if hasattr(layer, "entry") else f"{name}.{what}" if name else what


def _to_be(targets: dict[str, Any]) -> dict[str, Any]:
    """Targets by the names that their layers will have."""
    return {m.layer_name(name) if isinstance(m, ExpertWeights) else name: m for name, m in targets.items()}


def _without_duplicates(layers: dict[str, Any]) -> dict[str, Any]:
    """A layer under two names, under its first one alone."""
    first = {id(layer): name for name, layer in reversed(layers.items())}
    return {name: layer for name, layer in layers.items() if first[id(layer)] == name}


def read_adapter(path: Path) -> tuple[dict[str, Tensor], PSTConfig]:
    """Raises ValueError for a file that is damaged, or not an adapter of this version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} was not written by pst_kernels (its format is {metadata.get('format')!r});"
                    " pass a directory written by save_pretrained"
                )
            if metadata.get("version") != VERSION:
                raise ValueError(
                    f"{path} has version {metadata.get('version')!r}, this pst_kernels reads {VERSION!r};"
                    " update pst_kernels"
                )
            config = _config(metadata["config"], path)
            return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the checkpoint again") from error


def _config(text: str, path: Path) -> PSTConfig:
    try:
        return PSTConfig.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds a damaged config: {error}; save the checkpoint again") from error


def _check_settings(converted: dict[str, PSTLayer], config: PSTConfig, path: Path) -> None:
    """A model converted by hand must compute the same W' and scores, and not be merged."""
    for name, layer in converted.items():
        if layer.merged:
            raise RuntimeError(f"{name or 'the layer'} is merged; call unmerge() before loading into it")
        for setting in ("beta", "alpha1", "alpha2", "pattern", "magnitude"):
            given, saved = getattr(layer.config, setting), getattr(config, setting)
            if given != saved:
                raise ValueError(
                    f"{path} does not fit the model: {name or 'the layer'} was converted with {setting}={given!r}, the"
                    f" checkpoint with {setting}={saved!r}; convert with the saved config, PSTConfig.from_pretrained"
                )


def _check_fit(
    model: nn.Module, layers: dict[str, Any], config: PSTConfig, tensors: dict[str, Tensor], path: Path
) -> None:
    """Names, shapes, dtypes and mask counts, all before the model is touched."""
    state = _tensors(model)
    factors = _factor_shapes(layers, config) | _word_shapes(model, config)
    missing = sorted((factors.keys() | _trained_beside(model, layers, config)) - tensors.keys())
    unexpected = sorted(tensors.keys() - factors.keys() - state.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit the model: {_some('missing', missing)}{_some('unexpected', unexpected)}"
            "load it into the model it was made for, converted with the same target_modules"
        )
    _follow_counts(layers, config, factors, tensors)
    for name, tensor in tensors.items():
        shape = factors[name] if name in factors else tuple(state[name].shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{path} does not fit the model: {name} has shape {tuple(tensor.shape)}, the model needs"
                f" {shape}; check the ranks and the base model"
            )
        wanted = WHOLE_NUMBERS.get(name.rpartition(".")[2])
        if tensor.dtype != wanted if wanted else name in factors and not tensor.is_floating_point():
            raise ValueError(f"{path} is damaged: {name} has dtype {tensor.dtype}; save the checkpoint again")
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        pattern = parse((layer.config if isinstance(layer, PSTLayer) else config).pattern)
        mask, pruned = tensors[f"{prefix}pst_mask"], int(tensors[f"{prefix}pst_num_pruned"])
        check_mask(name, _shape(layer)[-1], pattern, mask, pruned, path)


def _follow_counts(
    layers: dict[str, Any], config: PSTConfig, shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]
) -> None:
    """Under one threshold for all layers, a fixed mask's own count says how many kept weights there are."""
    if not (config.train_kept and config.allocation == "global"):
        return
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        if bool(tensors[f"{prefix}pst_frozen"]):
            shapes[f"{prefix}{KEPT}"] = (math.prod(_shape(layer)) - int(tensors[f"{prefix}pst_num_pruned"]),)


def check_mask(name: str, columns: int, pattern: Pattern, mask: Tensor, pruned: int, path: Path) -> None:
    """Raise ValueError where a mask has not the structure or the count that it should have."""
    if not fits(pattern, mask, columns, pruned):
        raise ValueError(
            f"{path} is damaged: the mask of {name or 'the layer'} prunes other weights than its pattern and"
            f" pst_num_pruned={pruned} say; save the checkpoint again"
        )


def _shape(layer: Any) -> tuple[int, ...]:
    """(out, in) of a layer, dense or under PST; (experts, out, in) of experts."""
    if isinstance(layer, (PSTLayer, ExpertWeights)):
        return tuple(layer.oriented(layer.weight).shape)
    return tuple(layer.weight.T.shape if is_conv1d(layer) else layer.weight.shape)


def _factor_shapes(layers: dict[str, Any], config: PSTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every factor, mask and count."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        own = layer.config if isinstance(layer, PSTLayer) else config
        shape = _shape(layer)
        entries: dict[str, tuple[int, ...]] = dict(
            zip(FACTORS, factor_shapes(shape, own.weight_rank, own.score_rank), strict=True),
            pst_mask=(*shape[:-1], packed_width(shape[-1])), pst_num_pruned=(),
        )  # fmt: skip
        if own.freeze:
            entries["pst_frozen"] = ()
        if own.magnitude == "fisher":
            entries[MOMENTS] = (shape[0] + shape[1],)
        if own.train_kept:
            out, columns = shape
            entries[KEPT] = (parse(own.pattern).weights_kept_at((out, columns), own.sparsity),)
        shapes |= {f"{name}.{entry}" if name else entry: shape for entry, shape in entries.items()}
    return shapes


def _word_shapes(model: nn.Module, config: PSTConfig) -> dict[str, tuple[int, ...]]:
    """The same of the word embeddings where they learn, or will in a model that is not converted yet."""
    found = find_words(model)
    if found is None:
        return {}
    name, module = found
    if isinstance(module, PSTEmbedding):
        rank = module.pst_embedding_U.shape[1]
    else:
        rank = 0 if any(pst_layers(model)) else config.embedding_factor_rank
    shapes = word_shapes(module, rank) if rank else {}
    return {f"{name}.{entry}" if name else entry: shape for entry, shape in shapes.items()}


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; "


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            owner, _, entry = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, PSTLayer) and entry == KEPT:
                module.fit_kept(tensor.numel())
            current = getattr(module, entry)
            if not current.is_meta:
                current.copy_(tensor)
            elif isinstance(current, nn.Parameter):
                setattr(module, entry, nn.Parameter(tensor.to(current.dtype), requires_grad=current.requires_grad))
            else:
                setattr(module, entry, tensor)


def _load_released(model: nn.Module, directory: Path) -> nn.Module:
    state = _read_released(directory)
    renamed = {}
    for name, tensor in state.items():
        owner, dot, entry = name.rpartition(".")
        renamed[f"{owner}{dot}{RELEASED_NAMES.get(entry, entry)}"] = tensor
    layers = dict(pst_layers(model))
    if not layers:
        raise ValueError(
            f"{directory} holds a state dict of the authors' release, which does not record its settings;"
            " call replace_linear(model, PSTConfig(...)) with those it was trained with first"
        )
    current = model.state_dict()
    needed = {f"{name}.{factor}" if name else factor for name, layer in layers.items() for factor in FACTORS}
    missing, unexpected = sorted(needed - renamed.keys()), sorted(renamed.keys() - current.keys())
    if missing or unexpected:
        raise ValueError(
            f"{directory} does not fit the model: {_some('missing', missing)}{_some('unexpected', unexpected)}"
            "the release converts every linear layer: choose target_modules accordingly"
        )
    for name, tensor in renamed.items():
        if tensor.shape != current[name].shape:
            raise ValueError(
                f"{directory} does not fit the model: {name} has shape {tuple(tensor.shape)}, the model needs"
                f" {tuple(current[name].shape)}; check the ranks and the base model"
            )
    _fill(model, renamed)
    for layer in layers.values():
        layer.after_load(with_mask=False)
    return model


def _read_released(directory: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    for name in ("model.safetensors", "pytorch_model.bin"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            if name.endswith(".bin"):
                state = torch.load(path, map_location="cpu", weights_only=True)
            else:
                with safe_open(path, "pt") as file:
                    state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:
            raise ValueError(f"{path} is damaged ({error}); save the checkpoint again") from error
        if any(key.rpartition(".")[2] in RELEASED_NAMES for key in state):
            return state
        if any(key.endswith(".pst_U") for key in state):
            raise ValueError(
                f"{path} holds a whole model under PST, as the model's save_pretrained and Trainer write it, and no"
                " adapter; from_pretrained loads it pruned, load_state_dict into a converted model to go on training"
            )
        raise ValueError(f"{path} holds no PST factors; pass a directory written by save_pretrained")
    raise FileNotFoundError(f"{directory} has no {ADAPTER_NAME}; pass a directory written by save_pretrained")
