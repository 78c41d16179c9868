"""Which layers of a model PST converts, and which parameters stay trainable beside the factors."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .config import ALL_LINEAR, PSTConfig, matches
from .layers.checks import check_finite, is_conv1d
from .layers.pst_layer import PSTLayer
from .operands import FLOATING

logger = logging.getLogger("pst_kernels")


def is_transformers_model(module: nn.Module) -> bool:
    return any(
        k.__name__ == "PreTrainedModel" and k.__module__.startswith("transformers.") for k in type(module).__mro__
    )


def find_targets(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """Name -> layer of everything to convert, PST layers left out; checked, so that conversion cannot fail half-way.

    Raises ValueError when nothing matches (naming near misses) or a weight is not finite, TypeError for a layer that
    PST cannot train (a quantised or parametrised one, say), RuntimeError for one that is offloaded.
    """
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if _is_linear(m)}
    if config.target_modules == ALL_LINEAR:
        chosen = _without_tied(model, _linears_of_blocks(model, linears))
    else:
        chosen = {name: m for name, m in _candidates(model) if matches(config.target_modules, m, name)}
    if config.exclude_modules is not None:
        chosen = {name: m for name, m in chosen.items() if not matches(config.exclude_modules, m, name)}
    already = any(isinstance(m, PSTLayer) for m in model.modules())
    if not chosen and not already:
        raise ValueError(_nothing_matched(config, linears))
    chosen = {name: m for name, m in chosen.items() if not isinstance(m, PSTLayer)}
    for name, module in chosen.items():
        _check(model, name, module)
    return chosen


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that make up the task head: outside the base model of a transformers model, else the last
    linear.

    A head whose weight is tied to the base model's (an lm_head tied to the embedding) is not trained by default.
    """
    base_name = getattr(model, "base_model_prefix", "")
    base = getattr(model, base_name, None) if base_name else None
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(p) for p in base.parameters()}
        children = [name for name, child in model.named_children() if child is not base]
        return [n for n in children if all(id(p) not in inside for p in model.get_submodule(n).parameters())]
    if base_name or len(list(model.children())) == 0:  # a bare transformers model, or a bare linear, has no head
        return []
    if _has_blocks(model):
        linears = [name for name, m in model.named_modules() if _is_linear(m) and not _in_block(model, name)]
    else:
        linears = [name for name, m in model.named_modules() if _is_linear(m)]
    return linears[-1:]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, PSTLayer)) or is_conv1d(module)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, and what looks like one: a layer of another library that a user names must be refused, not
    skipped.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_linear(module) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
            yield name, module


def _linears_of_blocks(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
    inside = {name: m for name, m in linears.items() if _in_block(model, name)}
    if inside:
        return inside
    names = list(linears)
    return {name: linears[name] for name in (names[:-1] if len(names) > 1 else names)}


def _has_blocks(model: nn.Module) -> bool:
    return any(_is_linear(m) and _in_block(model, name) for name, m in model.named_modules())


def _in_block(model: nn.Module, name: str) -> bool:
    """Whether a layer lies under an nn.ModuleList of a transformers model, be that the model itself or a part of it.

    A home-made model may keep anything in a ModuleList, its head too.
    """
    module, in_transformers = model, is_transformers_model(model)
    for child in name.split(".")[:-1]:
        module = module.get_submodule(child)
        if in_transformers and isinstance(module, nn.ModuleList):
            return True
        in_transformers = in_transformers or is_transformers_model(module)
    return False


def _without_tied(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
    uses = parameter_uses(model)
    tied = [name for name, m in linears.items() if uses[id(m.weight)] > 1]
    if tied:
        logger.warning("left dense, because their weights are tied to other modules: %s", ", ".join(tied))
    return {name: m for name, m in linears.items() if name not in tied}


def parameter_uses(model: nn.Module) -> Counter[int]:
    """How many different modules hold each parameter, by id."""
    return Counter(id(p) for m in model.modules() for p in m._parameters.values() if isinstance(p, Tensor))


def _nothing_matched(config: PSTConfig, linears: dict[str, nn.Module]) -> str:
    message = f"target_modules={config.target_modules!r} matches no linear layer"
    if config.exclude_modules is not None:
        message += f" outside exclude_modules={config.exclude_modules!r}"
    if not linears:
        return f"{message}; the model has none"
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linears})
    wanted = config.target_modules
    wanted = [wanted] if isinstance(wanted, str) else [] if callable(wanted) else list(wanted)
    names = [*suffixes, *linears]
    near = sorted({match for w in wanted for match in difflib.get_close_matches(w, names, 3, 0.5)})
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"its linear layers end in {', '.join(suffixes)}"
    return f"{message}; {hint} (a list matches suffixes, a string must match a whole name as a regular expression)"


def _check(model: nn.Module, name: str, module: nn.Module) -> None:
    exclude = f"leave it out with exclude_modules=[{name!r}]"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
        raise TypeError(
            f"{name} sits in a {type(parent).__qualname__}, whose fast path reads the weight without calling the layer;"
            f" {exclude}"
        )
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if type(module) is not nn.Linear and not is_conv1d(module):
        raise TypeError(f"{name} is a {kind}, which PST cannot convert (only nn.Linear and Conv1D); {exclude}")
    if parametrize.is_parametrized(module):
        raise TypeError(f"{name} is parametrised; remove the parametrisation first, or {exclude}")
    weight = module.weight
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            f"{name} has a weight of type {type(weight).__qualname__}, sharded over processes already; call"
            " replace_linear before fully_shard or parallelize_module"
        )
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATING:
        raise TypeError(
            f"{name} has a weight of type {type(weight).__qualname__} and dtype {weight.dtype}; quantised or otherwise"
            f" special weights are not supported: load the model in float32, float16 or bfloat16, or {exclude}"
        )
    if hasattr(module, "_hf_hook"):
        raise RuntimeError(
            f"{name} is managed by an accelerate hook (device_map or CPU offload);"
            " convert the model before dispatching it"
        )
    if not weight.is_meta:
        check_finite(weight, f"the weight of {name}", "the checkpoint is damaged or was trained to divergence")
