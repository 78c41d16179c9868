"""Which layers of a model PST converts, and which parameters stay trainable beside the factors."""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bypass import weights_read_past_their_layers
from .config import ALL_LINEAR, PSTConfig, matches
from .layers.checks import is_conv1d
from .layers.experts import ExpertWeights, PSTExperts, expert_weights
from .layers.pst_layer import PSTLayer
from .refusals import check_layer, check_model, listed, shortened, why_not

logger = logging.getLogger("pst_kernels")
HEAD = re.compile(r"head|classifier")


def is_transformers_model(module: nn.Module) -> bool:
    return any(
        k.__name__ == "PreTrainedModel" and k.__module__.startswith("transformers.") for k in type(module).__mro__
    )


def find_targets(model: nn.Module, config: PSTConfig) -> dict[str, Any]:
    """Name -> layer, or `ExpertWeights`, of everything to convert, PST layers left out; checked, so that conversion
    cannot fail half-way.

    Under "all-linear" a layer that PST cannot train (a quantised or parametrised one, say) stays dense, with a warning;
    one that was named raises TypeError. Raises ValueError when nothing matches (naming near misses), for a name of a
    list that matches nothing, or a weight that is not finite; TypeError or RuntimeError for a model that is not ready:
    one with adapters of PEFT, offloaded, or cut over processes.
    """
    check_model(model)
    linears = dict(_candidates(model))
    _check_names(model, linears, config)
    named = config.target_modules != ALL_LINEAR
    if named:
        chosen = {name: m for name, m in linears.items() if _matches(config.target_modules, m, name)}
    else:
        chosen = _of_blocks(model, linears)
    if config.exclude_modules is not None:
        chosen = {name: m for name, m in chosen.items() if not _matches(config.exclude_modules, m, name)}
    already = any(isinstance(m, PSTLayer) for m in model.modules())
    if not chosen and not already:
        raise ValueError(_nothing_matched(model, config, linears))
    chosen = {name: m for name, m in chosen.items() if not isinstance(m, PSTLayer)}
    bypassed = weights_read_past_their_layers(model) if chosen else {}
    reasons = {name: reason for name, m in chosen.items() if (reason := why_not(model, name, m, bypassed, named))}
    for asked, why in (
        (config.train_kept, "belongs to experts, whose kept weights PST does not train (train_kept)"),
        (config.magnitude != "plain", "belongs to experts, whose magnitudes PST does not weigh (magnitude='fisher')"),
    ):
        if asked:
            experts = {name for name, m in chosen.items() if isinstance(m, ExpertWeights)} - reasons.keys()
            reasons |= dict.fromkeys(sorted(experts), why)
    if named:
        for name, reason in reasons.items():
            raise TypeError(f"{name} {reason}; leave it out with exclude_modules=[{name!r}]")
    else:
        chosen = _without(model, chosen, reasons, already)
    for name, module in chosen.items():
        check_layer(name, module)
    return chosen


def _without(
    model: nn.Module, chosen: dict[str, nn.Module], reasons: dict[str, str], already: bool
) -> dict[str, nn.Module]:
    """What "all-linear" can convert of what it chose; says what stays dense."""
    chosen = {name: m for name, m in chosen.items() if name not in reasons}
    uses = parameter_uses(model)
    tied = [name for name, m in chosen.items() if uses[weight_key(_weight(m))] > 1]
    left = {name: m for name, m in chosen.items() if name not in tied}
    if not left and not already:
        every = reasons | dict.fromkeys(tied, "has a weight that is tied to another module's")
        raise ValueError(f"target_modules={ALL_LINEAR!r} finds no layer that PST can convert: {listed(every)}")
    if tied:
        logger.warning("left dense, because their weights are tied to other modules: %s", ", ".join(tied))
    if reasons:
        logger.warning("left dense, because PST cannot convert them: %s", listed(reasons))
    return left


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that make up the task head: outside the base model of a transformers model, or its output
    layers where it has no base model, else the last linear.

    A head whose weight is tied to the base model's (an lm_head tied to the embedding) is not trained by default.
    """
    base_name, base = _base(model)
    if base is not None:
        inside = {id(p) for p in base.parameters()}
        children = [name for name, child in model.named_children() if child is not base]
        return [n for n in children if all(id(p) not in inside for p in model.get_submodule(n).parameters())]
    if base_name:
        uses = parameter_uses(model)
        outputs = {name: model.get_submodule(name) for name in sorted(_outputs(model))}
        untied = [n for n, m in outputs.items() if all(uses[weight_key(p)] == 1 for p in m.parameters())]
        return [n for n in untied if not any(n.startswith(f"{other}.") for other in untied)]
    if len(list(model.children())) == 0:  # a bare linear has no head
        return []
    linears = [name for name, m in _candidates(model) if not isinstance(m, (ExpertWeights, PSTExperts))]
    if any(_in_block(model, name) for name in linears):
        linears = [name for name in linears if not _in_block(model, name)]
    return linears[-1:]


def _base(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The name that a transformers model's class has for its base model, and that base model if it is a part."""
    name = getattr(model, "base_model_prefix", "")
    base = getattr(model, name, None) if name else None
    return name, base if isinstance(base, nn.Module) and base is not model else None


