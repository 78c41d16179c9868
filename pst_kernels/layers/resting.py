"""Resting: when a PST layer's scores rest, and what it is from the freeze on.

Between two gradients of the scores (`score_interval`) and after the freeze, U, V and, if they train, the kept weights
learn alone (rested.py). A fixed mask stays until `unfreeze_mask`, through saving and loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import PSTConfig
from ..functional import Made
from ..masks import due
from ..masks.patterns import Pattern
from ..operands import Factors
from . import averages
from .checks import whole
from .fixed import FixedMask
from .recompute import producer_of
from .rested import Added, Rest, rested_linear

KEPT = "pst_kept"  # the trained kept weights
OF_SCORES = ("pst_A", "pst_B", "pst_R", "pst_C")


def _before_step(optimizer: torch.optim.Optimizer, layers: Sequence[Any]) -> None:
    """What rests has no gradient: DistributedDataParallel makes zeros of none, with which an optimizer would go on."""
    for layer in layers:
        if layer.config.freeze:
            for name in OF_SCORES if layer.frozen else (KEPT,):
                parameter = layer._parameters.get(name)
                if parameter is not None:
                    parameter.grad = None
            if layer.kept_follow and layer.frozen:
                _fit_state(optimizer, layer.pst_kept)


def _fit_state(optimizer: torch.optim.Optimizer, kept: nn.Parameter) -> None:
    """What an optimizer made for another number of kept weights (at its own start, or in an earlier freeze) is zero."""
    state = optimizer.state.get(kept, {})
    for name, held in state.items():
        if isinstance(held, Tensor) and held.dim() == 1 and held.shape != kept.shape:
            state[name] = held.new_zeros(kept.shape)


due.before_steps.append(_before_step)


class Resting:
    """The part of `PSTLayer` that knows steps and the freeze."""

    config: PSTConfig
    pattern: Pattern
    bias: Any
    pst_U: nn.Parameter
    pst_mask: Tensor
    pst_frozen: Tensor
    pst_kept: nn.Parameter
    _scales: Any
    _ready: Any

    frozen = False  # whether the mask is fixed
    scores_rest = False  # whether A, B, R and C learn nothing from the next backward
    kept_follow = False  # whether there are as many trained kept weights as the mask at the freeze keeps
    steps = 0  # of the optimizer, as far as they are counted: by a schedule, or for `score_interval`
    _fixed: FixedMask | None = None
    _fixed_of = due.NOTHING  # versions and addresses of what it was made of

    def _add_rest(self: Any) -> None:
        config, device = self.config, self.weight.device
        if config.freeze:
            # no bool, of which torch can make no average
            self.register_buffer("pst_frozen", torch.zeros((), dtype=torch.uint8, device=device))
        if config.train_kept:
            kept = self.kept_at(False, 0)
            self.pst_kept = nn.Parameter(torch.zeros(kept, dtype=config.adapter_dtype, device=device))
            self.kept_follow = config.allocation == "global"
        self.at_step(0)

    def kept_at(self: Any, frozen: bool, num_pruned: int) -> int:
        """How many trained kept weights there are: with one threshold for all layers, as many as a fixed mask keeps."""
        if frozen and self.kept_follow:
            return self.weight.numel() - num_pruned
        return self.pattern.weights_kept_at(self._shape, self.config.sparsity)

    def fit_kept(self: Any, count: int) -> None:
        """Let there be so many trained kept weights, zeros where there were more or fewer.

        The Parameter, which an optimizer holds, stays: no graph has it in it before the freeze.
        """
        if self.kept_follow and self.pst_kept.numel() != count:
            self.pst_kept.grad = None
            self.pst_kept.data = self.pst_kept.data.new_zeros(count)

    def fit_loaded_kept(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Before loading; of what does not fit its own count torch's error is to tell."""
        frozen, count = (state_dict.get(f"{prefix}{name}") for name in ("pst_frozen", "pst_num_pruned"))
        if self.kept_follow and not (frozen is None or count is None or frozen.is_meta or count.is_meta):
            self.fit_kept(self.kept_at(bool(frozen), int(count)))

    @property
    def kept_wait(self) -> bool:
        """Whether who waits for all gradients waits for the kept weights' too, which have no part in y yet."""
        return self.config.train_kept and not self.frozen and not self.kept_follow

    def at_step(self, steps: int) -> None:
        """So many optimizer steps are done: the scores learn on every `score_interval`-th one, until the freeze."""
        self.steps = steps
        interval = self.config.score_interval
        self.scores_rest = self.frozen or steps % interval != interval - 1

    def freeze_mask(self: Any) -> None:
        """Fix the mask as it is after a last look; from here on A, B, R and C rest and kept weights may train."""
        if not self.config.freeze:
            raise RuntimeError("this layer was converted with freeze=0.0; convert it with PSTConfig(freeze=0.2), say")
        if self._tensor_parallel() is not None:
            raise RuntimeError("a mask cannot be fixed under tensor parallelism; use PSTConfig(freeze=0.0)")
        self.refresh_mask()
        if self.kept_follow:
            self.fit_kept(self.kept_at(True, int(self.pst_num_pruned)))
        self.pst_frozen.fill_(True)
        self._set_frozen(True)

    def unfreeze_mask(self: Any) -> None:
        """Let the mask follow the factors again. Trained kept weights belong to the fixed one, and go back to zero."""
        if not self.frozen:
            return
        self.pst_frozen.fill_(False)
        if self.config.train_kept:
            with torch.no_grad():
                self.pst_kept.zero_()
            self.fit_kept(self.kept_at(False, 0))
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen = frozen
        self._ready = self._fixed = None
        averages.share_fixed_mask(self)
        self.at_step(self.steps)
        if frozen and self.config.train_kept and not self.pst_mask.is_meta:
            _ = self.added().places  # now, for on a GPU it waits

    def _fixed_mask(self: Any) -> FixedMask:
        if torch.compiler.is_compiling() and self._fixed is not None:
            return self._fixed
        weight = whole(self.oriented_weight)
        made_of = due.total_of((weight, self.pst_mask))
        if self._fixed is None or made_of != self._fixed_of:
            self._fixed, self._fixed_of = FixedMask(weight, self.pst_mask), made_of
        return self._fixed

    def added(self, kept: Tensor | None = None) -> Added:
        """The trained kept weights, or `kept` in their place, whole; none before the freeze."""
        if not (self.frozen and self.config.train_kept):
            return Added()
        return Added(whole(self.pst_kept if kept is None else kept), self._fixed_mask().places)

    def _fixed_lists(self, factors: Factors, dtype: torch.dtype) -> Made:
        """Made at the kept places alone: after the freeze no pass over W is left."""
        fixed = self._fixed_mask()
        added = whole(self.pst_kept) if self.config.train_kept else None
        values = fixed.values(factors, self._scales.beta, added).to(dtype)
        return Made(None, values, fixed.lists.offsets, fixed.lists.pointers)

    def _rested_forward(self, x: Tensor, ready: Any) -> Tensor:
        added, options = self.added(), ready.options
        if ready.made.masked is not None and not options.kept:  # in a buffer, or of kept weights that are about to move
            self._ready = None
        # of a weighed |W'| its part of Q is left out too: lists of kept weights hold no weighing
        through = options.through_magnitude and not options.weighed
        # the layer's own room knows no step in which the scores rest
        kernels = None if options.kernels is None else ops.kernels_for(x.device.type)
        rest = Rest(self.frozen, through, options.kept, kernels)
        producer = producer_of(x) if self.config.recompute_input else None
        x = x if x.dtype == ready.dtype else x.to(ready.dtype)
        made = ready.made
        if self.kept_wait:
            made = made._replace(waiting=self.pst_kept)
        return rested_linear(x, ready.operands, self.bias, made, rest, added, producer)
