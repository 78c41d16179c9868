"""What `--preset` means for a model at hand: which modules train beside the factors, and each parameter's rate."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from ..config import WEIGHED_ABOVE, PSTConfig
from ..parameter_groups import WORDS, WORDS_IN_FULL, grouping
from ..targets import head_modules
from .settings import OF_RECIPE, Settings

# Below so many steps the job takes plain magnitudes and, above 50 %, fixes the mask of "accurate" later. With 150 at
# 90 %, on held-out thirds of the texts outside the test sets of seeds 0 to 2, that reached 95.5 % and a loss of 0.135;
# weighed ones 94.7 % and 0.171; plain ones with a mask fixed after 30 % of the steps 94.9 %. With 240, of other texts,
# it was the other way round by more than two points (docs/accuracy.md).
FEW_STEPS = 200
FIXED_LATE: dict[str, Any] = {"freeze": 0.3, "cooldown": 0.3, "warmup": 0.1}
# The settings of PSTConfig that the command line has.
OPTIONS = {"sparsity": "--sparsity", "magnitude": "--magnitude", "weight_rank": "--rank", "score_rank": "--rank"}


class ConversionError(ValueError):
    """A model that PST cannot convert, or settings that do not fit it, in the words of the command line."""


def config(settings: Settings, model: nn.Module) -> PSTConfig:
    """ "released" freezes the head as well; "recipe" and those made of it train every normalisation too."""
    more: dict[str, Any] = {"dropout": None}  # --dropout decides, for both methods
    if settings.preset != "released":
        more["modules_to_save"] = [*trained_in_full(model), *(norms(model) if settings.preset in OF_RECIPE else ())]
    if _is_short(settings):
        more |= {"magnitude": "plain"} | (FIXED_LATE if _fixes_later(settings) else {})
    if settings.magnitude is not None:
        more["magnitude"] = settings.magnitude
    return PSTConfig.preset(
        settings.preset, sparsity=settings.sparsity, weight_rank=settings.rank, score_rank=settings.rank, **more
    )


def _is_short(settings: Settings) -> bool:
    return settings.steps < FEW_STEPS


def _fixes_later(settings: Settings) -> bool:
    return settings.preset == "accurate" and settings.sparsity > WEIGHED_ABOVE


def note(settings: Settings) -> str | None:
    """What is to be told of a short run, which departs from its preset."""
    if "pst" not in settings.methods or not _is_short(settings):
        return None
    told = []
    weighed = PSTConfig.preset(settings.preset, sparsity=settings.sparsity).magnitude == "fisher"
    if settings.magnitude is None and weighed:
        told.append("magnitudes are plain, not weighed by their gradients (--magnitude fisher weighs them)")
    if _fixes_later(settings):
        told.append(f"the mask is fixed in the last {FIXED_LATE['freeze']:.0%} of them, not earlier")
    return f"{settings.steps} steps are fewer than {FEW_STEPS}: {', and '.join(told)}" if told else None


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
    role = grouping(model) if method == "pst" else lambda name: "others" if name.startswith(heads) else "body"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_rate.setdefault(role(name), []).append(parameter)
    rates = {
        "body": settings.learning_rate, "update": settings.update_rate, "scores": settings.pst_learning_rate,
        "others": settings.head_learning_rate, "kept": settings.kept_rate,
        "words": WORDS * settings.learning_rate, "embeddings": WORDS_IN_FULL * settings.learning_rate,
    }  # fmt: skip
    return [{"params": parameters, "lr": rates[name]} for name, parameters in by_rate.items()]


def refusal(model: str, error: Exception) -> ConversionError:
    """What PSTConfig or the conversion of `--model` says, with the options of the command in the place of settings."""
    text = str(error).replace(
        "target_modules='all-linear' matches no linear layer", "has no linear layer in its blocks"
    )
    text = re.sub(r" \(a list matches suffixes.*\)$", "", text)
    for name, option in OPTIONS.items():
        text = re.sub(rf"\b{name}=", f"{option} ", re.sub(rf"^{name}\b(?!=)", option, text))
    without = [f.name for f in dataclasses.fields(PSTConfig) if re.search(rf"\b{f.name}\b", text) and "_" in f.name]
    if without:
        text += f" (this command has no option for {', '.join(without)}; call replace_linear in Python to set it)"
    return ConversionError(f"--model {model}: {text}")
