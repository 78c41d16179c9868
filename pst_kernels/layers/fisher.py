"""`magnitude="fisher"`: |W'| in the score is weighed by sqrt(F), F the diagonal Fisher matrix E[G^2] of G = gy^T x.

Kept of it are the sums over its rows and its columns, out + in numbers, and F_ij is taken for r_i c_j / mean, which is
Adafactor's factored second moment (Shazeer and Stern 2018, arXiv 1804.04235); one for each weight would cost 4 bytes a
weight. F counts over its mean: so |W'| stays as large beside A B + R + C as without it, whatever the loss's scale.

    p = sqrt(r / mean r)      q = sqrt(c / mean c)
    S = p |W'| q + alpha1 A B + alpha2 (R + C)        Q = G * (M + p |W'| q)

All of G passes by in a backward (`weighed_backward` of cpu/ and triton/); one of a step in which the scores rest does
not make it, and leaves F and |W'|'s part of Q out. At an optimizer's step what its backwards have seen joins the
running sums. A compiled graph may write nothing that a later one reads: there what a backward sees is the gradient of a
tensor that has no other use, the tally.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .. import ops
from ..functional import Tallied
from ..masks import due
from ..masks.refresh import Weights, refresh
from ..operands import Factors, MaskedWeight, Needs
from ..weighing import WeighedRoom
from .checks import in_several_processes

MOMENTS = "pst_moments"  # fp32 (out + in,): the running sums of G^2 over rows, then over columns
DECAY = 0.99  # of the running sums at a step; where they start does not count, as only their ratios do


class Moments:
    """The second moments of one layer's gradient: the buffer of that name, and what is to join it."""

    def __init__(self, buffers: dict[str, Any], shape: tuple[int, int]):
        # the layer's own dict, not the layer: what a backward holds must not keep a model alive in a cycle
        self.buffers, self.shape = buffers, shape
        self.seen: Tensor | None = None  # the sums over what backwards have seen since the last step, and how many
        self.waiting = False  # whether any has, but in compiled graphs
        self.place_tally()
        self.wrapper: Any = None  # a weak reference to the DistributedDataParallel that the layer runs in

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"wrapper": None}

    @property
    def held(self) -> Tensor:
        """The running sums, fp32."""
        return self.buffers[MOMENTS]

    def place_tally(self) -> None:
        """On the device of the sums, wherever the layer goes."""
        self.tally = torch.zeros(sum(self.shape) + 1, device=self.held.device, requires_grad=True)

    def tallied(self) -> Tallied:
        """What the ops of a compiled graph take for |W'| to be weighed."""
        return Tallied(self.held, self.tally)

    def see(self, sums: Tensor) -> None:
        """Sums of G^2 of one backward, and a one."""
        if self.seen is None or self.seen.device != sums.device:
            self.seen = sums
        else:
            self.seen.add_(sums)  # in place, for a captured graph
        self.waiting = True

    def sums(self, device: torch.device) -> Tensor:
        """What is to join, fp32 (out + in + 1,)."""
        found = torch.zeros(sum(self.shape) + 1, dtype=torch.float32, device=device)
        for part in (self.seen, self.tally.grad):
            if part is not None:
                found += part.to(device)
        return found

    def join(self, sums: Tensor) -> None:
        """Let the mean over backwards join the running sums, if there is one and it is finite (a scaled loss's)."""
        mean, held = sums[:-1] / sums[-1], self.held
        if held.dtype is not torch.float32:  # model.to(torch.bfloat16) has rounded it
            held = self.buffers[MOMENTS] = held.float()
        held.copy_(torch.where(mean.isfinite().all(), held * DECAY + mean.to(held.device), held))
        if self.seen is not None:
            self.seen.zero_()
        self.waiting, self.tally.grad = False, None


class LayerRoom(WeighedRoom):
    """That of one layer, whose backwards are seen by its moments."""

    def __init__(self, kernels: Any, moments: Moments):
        super().__init__(kernels, lambda: moments.held)
        self.see = moments.see

    def linear_backward(
        self, gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs: Needs, split: Any = None
    ) -> tuple[Tensor, ...]:
        *found, sums = self.backward(gy, x, operands, through_magnitude, needs, split)
        if needs.factors:
            self.see(sums)
        return tuple(found)