def _outputs(model: nn.Module) -> set[str]:
    """Names of output layers: what transformers models say are theirs, and lists of linears outside of their base
    models or with a head's name.
    """
    found = set()
    names = {id(m): name for name, m in model.named_modules()}
    for prefix, part in model.named_modules():
        if not is_transformers_model(part):
            continue
        try:
            output = part.get_output_embeddings()
        except (NotImplementedError, AttributeError):
            output = None
        if isinstance(output, nn.Module) and id(output) in names:
            found.add(names[id(output)])
        _, base = _base(part)
        in_base = set() if base is None else {id(m) for m in base.modules()}
        for name, module in part.named_modules():
            if not isinstance(module, nn.ModuleList) or not len(module) or not all(map(_is_linear, module)):
                continue
            nested = any(piece.isdigit() for piece in name.split("."))
            outside = base is not None and id(module) not in in_base
            if not nested and (outside or HEAD.search(name.rpartition(".")[2])):
                found.add(f"{prefix}.{name}" if prefix else name)
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, PSTLayer)) or is_conv1d(module)


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers, the weights of experts, and what looks like a linear layer: one of another library that a user
    names must be refused, not skipped.
    """
    known: dict[int, list[ExpertWeights]] = {}  # a module used in two places has its weights once
    for name, module in model.named_modules(remove_duplicate=False):
        for weights in known.setdefault(id(module), expert_weights(module)):
            yield f"{name}.{weights.parameter}" if name else weights.parameter, weights
        if isinstance(module, PSTExperts):
            yield module.entry(name, "weight"), module
        elif _is_linear(module) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
            yield name, module


def _of_blocks(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What "all-linear" means: the linears of repeated blocks; without blocks all but the head. Never an output."""
    outputs = _outputs(model)
    linears = {name: m for name, m in linears.items() if not any(f"{name}.".startswith(f"{o}.") for o in outputs)}
    inside = {name: m for name, m in linears.items() if _in_block(model, name)}
    if inside:
        return inside
    heads = [f"{name}." for name in head_modules(model)]
    if heads:
        return {name: m for name, m in linears.items() if not f"{name}.".startswith(tuple(heads))}
    names = list(linears)
    return {name: linears[name] for name in (names[:-1] if len(names) > 1 else names)}


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


def parameter_uses(model: nn.Module) -> Counter[tuple[int, ...]]:
    """How many different modules hold each parameter, by `weight_key`."""
    return Counter(weight_key(p) for m in model.modules() for p in m._parameters.values() if isinstance(p, Tensor))


def weight_key(parameter: Tensor) -> tuple[int, ...]:
    """Tells parameters apart; those that were tied through `tensor.data` share their numbers, and so their key."""
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and parameter.device.type != "meta"
    if plain and parameter.numel():
        return parameter.data_ptr(), *parameter.shape
    return (id(parameter),)


def _weight(module: Any) -> Tensor:
    return module.weight


class BlockWeights(NamedTuple):
    """How many numbers the matrices of a model's blocks have."""

    total: int
    under_pst: int
    in_no_linear: dict[str, int]  # by name: in no linear layer, nor in experts that PST knows


