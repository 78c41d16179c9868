"""Experts of a mixture, whose weights a transformers model keeps as 3-d Parameters (experts, out, in), under PST.

The model's own forward of its experts goes on, by whichever implementation its config names: it runs on a stand-in that
has M * W' in the place of each Parameter. Each expert has factors and a threshold of its own, as that many `PSTLinear`
would. The Parameter stays where it is, and so does its name in the state dict; beside it the module of experts gets a
child for each, `pst_gate_up_proj` for `gate_up_proj`, with factors and masks as stacks.

What it costs: M * W' of all experts is made once a forward and once a backward, or kept (kept.py), and exists, as G,
its gradient, does, for one module of experts at a time; between forward and backward autograd keeps nothing of W's
size, but in compiled graphs and under others' hooks on saved tensors. A step of Mixtral's eight experts of 512 x 1024
(fp32, 1,024 tokens, one core) takes 1.6 times as long as one that trains all their weights. Products by expert through
`masked_linear` would not make G as a whole, but for them the host must know how many tokens each expert has, and the
model's implementations (grouped products) were lost. `torch.nn.utils.parametrize` would make the weights at each
access, of which the plain forward has one an expert, and rename the Parameters.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..config import PSTConfig
from ..functional import masked_stack
from ..masks.packing import unpack_mask
from ..masks.refresh import Weights, refresh
from ..operands import MaskedWeight
from . import averages
from .checks import PLAIN
from .kept import keeps
from .pst_layer import FROZEN, NEVER, PSTLayer
from .recompute import hooks_on_saved_tensors

PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# Modules of experts outside of transformers' interface for them, and whether their weights lie as (experts, in, out).
OTHERS = {
    "Llama4TextExperts": True, "JetMoeParallelExperts": False, "LongcatFlashExperts": False, "Step3p7Experts": False,
    "InklingSharedExperts": False,
}  # fmt: skip
PREFIX = "pst_"


class ExpertWeights:
    """The 3-d Parameter of a module of experts that can be converted."""

    def __init__(self, owner: Any, parameter: str, transposed: bool):
        self.owner, self.parameter, self.transposed = owner, parameter, transposed

    @property
    def weight(self) -> Any:
        return self.owner._parameters[self.parameter]

    @property
    def bias(self) -> Any:
        return self.owner._parameters.get(f"{self.parameter}_bias")

    def oriented(self, weight: Tensor) -> Tensor:
        """As (experts, out, in)."""
        return weight.mT if self.transposed else weight

    def entry(self, name: str, what: str) -> str:
        """As of the layer that they become."""
        return _entry(name, self.parameter, what)

    def layer_name(self, name: str) -> str:
        """What the layer will be called whose Parameter is called `name`."""
        owner, dot, _ = name.rpartition(".")
        return f"{owner}{dot}{PREFIX}{self.parameter}"


def expert_weights(module: nn.Module) -> list[ExpertWeights]:
    """Those of a module of experts, told without importing transformers; converted ones are left out."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return []
    names: tuple[str, ...] = PARAMETERS
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # of use_experts_implementation
        transposed = bool(module.is_transposed)
    elif kind.__name__ in OTHERS:
        names, transposed = (*PARAMETERS, "weight"), OTHERS[kind.__name__]
    else:
        return []
    return [
        ExpertWeights(module, name, transposed)
        for name in names
        if getattr(module._parameters.get(name), "ndim", 0) == 3 and f"{PREFIX}{name}" not in module._modules
    ]


