"""Less dropout while a model is sparse, and what it had before given back.

A pruned model has less to overfit with, so it wants less dropout (Han et al., "Learning both Weights and Connections",
NIPS 2015, section 3.2), and once the mask is fixed its random numbers are a quarter of a step on CPUs.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .refusals import shortened

logger = logging.getLogger("pst_kernels")
GIVEN = "_pst_given_dropout"  # of a module, its probabilities before


def lower_dropout(model: nn.Module, probability: float | None) -> None:
    """No module holds a higher probability from here on; says which did. None: all stay as they are."""
    if probability is None:
        return
    lowered = []
    for name, module in model.named_modules():
        for attribute in _probabilities(module):
            given = getattr(module, attribute)
            if given > probability:
                vars(module).setdefault(GIVEN, {}).setdefault(attribute, given)
                setattr(module, attribute, probability)
                lowered.append(name if attribute == "p" else f"{name}.{attribute}".removeprefix("."))
    if lowered:
        logger.warning(
            "dropout=%g of the PSTConfig lowers %s; dropout=None leaves them", probability, shortened(lowered)
        )


def give_back_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for attribute, given in vars(module).pop(GIVEN, {}).items():
            setattr(module, attribute, given)


def _probabilities(module: nn.Module) -> list[str]:
    """The attributes that hold one: that of a dropout module, and what other modules hand to a function."""
    if isinstance(module, _DropoutNd):
        return ["p"]
    return [name for name, value in vars(module).items() if isinstance(value, float) and "dropout" in name]
