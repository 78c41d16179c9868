"""What `save_pretrained` of a transformers model under PST writes: a checkpoint that stock transformers loads right.

Under each converted layer's `weight` lies M * W', so that `from_pretrained` makes the pruned model, and beside it the
frozen W as `pst_weight`, which a PST layer prefers when it loads: `Trainer` resumes bit for bit. So it is for word
embeddings that learn.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers.checks import whole
from .layers.embedding import ENTRIES, PSTEmbedding, updated
from .layers.pst_layer import FACTORS, FROZEN, PSTLayer
from .layers.rested import masked_with
from .layers.resting import KEPT
from .operands import MaskedWeight
from .targets import is_transformers_model, parameter_uses, weight_key

logger = logging.getLogger("pst_kernels")
METHOD = "save_pretrained"
# transformers would write experts one by one, under names that load_state_dict, and so a resumed Trainer, passes over
KEEPS_NAMES = "save_original_format"


def take_over_saving(model: nn.Module) -> None:
    """Let this very model's `save_pretrained` write the pruned weights."""
    if is_transformers_model(model) and METHOD not in vars(model):
        setattr(model, METHOD, functools.partial(_save_pretrained, model))


def give_back_saving(model: nn.Module) -> None:
    vars(model).pop(METHOD, None)


def _save_pretrained(
    model: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **settings: Any
) -> Any:
    state = model.state_dict() if state_dict is None else state_dict
    state = with_pruned_weights(model, state)
    if KEEPS_NAMES in inspect.signature(type(model).save_pretrained).parameters:
        settings.setdefault(KEEPS_NAMES, False)
    return type(model).save_pretrained(
        model, save_directory, is_main_process=is_main_process, state_dict=state, **settings
    )


def with_pruned_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with M * W' where W was, and W beside it."""
    found = dict(state)
    uses = parameter_uses(model)
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(layer, PSTEmbedding):
            _with_updated_words(found, prefix)
        if not isinstance(layer, PSTLayer):
            continue
        needed = [layer.entry(name, "weight"), *(f"{prefix}{entry}" for entry in (*FACTORS, "pst_mask"))]
        if not all(entry in state for entry in needed):
            continue
        if uses[weight_key(layer.weight)] > 1:
            logger.warning("the weight of %s is shared with another module, and saved unpruned", name)
            continue
        weight, *rest = (whole(state[entry]) for entry in needed)
        operands = MaskedWeight.of(layer.oriented(weight), *rest, *layer.scales)
        with torch.no_grad():
            pruned = masked_with(operands, layer.added(state.get(f"{prefix}{KEPT}")), weight.dtype)
        found[needed[0]] = layer.oriented(pruned).contiguous()  # which turned twice lies as before
        found[f"{prefix}{FROZEN}"] = weight
    return found


def _with_updated_words(found: dict[str, Tensor], prefix: str) -> None:
    entries = [f"{prefix}{entry}" for entry in ("weight", *ENTRIES)]
    if all(entry in found for entry in entries):
        weight, U, V = (found[entry] for entry in entries)
        with torch.no_grad():
            found[entries[0]] = updated(weight, U, V)
        found[f"{prefix}{FROZEN}"] = whole(weight)