def block_weights(model: nn.Module) -> BlockWeights:
    reached: set[int] = set()
    under: set[int] = set()
    for _, module in _candidates(model):
        of_experts = isinstance(module, (ExpertWeights, PSTExperts))
        reached |= {id(module.weight)} if of_experts else set(map(id, module._parameters.values()))
        if isinstance(module, PSTLayer):
            under.add(id(module.weight))
    total, under_pst, others = 0, 0, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not _in_block(model, f"{name}."):
            continue
        for entry, p in module._parameters.items():
            if p is None or p.dim() < 2 or entry.startswith("pst_") or entry.endswith("bias"):
                continue
            total += p.numel()
            under_pst += p.numel() if id(p) in under else 0
            if id(p) not in reached:
                others[f"{name}.{entry}"] = p.numel()
    return BlockWeights(total, under_pst, others)


def _matches(targets: Any, module: Any, name: str) -> bool:
    """A callable is asked about the module of experts that holds a weight."""
    return matches(targets, getattr(module, "owner", module), name)


def _check_names(model: nn.Module, linears: Mapping[str, nn.Module], config: PSTConfig) -> None:
    """Raise ValueError for a name that nothing has beside others that match, and so would go unnoticed."""
    wanted = config.target_modules
    if isinstance(wanted, list):
        unknown = [w for w in wanted if not any(_matches([w], m, n) for n, m in linears.items())]
        if unknown and len(unknown) < len(wanted):
            raise ValueError(
                f"target_modules names {unknown[0]!r}, which matches no linear layer{_parameter(model, unknown[0])};"
                f" {_near([unknown[0]], linears)}"
            )
    excluded = config.exclude_modules
    if excluded is None or callable(excluded):
        return
    modules = dict(linears) | {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    for wanted in [excluded] if isinstance(excluded, str) else excluded:
        entry = wanted if isinstance(excluded, str) else [wanted]
        found = [name for name, m in modules.items() if _matches(entry, m, name)]
        if not found:
            raise ValueError(f"exclude_modules names {wanted!r}, which matches nothing; {_near([wanted], linears)}")
        if not any(name in linears or not _goes_on(name, linears, excluded) for name in found):
            inside = rf"(.*\.)?{re.escape(found[0].rpartition('.')[2])}\..*"
            raise ValueError(
                f"exclude_modules names {wanted!r}, which holds linear layers but is none; to leave out all of them"
                f" give a regular expression: exclude_modules={inside!r}"
            )


def _goes_on(name: str, linears: Mapping[str, nn.Module], excluded: Any) -> bool:
    """Whether a module holds linear layers that are not left out."""
    return any(n.startswith(f"{name}.") and not _matches(excluded, m, n) for n, m in linears.items())


def _parameter(model: nn.Module, wanted: str) -> str:
    for name, parameter in model.named_parameters():
        if name.endswith(f".{wanted}"):
            return f" ({name} is a parameter with {parameter.dim()} dimensions, which PST cannot convert)"
    return ""


def _near(wanted: list[str], linears: Mapping[str, nn.Module]) -> str:
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linears})
    names = [*suffixes, *linears]
    near = sorted({match for w in wanted for match in difflib.get_close_matches(w, names, 3, 0.5)})
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"its linear layers end in {', '.join(suffixes)}"


def _nothing_matched(model: nn.Module, config: PSTConfig, linears: dict[str, nn.Module]) -> str:
    message = f"target_modules={config.target_modules!r} matches no linear layer"
    if not linears:
        return f"{message}; the model has none"
    if config.target_modules == ALL_LINEAR and not _of_blocks(model, linears):
        return (
            f"{message} but the head: {shortened(linears)}, which trains in full; to prune that, name it:"
            f" target_modules={list(linears)!r}"
        )
    if config.exclude_modules is not None:
        message += f" outside exclude_modules={config.exclude_modules!r}"
    wanted = config.target_modules
    wanted = [wanted] if isinstance(wanted, str) else [] if callable(wanted) else list(wanted)
    hint = _near(wanted, linears)
    return f"{message}; {hint} (a list matches suffixes, a string must match a whole name as a regular expression)"
