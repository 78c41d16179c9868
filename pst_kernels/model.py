"""Whole models: convert them, look at them, and turn them back into plain ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import env
from .config import PSTConfig, matches
from .dropout import give_back_dropout, lower_dropout
from .export import formats
from .layers import embedding
from .layers.checks import check_finite, is_conv1d, refuse_meta
from .layers.embedding import PSTEmbedding
from .layers.experts import ExpertWeights, PSTExperts
from .layers.linear import PSTConv1D, PSTLinear
from .layers.pst_layer import PSTLayer
from .layers.reads import refuse_bypassed
from .layers.together import refresh_layers
from .refusals import shortened
from .targets import block_weights, find_targets, head_modules, parameter_uses, weight_key
from .whole_model import give_back_saving, take_over_saving
from .words import find_words, settled, words_in_full

logger = logging.getLogger("pst_kernels")
LITTLE = 0.02  # share of the blocks' weights left dense that goes without saying


def replace_linear(model: nn.Module, config: PSTConfig | None = None) -> nn.Module:
    """Convert a model's linear layers to PST in place, and freeze everything else but the modules to save.

    The converted layers hold the same `Parameter` objects for weight and bias. Layers that are under PST already are
    left as they are, so calling this twice is harmless; other settings than theirs are ignored, with a warning. Returns
    the model; a new module if the model itself is a linear layer.

    Args:
        model: any module; of a transformers model the linear layers of its blocks are converted by default.
        config: the settings; `PSTConfig()` if None.

    Raises ValueError, TypeError or RuntimeError before anything is changed; see `targets.find_targets`.

    Example:
        model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        model = replace_linear(model, PSTConfig(sparsity=0.9))
    """
    config = PSTConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, PSTConfig):
        raise TypeError(f"config must be a PSTConfig, got {type(config).__name__}; use PSTConfig(sparsity=0.9), say")
    targets = find_targets(model, config)
    named = _named_to_save(model, config)
    config = settled(model, config, named)
    saved = named + words_in_full(model, config)
    _check_trainable(model, saved)
    _warn_of_other_settings(model, config)
    converted: dict[int, PSTLayer] = {}  # by identity: a layer used in two places stays one layer
    for name, module in targets.items():
        if isinstance(module, ExpertWeights):
            if id(module) not in converted:
                converted[id(module)] = PSTExperts.attach(module, config)
                converted[id(module)].full_name = name
            continue
        if id(module) not in converted:
            cls: Any = PSTConv1D if is_conv1d(module) else PSTLinear
            converted[id(module)] = cls.from_linear(module, config)
            converted[id(module)].full_name = name
        model = _set_submodule(model, name, converted[id(module)])
    if converted:  # else the settings of an earlier call stand
        lower_dropout(model, config.dropout)
        _let_words_learn(model, config)
    _freeze(model, config, saved)
    _keep_buffers_out_of_ddp(model)
    _warn_of_other_weights(model)
    take_over_saving(model)
    return model


def modules_to_save(model: nn.Module, config: PSTConfig) -> list[str]:
    """Full names of the modules trained beside the factors. Raises ValueError for a name that matches nothing."""
    return _named_to_save(model, config) + words_in_full(model, config)


def _named_to_save(model: nn.Module, config: PSTConfig) -> list[str]:
    """Those of `modules_to_save`, or the task head."""
    if config.modules_to_save is None:
        return head_modules(model)
    names = [name for name, m in model.named_modules() if name and matches(config.modules_to_save, m, name)]
    for wanted in config.modules_to_save:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            children = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}))
            raise ValueError(f"modules_to_save names {wanted!r}, but no module is called that; there are {children}")
    return names


def _check_trainable(model: nn.Module, saved: list[str]) -> None:
    for module in saved:
        for name, p in model.get_submodule(module).named_parameters():
            if not p.is_floating_point():
                raise TypeError(
                    f"{module}.{name} is to be trained, but is {p.dtype}; load that module in a floating dtype, or"
                    " leave it out with modules_to_save=[...]"
                )


def _warn_of_other_settings(model: nn.Module, config: PSTConfig) -> None:
    for name, layer in pst_layers(model):
        given = {f.name: (getattr(layer.config, f.name), getattr(config, f.name)) for f in dataclasses.fields(config)}
        differ = [f"{setting}={old!r}, not {new!r}" for setting, (old, new) in given.items() if old != new]
        if differ:
            logger.warning("%s is under PST already and keeps its settings: %s", name, "; ".join(differ))
            return


def _warn_of_other_weights(model: nn.Module) -> None:
    """Say what share of the blocks the method does not reach, as where a mixture keeps its experts in a form of its
    own.
    """
    found = block_weights(model)
    others = sum(found.in_no_linear.values())
    if others > LITTLE * found.total:
        logger.warning(
            "%.1f %% of the weights of the blocks are in no linear layer, and stay dense: %s",
            100 * others / found.total,
            shortened(found.in_no_linear),
        )


def _set_submodule(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model


def _let_words_learn(model: nn.Module, config: PSTConfig) -> None:
    rank = config.embedding_factor_rank
    found = find_words(model) if rank else None
    if found is not None and not isinstance(found[1], PSTEmbedding):
        embedding.attach(found[1], rank, config.adapter_dtype)


def _freeze(model: nn.Module, config: PSTConfig, saved: list[str]) -> None:
    model.requires_grad_(False)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    for _, words in embeddings_of(model):
        for name in embedding.ENTRIES:
            getattr(words, name).requires_grad_(True)
    for _, layer in pst_layers(model):
        layer.weight.requires_grad_(False)  # a module to save may hold converted layers
        if layer.bias is not None:
            layer.bias.requires_grad_(config.train_bias)
        for name, parameter in layer.named_parameters(recurse=False):
            if name.startswith("pst_"):
                parameter.requires_grad_(True)


def _keep_buffers_out_of_ddp(model: nn.Module) -> None:
    """Masks follow from the factors, which are equal on all ranks: DistributedDataParallel need not send them."""
    buffers = [
        f"{name}.{buffer}" if name else buffer for name, m in pst_layers(model) for buffer in dict(m.named_buffers())
    ]
    ignored = [name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", []) if name not in buffers]
    model._ddp_params_and_buffers_to_ignore = ignored + buffers  # type: ignore[assignment]


def pst_layers(model: nn.Module) -> Iterator[tuple[str, PSTLayer]]:
    """(name, layer) of every converted layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, PSTLayer))


