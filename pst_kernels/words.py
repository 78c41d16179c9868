"""Which embedding of a model `embedding_rank` is for, and whether it trains in full."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from typing import Any

from torch import nn

from .config import FULL, PSTConfig
from .layers.embedding import PSTEmbedding
from .targets import is_transformers_model, parameter_uses, weight_key

logger = logging.getLogger("pst_kernels")


def find_words(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """The name and module of a transformers model's input embeddings, of another model's largest embedding."""
    names = {id(module): name for name, module in model.named_modules()}
    for part in model.modules():
        if is_transformers_model(part):
            found = _input_embeddings(part)
            return (names[id(found)], found) if isinstance(found, nn.Embedding) and id(found) in names else None
    all_of_it = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    found = max(all_of_it, key=lambda module: module.num_embeddings, default=None)
    return None if found is None else (names[id(found)], found)


def settled(model: nn.Module, config: PSTConfig, saved: Collection[str]) -> PSTConfig:
    """The config as the model can have it: a preset's embedding_rank is 0 where there is no such embedding.

    Raises ValueError where the rank was asked for.
    """
    if not config.embedding_rank:
        return config
    found = find_words(model)
    reason = "the model has no nn.Embedding for words" if found is None else _why_not(model, *found, saved)
    if reason is None:
        return config
    if not config.embedding_rank_is_the_presets:
        raise ValueError(f"embedding_rank={config.embedding_rank!r} cannot be had: {reason}; leave it out")
    if found is not None and not _is_saved(found[0], saved):
        logger.warning("word embeddings stay frozen, preset or not: %s", reason)
    return dataclasses.replace(config, embedding_rank=0)


def words_in_full(model: nn.Module, config: PSTConfig) -> list[str]:
    """The name of the embedding that trains in full, if one does, by a config that `settled` gave or that a converted
    model has.
    """
    found = find_words(model) if config.embedding_rank == FULL else None
    return [] if found is None or isinstance(found[1], PSTEmbedding) else [found[0]]


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _why_not(model: nn.Module, name: str, module: nn.Embedding, saved: Collection[str]) -> str | None:
    if isinstance(module, PSTEmbedding):
        return None
    if _is_saved(name, saved):
        return f"{name} is trained in full, by modules_to_save"
    if type(module) is not nn.Embedding:
        return f"{name} is a {type(module).__name__}, and no plain nn.Embedding"
    if "forward" in vars(module):
        return f"{name} has a forward of its own, set on the instance"
    if module.max_norm is not None or module.sparse:
        return f"{name} has max_norm={module.max_norm}, sparse={module.sparse}"
    if not module.weight.is_floating_point() or hasattr(module.weight, "full_tensor"):
        return f"the weight of {name} is {module.weight.dtype}, or sharded over processes"
    if parameter_uses(model)[weight_key(module.weight)] > 1:
        return f"the weight of {name} is shared with another module"
    return None


def _is_saved(name: str, saved: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in saved)
