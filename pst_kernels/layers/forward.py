"""A forward of a PST layer: what it checks and makes is held for the next one, which looks whether that still holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..functional import NOTHING_MADE, UNTALLIED, Made, Options, check, masked_linear, operand_dtype
from ..masks import due
from ..masks.refresh import MaskState, Weights, refresh
from ..operands import MaskedWeight
from . import averages, reads
from .checks import PLAIN
from .kept import keeps, takes_lists
from .recompute import producer_of
from .rested import masked_with
from .resting import Resting

NAMES = ("bias", "weight", "pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C")


class Ready(NamedTuple):
    """What was checked and made for forwards like the last one."""

    dtype: torch.dtype  # of x and of the product
    device: torch.device
    operands: MaskedWeight
    parameters: tuple[Tensor | None, ...]  # of the layer, in the order of its `NAMES`
    made: Made  # M * W' for the product
    options: Options
    state: MaskState | None  # of the layer
    addresses: int  # of the weight and the factors, summed up
    look: int  # of the watch, after which it was made
    added: int = due.NOTHING  # version and address of the trained kept weights


class Forward(Resting):
    """The part of `PSTLayer` that a forward runs through."""

    _ready: Ready | None
    _kept_weight: Tensor | None

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.merged:
            return self._merged_forward(x)
        ready = self._ready
        fits = ready is not None and not torch.compiler.is_compiling() and self._fits(ready, x)
        if ready is None or not fits or not self._is_fresh(ready):
            if (shards := self._tensor_parallel()) is not None:
                self.called = True
                return shards.forward(self, x)
            ready = self._renewed(ready if ready is not None and fits else self._checked(x), x)
            if not torch.compiler.is_compiling():
                self.called = True
        if self.scores_rest and ready.options.block_size is None:
            return self._rested_forward(x, ready)
        if ready.made.masked is not None and not ready.options.kept:  # in a buffer that the next layer overwrites
            self._ready = ready._replace(made=NOTHING_MADE)
        producer = producer_of(x) if self.config.recompute_input else None
        made = ready.made._replace(waiting=self.pst_kept) if self.kept_wait else ready.made
        bias = ready.parameters[0] if ready.parameters else self.bias
        tallied = UNTALLIED if self.moments is None or ready.options.kernels is not None else self.moments.tallied()
        return masked_linear(x, ready.operands, bias, ready.dtype, ready.options, made, producer, tallied)

    def _fits(self: Any, ready: Ready, x: Tensor) -> bool:
        """Whether what was checked for `ready` holds for a forward of x: the same tensors, and an x of this kind."""
        held, buffers, weight = self._parameters, self._buffers, ready.operands.weight
        if ready.state is None or x.dtype is not ready.dtype or torch.is_autocast_enabled(weight.device.type):
            return False
        for name, parameter in zip(NAMES, ready.parameters, strict=True):
            if held.get(name) is not parameter:
                return False
        return (
            x.device == ready.device
            and x.dim() > 0
            and x.shape[-1] == weight.shape[1]
            and not weight.requires_grad
            and buffers["pst_mask"] is ready.operands.mask
            and buffers["pst_num_pruned"] is ready.state.num_pruned
            and ready.addresses == due.addresses_of(ready.parameters[1:])
        )

    def _is_fresh(self: Any, ready: Ready) -> bool:
        """Whether nothing has changed that a look can tell: a forward needs nothing but its product."""
        watch = self.watch
        return (
            ready.look == watch.looks
            and watch.is_fresh(self._buffers["pst_num_pruned"], ready.parameters[1:])
            and watch.mask == due.total_of((self._buffers["pst_mask"],))
            and (ready.added == due.NOTHING or ready.added == due.total_of((self.pst_kept,)))
        )

    @property
    def _any_mask(self: Any) -> bool:
        """Whether M * W' may be made before a product: with blocks the product itself skips."""
        return self.pattern.with_masked_weight or (self.frozen and self.pattern.block_size is None)

    def _checked(self: Any, x: Tensor) -> Ready:
        """Check the operands of a forward of x; nothing is made yet."""
        weight, factors, dtype, config = self.oriented_weight, self.factors, operand_dtype(x), self.config
        operands = MaskedWeight(weight, factors, self.pst_mask, self.scales)
        check(x, operands, self.bias)
        self.refuse_parts(weight)
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "a PST layer does not run under the transforms of torch.func (grad, vmap, jvp, ...), which would need"
                " their own rules; use torch.autograd, or merge the layer first"
            )
        # with a fixed mask no gradient passes by way of a score
        through = config.through_magnitude and not self.frozen
        options = Options(through, False, self.pattern.block_size, self.mask_interval)
        if compiling or type(weight) not in PLAIN:
            options = options._replace(weighed=self.moments is not None)
            return Ready(dtype, x.device, operands, (), NOTHING_MADE, options, None, due.NOTHING, -1)
        kernels: Any = ops.kernels_for(weight.device.type)
        any_mask = self._any_mask
        keep = any_mask and config.products != "sparse" and keeps(config.masked_weight, weight, dtype)
        parameters = tuple(self._parameters.get(name) for name in NAMES)
        addresses = due.NOTHING if None in parameters[1:] else due.addresses_of(parameters[1:])
        if self.moments is not None:
            kernels = self.weighed_room(weight.device.type)
        elif self.pattern.with_masked_weight and addresses != due.NOTHING and hasattr(kernels, "bound_to"):
            kernels = kernels.bound_to(operands, dtype) or kernels
        options = options._replace(kept=keep, kernels=kernels, weighed=self.moments is not None)
        return Ready(dtype, x.device, operands, parameters, NOTHING_MADE, options, self.mask_state(), addresses, -1)

    def _renewed(self: Any, ready: Ready, x: Tensor) -> Ready:
        """With a mask that is up to date, and M * W' where it is made before a product.

        The pass that makes a mask makes M * W' too. An op does it under a compiler, and for tensors of other kinds.
        """
        kernels, config, dtype, (weight, factors, *_) = ready.options.kernels, self.config, ready.dtype, ready.operands
        state, added = ready.state, self.added()
        if state is None:
            self.refresh_mask()
            if added.weights is None:
                return ready
            with torch.no_grad(), ops.without_autocast(weight.device.type):
                made = Made(masked_with(ready.operands, added, dtype))
            return Ready(dtype, ready.device, ready.operands, (), made, ready.options, None, due.NOTHING, -1)
        if torch.is_inference_mode_enabled() and not self.pst_mask.is_inference():
            with torch.inference_mode(False):  # what is made in an evaluation must serve training too
                return self._renewed(ready, x)
        reads.notice_rewritten(self)
        averages.mend(self)
        keep, lists = ready.options.kept, self._any_mask and not ready.options.kept
        by_lists = lists and takes_lists(config.products, kernels, weight, dtype, self.pst_num_pruned)

        def room() -> Tensor | None:
            if keep:
                return self._room_to_keep(weight, dtype)
            return kernels.forward_scratch(x.numel() // max(1, x.shape[-1]), dtype, weight, factors.weight_rank)

        with torch.no_grad(), ops.without_autocast(weight.device.type):
            masked = refresh(kernels, Weights(weight, factors, self._scales), state, self.watch, room)
            size = ready.options.block_size
            if size is not None and hasattr(kernels, "keep_lists") and dtype is not torch.float64:  # which they refuse
                kernels.keep_lists(self.pst_mask, weight.shape, size)
            if self.frozen and by_lists:
                made = self._fixed_lists(factors, dtype)
            else:
                if masked is None and (keep or by_lists or added.weights is not None):
                    into = self._room_to_keep(weight, dtype) if keep else None
                    masked = masked_with(ready.operands, added, dtype, into)
                made = Made(None, *kernels.lists.make(masked, self.pst_mask)) if by_lists else Made(masked)
        version = due.NOTHING if added.weights is None else due.total_of((added.weights,))
        ready = Ready(*ready[:4], made, *ready[5:8], self.watch.looks, version)
        # Under autocast x and the product differ in their dtype, and a parametrised factor is no parameter of the
        # layer: every forward looks at all of it again.
        self.__dict__["_ready"] = ready if x.dtype == dtype and ready.addresses != due.NOTHING else None
        return ready

    def _room_to_keep(self: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Where M * W' (out, in) is kept: the same place from step to step, which a captured graph reads."""
        kept = self._kept_weight
        if kept is None or kept.dtype != dtype or kept.device != weight.device:
            kept = self._kept_weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        torch.autograd.graph.increment_version(kept)  # a backward that still needs what was there must say so
        return kept

    def can_be_grouped(self: Any) -> bool:
        """Whether a grouped pass can make this layer's mask, where its device has one."""
        by_pass = self.pattern.with_masked_weight and self._parameters["weight"].dtype != torch.float64
        return by_pass and self.moments is None and self.is_whole()

    def is_whole(self: Any) -> bool:
        """Whether its mask can be made outside of a forward: nothing is sharded, merged or fixed."""
        plain = type(self._parameters.get("pst_U")) is nn.Parameter and type(self._buffers["pst_num_pruned"]) is Tensor
        return plain and not self.merged and not self.frozen

    def grouped_tensors(self: Any) -> tuple[Any, ...]:
        """What a grouped pass takes: the weight (out, in) to the mask, and room for M * W', or None."""
        ready = self._ready
        weight, guess = self.oriented_weight, self.pst_guess.view(torch.float32)
        masked = self._room_to_keep(weight, ready.dtype) if ready is not None and ready.options.kept else None
        return weight, self.factors, self._scales, self.pst_num_pruned, guess, self.pst_mask, masked

    def note_grouped_mask(self: Any, watched: tuple[Tensor, ...], count: Any, total: int) -> None:
        """The mask of these tensors, and M * W' where there was room for it, were made in a grouped pass."""
        watch = self.watch
        ready: Ready | None = self._ready
        watch.note_look(count, total, watched, made=True, mask=self.pst_mask)
        if ready is None:
            return
        masked = self._kept_weight if ready.options.kept else None
        if ready.look != watch.looks or ready.made.masked is not masked:  # else all of it is where it was
            # past nn.Module's own __setattr__, which looks for parameters
            self.__dict__["_ready"] = Ready(*ready[:4], Made(masked), *ready[5:8], watch.looks)

    def _merged_forward(self: Any, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("this layer is merged, so its factors would not train; call unmerge() first")
        return torch.nn.functional.linear(x, self.oriented_weight, self.bias)