def embeddings_of(model: nn.Module) -> list[tuple[str, PSTEmbedding]]:
    """(name, module) of every embedding that learns."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, PSTEmbedding)]


def _layers_of(model: nn.Module) -> list[PSTLayer]:
    """The layers of `pst_layers`, without their names: in a third of the time, for what is done at every step."""
    found, waiting = dict[PSTLayer, None](), [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, PSTLayer):
            found[module] = None
        waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found)


def refresh_masks(model: nn.Module) -> None:
    """Bring every mask of a model up to date now, whatever was changed: also through `tensor.data`, which leaves no
    trace for a layer to notice.

    Forwards, saving and merging do it for what they can notice. Of a model that is sharded over processes every process
    must call this. Raises ValueError when the model has no PST layers.
    """
    layers = _layers_of(model)
    if not layers:
        get_config(model)  # which says what to do
    for layer in layers:
        if not layer.merged:
            layer.mark_stale()
    refresh_layers(layers)


def get_config(model: nn.Module) -> PSTConfig:
    """The config a model was converted with. Raises ValueError when it has no PST layers, or layers of several
    configs.
    """
    configs = {name: layer.config for name, layer in pst_layers(model)}
    if not configs:
        raise ValueError(f"{type(model).__name__} has no PST layers; call replace_linear(model, PSTConfig(...)) first")
    first, config = next(iter(configs.items()))
    for name, other in configs.items():
        if other != config:
            raise ValueError(
                f"{first} and {name} were converted with different configs; convert a model with one PSTConfig"
            )
    return config


@dataclass(frozen=True)
class TrainableSummary:
    """Numbers behind `print_trainable_parameters`; sparsity counts the converted matrices only."""

    trainable: int
    total: int
    factors: int
    prunable: int
    sparsity: float
    target_sparsity: float
    in_blocks: int = 0  # weights of the matrices of the blocks
    in_blocks_prunable: int = 0  # and those of them that are converted
    kept: int = 0  # kept weights that train from the freeze on, of `trainable`

    @property
    def percent(self) -> float:
        return 100.0 * self.trainable / max(1, self.total)


def trainable_summary(model: nn.Module) -> TrainableSummary:
    layers = [layer for _, layer in pst_layers(model)]
    prunable = sum(layer.weight.numel() for layer in layers)
    pruned = sum(layer.weights_pruned for layer in layers)
    target = sum(layer.config.sparsity * layer.weight.numel() for layer in layers)
    of_blocks = block_weights(model)
    return TrainableSummary(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
        factors=sum(f.numel() for layer in layers for f in layer.factors),
        prunable=prunable,
        sparsity=pruned / max(1, prunable),
        target_sparsity=target / max(1, prunable),
        in_blocks=of_blocks.total,
        in_blocks_prunable=of_blocks.under_pst,
        kept=sum(layer.pst_kept.numel() for layer in layers if layer.config.train_kept),
    )


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line, and the sparsity of the converted matrices now and in the end; of a model some of whose
    blocks' weights are left dense, the share that is converted too.
    """
    s = trainable_summary(model)
    share = f" || {100 * s.in_blocks_prunable / max(1, s.in_blocks):.1f} % of the blocks' weights are under PST"
    kept = f" (of them {s.kept:,} kept weights, from the freeze on)" if s.kept else ""
    print(
        f"trainable params: {s.trainable:,}{kept} || all params: {s.total:,} || trainable%: {s.percent:.4f}"
        f" || sparsity of {s.prunable:,} prunable weights: {s.sparsity:.4f} (target {s.target_sparsity:.4f})"
        f"{share if s.in_blocks_prunable < (1 - LITTLE) * s.in_blocks else ''}"
    )


