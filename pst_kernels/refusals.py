"""Why a layer cannot be converted, and why a whole model cannot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .bypass import Bypass
from .layers.checks import check_finite, is_conv1d
from .layers.experts import ExpertWeights, PSTExperts
from .operands import FLOATING

# Subclasses that compute what nn.Linear computes; merged they come back as that.
AS_LINEAR = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def check_model(model: nn.Module) -> None:
    """Raise TypeError for a model that another library's adapters train."""
    tuners = {name: m for name, m in model.named_modules() if _is_tuner(m)}
    if tuners:
        name, tuner = next(iter(tuners.items()))
        adapters = ", ".join(map(repr, getattr(tuner, "active_adapters", None) or ["default"]))
        raise TypeError(
            f"the model holds the adapter {adapters} of PEFT ({len(tuners)} tuner layers, the first is {name}, a"
            f" {kind_of(tuner)}), which PST would prune and freeze; call the PEFT model's merge_and_unload() first, or"
            " convert the base model before get_peft_model"
        )


def _is_tuner(module: nn.Module) -> bool:
    return any(k.__name__ == "BaseTunerLayer" and k.__module__.startswith("peft.") for k in type(module).__mro__)


def why_not(model: nn.Module, name: str, module: Any, bypassed: Mapping[str, Bypass], named: bool) -> str | None:
    """Why PST cannot convert a layer that other layers of the model need not suffer for, or None.

    `named`: the user asked for this very layer, and so answers for paths of the model that are rarely taken.
    """
    if isinstance(module, ExpertWeights):
        return _why_not_experts(module)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
        return f"sits in a {type(parent).__qualname__}, whose fast path reads the weight without calling the layer"
    if parametrize.is_parametrized(module):
        return "is parametrised; remove the parametrisation first"
    if type(module) is not nn.Linear and not is_conv1d(module) and kind_of(module) not in AS_LINEAR:
        return f"is a {kind_of(module)}, which PST cannot convert (only nn.Linear and Conv1D)"
    if special := _special(module.weight):
        return special
    if name in bypassed and not (named and bypassed[name].sometimes):
        sometimes = " on some of its paths; name it in target_modules if yours takes none of them"
        return (
            f"has a weight that {bypassed[name].where} reads or changes without calling the layer"
            f"{sometimes if bypassed[name].sometimes else ''}"
        )
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "has a forward of its own, set on the instance, which PST would replace"
    return None


def _special(weight: Any) -> str | None:
    if hasattr(weight, "full_tensor"):  # for check_layer to refuse
        return None
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATING:
        return (
            f"has a weight of type {type(weight).__qualname__} and dtype {weight.dtype}; quantised or otherwise"
            " special weights are not supported: load the model in float32, float16 or bfloat16"
        )
    return None


def _why_not_experts(weights: ExpertWeights) -> str | None:
    owner = weights.owner
    if parametrize.is_parametrized(owner):
        return "is parametrised; remove the parametrisation first"
    if getattr(owner, "_is_expert_parallel", False):
        return "is cut over processes by expert parallelism; load the model without it"
    own_forward = "forward" in vars(owner) and not any(isinstance(m, PSTExperts) for m in owner.children())
    if own_forward and not hasattr(owner, "_hf_hook"):
        return "belongs to experts with a forward of their own, set on the instance, which PST would replace"
    return _special(weights.weight)


def check_layer(name: str, module: Any) -> None:
    """Raise for a layer that tells of a model which is not ready: damaged, offloaded, or cut over processes."""
    weight: Any = module.weight
    if any(hasattr(weight, mark) for mark in ("ds_id", "ds_shape", "ds_status")):
        raise RuntimeError(
            f"the weight of {name} is partitioned by DeepSpeed ZeRO-3 and not here; call replace_linear before"
            " deepspeed.initialize, on a model made outside of deepspeed.zero.Init"
        )
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            f"{name} has a weight of type {type(weight).__qualname__}, sharded over processes already; call"
            " replace_linear before fully_shard or parallelize_module"
        )
    if hasattr(getattr(module, "owner", module), "_hf_hook"):
        raise RuntimeError(
            f"{name} is managed by an accelerate hook (device_map or CPU offload);"
            " convert the model before dispatching it"
        )
    if not weight.numel():
        raise ValueError(
            f"the weight of {name} is empty, of shape {tuple(weight.shape)}; load the model's weights before"
            " replace_linear"
        )
    if not weight.is_meta:
        check_finite(weight, f"the weight of {name}", "the checkpoint is damaged or was trained to divergence")


def kind_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def listed(reasons: Mapping[str, str]) -> str:
    """Layer name -> reason, as a sentence: layers of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{shortened(names)} (each {reason})" for reason, names in by_reason.items())


def shortened(names: Iterable[str]) -> str:
    """Names with commas between; those that differ in a block's number alone as one, with a star."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return ", ".join(
        f"{pattern} ({len(group)} layers)" if len(group) > 2 else ", ".join(group) for pattern, group in groups.items()
    )
