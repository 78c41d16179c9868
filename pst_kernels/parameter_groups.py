"""Learning rates from one number: that of dense fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from functools import partial
from typing import Any

from torch import nn

from .config import check_positive
from .layers.embedding import ENTRIES
from .model import get_config
from .words import words_in_full

# Over the rate of dense fine-tuning, as validation chose them in the accuracy study (topics; README).
SCORES = 5.0
UPDATE = 5.0  # of U and V at beta = 1; a step of theirs moves W' by beta times as much
KEPT = 5.0  # magnitude pruning, which trains its kept weights, wanted as much
WORDS = 20.0  # of the two factors of the word embeddings
WORDS_IN_FULL = 5.0  # of those themselves
OTHERS = 10.0  # the task head, and what else is trained in full: normalisations, biases


def parameter_groups(model: nn.Module, lr: float = 1e-4) -> list[dict[str, Any]]:
    """What trains in a converted model, in the groups that an optimizer takes, each with its learning rate.

    Args:
        model: converted by `replace_linear`.
        lr: the learning rate with which one would fine-tune the dense model.

    A group has `name` too: "update" (U and V), "scores" (A, B, R and C), "kept" (trained kept weights), "words" (the
    factors of the word embeddings), "embeddings" (those themselves, with embedding_rank="full"), "others".

    Example:
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4), weight_decay=0.0)
    """
    check_positive("lr", lr)
    beta = abs(get_config(model).beta)
    update = UPDATE / math.sqrt(beta) if beta else UPDATE
    factors = {
        "update": update, "scores": SCORES, "kept": KEPT, "words": WORDS, "embeddings": WORDS_IN_FULL, "others": OTHERS,
    }  # fmt: skip
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in factors}
    group_of = grouping(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name)].append(parameter)
    return [
        {"params": found, "lr": lr * factors[name], "name": name} for name, found in groups.items() if found
    ]  # fmt: skip


def grouping(model: nn.Module) -> Callable[[str], str]:
    """What gives the group of a parameter of a converted model, by its full name."""
    in_full = {f"{name}.weight" for name in words_in_full(model, get_config(model))}
    return partial(_group, in_full)


def _group(in_full: Container[str], name: str) -> str:
    entry = name.rpartition(".")[2]
    if entry in ("pst_U", "pst_V"):
        return "update"
    if entry == "pst_kept":
        return "kept"
    if entry in ENTRIES:
        return "words"
    if name in in_full:
        return "embeddings"
    return "scores" if entry.startswith("pst_") else "others"
