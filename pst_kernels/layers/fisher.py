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

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..functional import Tallied
from ..masks.refresh import Weights, refresh
from ..operands import Factors, MaskedWeight, Needs
from ..weighing import WeighedRoom
from . import fisher_sums
from .checks import PLAIN
from .fisher_sums import MOMENTS

DECAY = 0.99  # of the running sums at a step; where they start does not count, as only their ratios do


class Moments:
    """The second moments of one layer's gradient: the buffer of that name, and what is to join it."""

    def __init__(self, buffers: dict[str, Any], shape: tuple[int, int]):
        # the layer's own dict, not the layer: what a backward holds must not keep a model alive in a cycle
        self.buffers, self.shape = buffers, shape
        self.seen: Tensor | None = None  # the sums over what backwards have seen since the last step, and how many
        self._waiting = False  # whether any has, but in compiled graphs
        self.place_tally()
        fisher_sums.watch_wrappers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        fisher_sums.watch_wrappers()

    @property
    def waiting(self) -> bool:
        """Whether anything has been seen that is to join."""
        return self._waiting or self.tally.grad is not None

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
        self._waiting = True

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
        self._waiting, self.tally.grad = False, None


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

    def refuse_parts(self: Any, weight: Tensor) -> None:
        """Raise RuntimeError where |W'| is to be weighed for a weight of which others hold parts or copies."""
        is_copy = getattr(self, "_is_replica", False) and torch.is_grad_enabled()
        if self.moments is not None and (is_copy or type(weight) not in PLAIN):
            raise RuntimeError(fisher_sums.ELSEWHERE)