class PSTExperts(PSTLayer):
    """One matrix of every expert of a mixture under PST: factors and masks as `PSTLayer` has them, stacked.

    `pst_num_pruned` is the count of each expert. Calling it gives M * W' as the model's Parameter lies.
    """

    def __init__(self, weights: ExpertWeights, config: PSTConfig | None = None):
        super().__init__()
        self.parameter, self.transposed = weights.parameter, weights.transposed
        self._owner = (weights.owner,)  # in a tuple: the owner is no part of this module
        self._kept_at = -1  # the look of the watch after which the kept M * W' was made
        self._add_factors(config)
        self.train(weights.owner.training)

    @classmethod
    def attach(cls, weights: ExpertWeights, config: PSTConfig | None = None) -> PSTExperts:
        """Put such weights under PST, in place."""
        layer, owner = cls(weights, config), weights.owner
        owner.add_module(f"{PREFIX}{weights.parameter}", layer)
        owner.forward = functools.partial(_forward, owner)
        return layer

    def detach(self) -> None:
        """Leave the Parameter to the model as it is."""
        owner = self._owner[0]
        del owner._modules[f"{PREFIX}{self.parameter}"]
        if not any(isinstance(child, PSTExperts) for child in owner.children()):
            del owner.forward

    @property  # type: ignore[misc]
    def weight(self) -> Any:
        """The frozen Parameter, which the module of experts holds."""
        owner = self._owner[0]
        held = owner._parameters.get(self.parameter)
        if held is None:  # wrappers that take parameters apart put a plain tensor there
            held = owner.__dict__.get(self.parameter)
        if held is None:
            raise RuntimeError(
                f"{self.full_name or self.parameter} is no parameter of its module any more: parametrised after the"
                " conversion, as by PEFT's target_parameters, past the mask; call pst_kernels.merge_and_unload(model)"
                " before that"
            )
        return held

    @property
    def bias(self) -> Any:
        return self._owner[0]._parameters.get(f"{self.parameter}_bias")

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def entry(self, name: str, what: str) -> str:
        return _entry(name, self.parameter, what)

    @property
    def mask(self) -> Tensor:
        """bool (experts, out, in), True for kept weights; up to date."""
        self.refresh_mask()
        out, columns = self._shape
        return unpack_mask(self.pst_mask.flatten(0, 1), columns).view(-1, out, columns)

    def can_be_grouped(self) -> bool:
        return False

    def forward(self) -> Tensor:  # type: ignore[override]
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("these experts are merged, so their factors would not train; call unmerge() first")
            return self.weight
        kept = self._prepare()
        interval = 0
        if self.scores_rest:
            interval = NEVER
        elif self.pattern.block_size is not None:
            interval = self.config.mask_interval
        # with a fixed mask no gradient passes by way of a score
        through_magnitude = self.config.through_magnitude and not self.frozen
        return self.oriented(masked_stack(self.operands, through_magnitude, kept, interval))

    @property
    def operands(self) -> MaskedWeight:
        return MaskedWeight(self.oriented_weight, self.factors, self.pst_mask, self.scales)

    def _prepare(self) -> Tensor | None:
        """Bring the masks up to date; M * W' if it is kept."""
        weight, factors = self.oriented_weight, self.factors
        if torch.compiler.is_compiling() or type(self.weight) not in PLAIN:
            self.refresh_mask()
            return None
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "experts under PST do not run under the transforms of torch.func (grad, vmap, jvp, ...), which would"
                " need their own rules; use torch.autograd, or merge the model first"
            )
        averages.mend(self)
        factors.of_expert(0).check(weight[0])
        kernels, state, dtype = ops.kernels_for(weight.device.type), self.mask_state(), weight.dtype
        keep = keeps(self.config.masked_weight, weight, dtype)
        with_masked = keep and self.pattern.with_masked_weight
        # What is made in an evaluation must serve training too.
        inference = torch.is_inference_mode_enabled() and self.pst_mask.is_inference()
        with torch.inference_mode(inference), torch.no_grad(), ops.without_autocast(weight.device.type):
            made = refresh(
                kernels, Weights(weight, factors, self._scales), state, self.watch,
                functools.partial(self._room_to_keep, weight, dtype) if with_masked else None,
            )  # fmt: skip
            if keep and made is None and self._kept_at != self.watch.looks:
                made = ops.masked_weight(weight, *factors, self.pst_mask, *self._scales, dtype)
                self._room_to_keep(weight, dtype).copy_(made)
        self._kept_at = self.watch.looks if keep else -1
        return self._kept_weight if keep else None

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        frozen = state_dict.pop(f"{prefix}{FROZEN}", None)
        if frozen is not None:  # the module of experts has loaded M * W' under the Parameter's own name
            if metadata.get("assign_to_params_buffers", False):
                self._owner[0]._parameters[self.parameter] = nn.Parameter(frozen, requires_grad=False)
            else:
                with torch.no_grad():
                    self.weight.copy_(frozen)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kept_at = -1

    def extra_repr(self) -> str:
        experts, out, columns = self.oriented_weight.shape
        ranks = f"weight_rank={self.config.weight_rank}, score_rank={self.config.score_rank}"
        return f"{experts}, out={out}, in={columns}, {ranks}"


def _entry(name: str, parameter: str, what: str) -> str:
    owner, dot, _ = name.rpartition(".")
    return f"{owner}{dot}{parameter}" + {"weight": "", "bias": "_bias"}[what]


def _forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module of experts with M * W' for its weights.

    On a stand-in, which shares all else with it: nothing of the module is changed, so that threads may run it at once.
    """
    stand_in = object.__new__(type(owner))
    stand_in.__dict__.update(owner.__dict__)
    layers = [child for child in owner.children() if isinstance(child, PSTExperts)]
    masked = [layer() for layer in layers]
    for layer, weight in zip(layers, masked, strict=True):
        stand_in.__dict__[layer.parameter] = weight
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or hooks_on_saved_tensors():
        return type(owner).forward(stand_in, *args, **kwargs)
    remade = {
        weight.untyped_storage().data_ptr(): layer.operands
        for layer, weight in zip(layers, masked, strict=True)
        if weight.requires_grad and layer._kept_at < 0
    }
    with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, remade), _unpack):
        return type(owner).forward(stand_in, *args, **kwargs)


class _Remade(NamedTuple):
    """A part of M * W', as what it is made of again for the backward."""

    operands: MaskedWeight
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(remade: dict[int, MaskedWeight], tensor: Tensor) -> Tensor | _Remade:
    operands = remade.get(tensor.untyped_storage().data_ptr())
    if operands is None:
        return tensor.detach()  # one that holds the node that keeps it would never be freed
    return _Remade(operands, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _Remade) -> Tensor:
    """The node of M * W' has kept the operands as well, and raises when they were changed since."""
    if isinstance(kept, Tensor):
        return kept
    (weight, factors, mask, scales), dtype, shape, stride, offset = kept
    single = weight[0].numel()
    length = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    some = slice(offset // single, -(-(offset + length) // single))  # of the experts
    made = ops.masked_weight(weight[some], *(factor[some] for factor in factors), mask[some], *scales, dtype)
    return made.as_strided(shape, stride, offset - some.start * single)
