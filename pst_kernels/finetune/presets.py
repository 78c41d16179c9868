"""What `--preset` means for a model at hand: which modules train beside the factors, and each parameter's rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import PSTConfig
from ..layers.pst_layer import FACTORS
from ..targets import head_modules
from .settings import Settings

UPDATE = ("pst_U", "pst_V")


def config(settings: Settings, model: nn.Module) -> PSTConfig:
    """ "released" freezes the head as well, "recipe" trains every normalisation too."""
    more: dict[str, Any] = {}
    if settings.preset != "released":
        more["modules_to_save"] = [*trained_in_full(model), *(norms(model) if settings.preset == "recipe" else ())]
    return PSTConfig.preset(
        settings.preset, sparsity=settings.sparsity, weight_rank=settings.rank, score_rank=settings.rank, **more
    )


def trained_in_full(model: nn.Module) -> list[str]:
    """The task head, and what stands between the blocks and it (BERT's pooler), where a pretrained model has it."""
    poolers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"]
    return [*head_modules(model), *poolers]


def norms(model: nn.Module) -> list[str]:
    """LayerNorm, and what is called so without being torch's (RMSNorm has many classes)."""
    return [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]


def groups(method: str, settings: Settings, model: nn.Module) -> list[dict[str, Any]]:
    """The body, or the update and the scores of PST, each at its learning rate; all else at that of the head."""
    by_rate: dict[str, list[nn.Parameter]] = {}
    heads = tuple(f"{name}." for name in head_modules(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            if method != "pst":
                role = "head" if name.startswith(heads) else "body"
            else:
                role = "update" if last in UPDATE else "scores" if last in FACTORS else "head"
            by_rate.setdefault(role, []).append(parameter)
    rates = {
        "body": settings.learning_rate, "update": settings.update_rate, "scores": settings.pst_learning_rate,
        "head": settings.head_learning_rate,
    }  # fmt: skip
    return [{"params": parameters, "lr": rates[role]} for role, parameters in by_rate.items()]