@dataclass(frozen=True)
class LayerStatus:
    name: str
    shape: tuple[int, ...]  # (out, in), of experts (experts, out, in)
    dtype: torch.dtype
    backend: str
    sparsity: float
    target_sparsity: float
    merged: bool
    frozen: bool  # whether the mask is fixed


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """One row per converted layer, in the model's order."""
    return [
        LayerStatus(
            layer.entry(name, "weight") if isinstance(layer, PSTExperts) else name,
            tuple(layer.oriented_weight.shape), layer.weight.dtype,
            env.backend_for(layer.weight.device.type)[0], layer.sparsity, layer.config.sparsity, layer.merged,
            layer.frozen,
        )
        for name, layer in pst_layers(model)
    ]  # fmt: skip


def merge_and_unload(model: nn.Module, safe_merge: bool = False, *, format: str = "dense") -> nn.Module:
    """Turn every PST layer into a plain one that holds M * W', and embeddings that learned into plain ones.

    In place; returns the model (a new module if the model itself is a PST layer). Layers that were merged are taken as
    they are. By `format` the layers become

    - "dense": `nn.Linear` or `Conv1D`; the state dict has a dense model's keys; weights of experts become so by every
      format;
    - "sparse": `SparseLinear`, which stores the kept weights of any pattern and multiplies by them alone;
    - "bsr": `BlockSparseLinear`, which stores the kept blocks and multiplies by them alone, for `pattern="block:B"`;
    - "semi_structured": `nn.Linear` whose weight is torch's semi-structured tensor, for `pattern="2:4"` on CUDA, in
      fp16 or bf16.

    Raises before anything is changed: ValueError for a format that does not fit a layer's pattern, device, dtype or
    shape, and with `safe_merge` if any merged weight has NaN or infinite values; RuntimeError when a converted weight
    is shared with another module, which the merge would change too.
    """
    formats.check_name(format)
    get_config(model)
    refuse_bypassed([(name, layer) for name, layer in pst_layers(model) if not layer.merged])
    uses = parameter_uses(model)
    for name, layer in pst_layers(model):
        _refuse_to_merge(name, layer.weight, uses)
        layer.settle_mask()
        formats.refuse(format, name, layer)
        if safe_merge:
            _check_merged(name, layer.masked_weight())
    for name, words in embeddings_of(model):
        _refuse_to_merge(name, words.weight, uses)
        if safe_merge:
            _check_merged(name, words.updated_weight())
    # all of them first: what fails in between leaves the model as it was
    plain = {id(layer): formats.plain(format, layer) for _, layer in pst_layers(model)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, PSTExperts):
            module.detach()
        elif isinstance(module, PSTLayer):
            model = _set_submodule(model, name, plain[id(module)])
    for _, words in embeddings_of(model):
        embedding.detach(words)
    give_back_dropout(model)
    give_back_saving(model)
    return model


def _refuse_to_merge(name: str, weight: Tensor, uses: Mapping[tuple[int, ...], int]) -> None:
    if uses[weight_key(weight)] > 1:
        raise RuntimeError(
            f"the weight of {name} is shared with another module, which merging would change;"
            " untie it first: layer.weight = nn.Parameter(layer.weight.clone())"
        )
    refuse_meta(f"the weight of {name}", weight)


def _check_merged(name: str, weight: Tensor) -> None:
    check_finite(weight, f"the merged weight of {name}", "lower the learning rate, or merge an earlier checkpoint")
