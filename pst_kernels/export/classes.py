"""The class that a folder's config names, models without data, and what files may call a layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch


def named(config: Any, directory: str | Path) -> Any:
    """The class that the config of a folder names. Raises ValueError for one that transformers does not have."""
    import transformers  # needed for folders alone, and so not by those who import the package

    name = (getattr(config, "architectures", None) or ["none"])[0]
    kind = getattr(transformers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ValueError(
            f"transformers {transformers.__version__} has no class {name}, which {directory} names; a class from"
            " elsewhere loads its folders with its own from_pretrained"
        )
    return kind


def without_data(directory: str | Path) -> Any:
    """The model of a folder on the meta device."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        return named(config, directory)(config)


def unpruned(model: Any) -> Any:
    """The model as its class makes it, on the meta device: with dense layers alone."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def possible_names(model: Any, name: str) -> tuple[str, ...]:
    """A layer's names in files and models, which begin with the base model's prefix or go without it."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name