class Weighs:
    """The part of `PSTLayer` that knows whether |W'| is weighed."""

    config: Any
    moments: Moments | None = None

    def _add_moments(self: Any, shape: tuple[int, int]) -> None:
        if self.config.magnitude == "fisher":
            _hook_optimizers()
            self.register_buffer(MOMENTS, torch.zeros(sum(shape), dtype=torch.float32, device=self.weight.device))
            self.moments = Moments(self._buffers, shape)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]  # of nn.Module
        if self.moments is not None:
            self.moments.place_tally()
        return self

    def weighed_room(self: Any, device_type: str) -> LayerRoom:
        return LayerRoom(ops.kernels_for(device_type), self.moments)

    @torch.no_grad()
    def refresh_weighed(self: Any, weight: Tensor, *factors: Tensor) -> None:
        """What the op refresh_mask does for a layer without moments."""
        if torch.compiler.is_compiling():
            ops.refresh_weighed_mask(weight, *factors, *self.scales, *self.mask_state(), self._buffers[MOMENTS])
            return
        with ops.without_autocast(weight.device.type):
            weights = Weights(weight, Factors(*factors), self.scales)
            refresh(self.weighed_room(weight.device.type), weights, self.mask_state(), self.watch)

    @torch.no_grad()
    def weighed_scores(self: Any, weight: Tensor, *factors: Tensor) -> Tensor:
        with ops.without_autocast(weight.device.type):
            return self.weighed_room(weight.device.type).scores(weight, Factors(*factors), self.scales)

    def refuse_sharded(self: Any) -> None:
        """Raise RuntimeError where |W'| is to be weighed for a weight of which others hold parts."""
        if self.moments is not None:
            raise RuntimeError("magnitude='fisher' does not run with sharded weights; use magnitude='plain' there")

    def notice_processes(self: Any) -> None:
        """Remember the DistributedDataParallel that this forward runs in.

        Raises RuntimeError where processes train together by other means: their moments, and masks, would differ.
        """
        if not in_several_processes() and not getattr(self, "_is_replica", False):  # of DataParallel
            return
        if torch.compiler.is_compiling():
            # a compiler that met the error itself would break its graph there, and go on
            torch.compiler.disable(magnitude_fisher_compiles_in_one_process_alone)()
        wrapper, known = nn.parallel.DistributedDataParallel._active_ddp_module, self.moments.wrapper
        if wrapper is not None:
            self.moments.wrapper = weakref.ref(wrapper)
        # the forward of activation checkpointing in a backward has no wrapper, but its first one had
        elif torch.is_grad_enabled() and (known is None or known() is None):
            raise RuntimeError(
                "magnitude='fisher' trains in one process, or in several under DistributedDataParallel; use"
                " magnitude='plain' with FSDP, tensor parallelism and DataParallel"
            )


def magnitude_fisher_compiles_in_one_process_alone() -> None:  # of which fullgraph=True shows the name alone
    raise RuntimeError(
        "magnitude='fisher' does not run in compiled graphs (torch.compile) where several processes train together; use"
        " magnitude='plain' there"
    )


@functools.cache
def _hook_optimizers() -> None:
    """Once a process, when its first such layer is made. Before the step: after it, masks are made."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    owned = [layer.moments for layer in due.owned_layers(optimizer) if layer.moments is not None]
    waiting = [moments for moments in owned if moments.waiting or moments.tally.grad is not None]
    found = {wrapper for m in waiting if m.wrapper is not None and (wrapper := m.wrapper()) is not None}
    if len(found) > 1:
        raise RuntimeError(
            f"{len(found)} models under DistributedDataParallel share an optimizer, in which magnitude='fisher' cannot"
            " tell whose moments come first; give each model an optimizer of its own"
        )
    for wrapper in found:
        # All of the model, in its order: each rank gives the same sums, whatever its optimizer owns.
        waiting = [m.moments for m in wrapper.module.modules() if isinstance(m, Weighs) and m.moments is not None]
        _join(waiting, wrapper.process_group)
        return
    _join(waiting)


@torch.no_grad()
def _join(every: Sequence[Moments], group: dist.ProcessGroup | None = None) -> None:
    """Let each join what it has seen, or what all ranks of a group have."""
    if not every:
        return
    device = every[0].held.device
    sums = [moments.sums(device) for moments in every]
    if group is not None:
        flat = torch.cat(sums)
        dist.all_reduce(flat, group=group)
        sums = list(flat.split([len(one) for one in sums]))
    for moments, one in zip(every, sums, strict=True):
        moments.join(one)
