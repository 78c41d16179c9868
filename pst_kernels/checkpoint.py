"""Adapter checkpoints: the factors, the packed masks and the modules to save, without the base model.

A checkpoint is a directory with `pst_adapter.safetensors`, which is complete in itself (its metadata holds the config),
and `pst_config.json`, the same config for people and for `PSTConfig.from_pretrained`. Each file is replaced in one
step, so a process killed while saving leaves the previous checkpoint usable.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import PSTConfig
from .files import replacing
from .linear import FACTORS, PSTLayer
from .model import get_config, modules_to_save, pst_layers, replace_linear
from .packing import packed_width
from .targets import find_targets, is_conv1d

logger = logging.getLogger("pst_kernels")

ADAPTER_NAME = "pst_adapter.safetensors"
FORMAT, VERSION = "pst_kernels", "1"
RELEASED_NAMES = {
    "weight_U": "pst_U", "weight_V": "pst_V", "mask_scores_A": "pst_A",
    "mask_scores_B": "pst_B", "mask_scores_R": "pst_R", "mask_scores_C": "pst_C",
}  # fmt: skip
LAYER_ENTRIES = (*FACTORS, "pst_mask", "pst_num_pruned")


def save_pretrained(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter checkpoint of a converted model into a directory, which is made if need be.

    Saved are the factors, masks and pruned counts of every PST layer, and every other trainable parameter with its
    module's buffers (the head, say). Raises ValueError when the model has no PST layers.
    """
    config = _saved_config(model)
    tensors = {name: t.detach().contiguous().cpu().clone() for name, t in _entries(model, config).items()}
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(config.to_dict())}
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
    tensors, config = _read(path)
    if any(True for _ in pst_layers(model)):
        layers: dict[str, Any] = dict(pst_layers(model))
    else:
        layers = find_targets(model, config)
    _check_fit(model, layers, config, tensors, path)
    if not any(isinstance(layer, PSTLayer) for layer in layers.values()):
        model = replace_linear(model, config)
    _fill(model, tensors)
    for _, layer in pst_layers(model):
        layer.after_load(with_mask=True)
    return model


def _saved_config(model: nn.Module) -> PSTConfig:
    config = get_config(model)
    names = [name for name, _ in pst_layers(model)]
    changes: dict[str, Any] = {}
    if callable(config.target_modules) or callable(config.exclude_modules):
        changes = {"target_modules": names, "exclude_modules": None}  # a file cannot hold a callable, but its choice
    return dataclasses.replace(config, **changes)


def _entries(model: nn.Module, config: PSTConfig) -> dict[str, Tensor]:
    state = model.state_dict()
    layers = dict(pst_layers(model))
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    prefixes = tuple(f"{name}." for name in modules_to_save(model, config))
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    entries = {}
    for name, tensor in state.items():
        owner, _, entry = name.rpartition(".")
        of_layer = owner in layers and entry in LAYER_ENTRIES
        if of_layer or name in trainable or (name.startswith(prefixes) and name not in frozen):
            entries[name] = tensor
    return entries


def _read(path: Path) -> tuple[dict[str, Tensor], PSTConfig]:
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
            config = PSTConfig.from_dict(json.loads(metadata["config"]))
            return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the checkpoint again") from error


def _check_fit(
    model: nn.Module, layers: dict[str, Any], config: PSTConfig, tensors: dict[str, Tensor], path: Path
) -> None:
    """Names, shapes and mask counts, all before the model is touched."""
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        expected |= {f"{name}.{entry}" if name else entry: s for entry, s in _layer_shapes(layer, config).items()}
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(name for name in tensors if name not in expected and name not in state)
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit the model: {_some('missing', missing)}{_some('unexpected', unexpected)}"
            "load it into the model it was made for, converted with the same target_modules"
        )
    for name, tensor in tensors.items():
        shape = expected.get(name, state[name].shape if name in state else ())
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{path} does not fit the model: {name} has shape {tuple(tensor.shape)}, the model needs"
                f" {tuple(shape)}; check the ranks and the base model"
            )
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        kept = _count_bits(tensors[f"{prefix}pst_mask"])
        pruned = int(tensors[f"{prefix}pst_num_pruned"])
        if kept + pruned != layer.weight.numel():
            raise ValueError(
                f"{path} is damaged: the mask of {name or 'the layer'} keeps {kept} weights and prunes {pruned},"
                f" of {layer.weight.numel()}; save the checkpoint again"
            )


def _layer_shapes(layer: Any, config: PSTConfig) -> dict[str, tuple[int, ...]]:
    if isinstance(layer, PSTLayer):
        out, columns = layer.oriented_weight.shape
        config = layer.config
    else:
        out, columns = layer.weight.T.shape if is_conv1d(layer) else layer.weight.shape
    r1, r2 = config.weight_rank, config.score_rank
    return {
        "pst_U": (out, r1), "pst_V": (r1, columns), "pst_A": (out, r2), "pst_B": (r2, columns), "pst_R": (out,),
        "pst_C": (columns,), "pst_mask": (out, packed_width(columns)), "pst_num_pruned": (),
    }  # fmt: skip


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; "


def _count_bits(packed: Tensor) -> int:
    bits = packed.contiguous().view(torch.uint8)
    return int(sum(((bits >> i) & 1).sum(dtype=torch.int64) for i in range(8)))


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            owner, _, entry = name.rpartition(".")
            module = model.get_submodule(owner)
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
        raise ValueError(f"{path} holds no PST factors; pass a directory written by save_pretrained")
    raise FileNotFoundError(f"{directory} has no {ADAPTER_NAME}; pass a directory written by save_pretrained")
