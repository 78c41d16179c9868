"""How sparse a model is at each step: the cubic schedule of gradual pruning.

Source: Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), as used by Li et al., IJCAI 2022.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from .config import PSTConfig, check_count
from .events import Events
from .layers.checks import in_several_processes
from .layers.pst_layer import PSTLayer
from .layers.together import refresh_layers
from .masks.allocation import OneThreshold
from .model import get_config, pst_layers

LEAST_SHARE = 0.25  # of what a layer would keep at the same sparsity for all: it keeps as much at least
KINDS = ("cubic", "events")
logger = logging.getLogger("pst_kernels")


def sparsity_at(step: int, total_steps: int, config: PSTConfig) -> float:
    """Sparsity after `step` optimizer steps: initial up to warmup * T, final after (1 - cooldown) * T, cubic in
    between.
    """
    start, end = config.warmup * total_steps, total_steps - config.cooldown * total_steps
    if step <= start and step < total_steps:
        return config.initial_sparsity
    if step > end or step >= total_steps or end <= start:
        return config.sparsity
    remaining = 1.0 - (step - start) / (end - start)
    return config.sparsity + (config.initial_sparsity - config.sparsity) * remaining**3


class SparsitySchedule:
    """Raises a model's sparsity over a plain training loop; `.step()` once after every optimizer step.

    Args:
        model: a model converted by `replace_linear`; its layers are set to the sparsity of `step_count` at once.
        total_steps: optimizer steps of the whole training, at least 1.
        step_count: steps already done, when a loop resumes with a model whose state is loaded.
        kind: "cubic", a little further at each step, or "events", a large first step and few more (see events.py).
        first: of events, the sparsity that the first one brings.
        events: how many there are.
        restart: go back to the sparsity of `step_count`, if the model was trained or loaded at a higher one. Without
            it the sparsity stays where it is until the schedule is past it, and a warning says so.

    In the last `freeze` of the steps, and after them, the masks are fixed. A model whose masks are fixed already, by an
    earlier training, keeps them unless `restart` is True.

    With `mask_interval` above 1 the sparsity moves, and masks are made, at every `mask_interval`-th step and the last.

    Example:
        schedule = SparsitySchedule(model, total_steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step(); optimizer.zero_grad(); schedule.step()
    """

    def __init__(
        self, model: nn.Module, total_steps: int, step_count: int = 0, *, kind: str = "cubic", first: float = 0.7,
        events: int = 4, restart: bool = False,
    ):  # fmt: skip
        check_count("total_steps", total_steps, 1)
        check_count("step_count", step_count, 0)
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(KINDS)}")
        self.kind, self.events = kind, Events(first, events) if kind == "events" else None
        self.config = get_config(model)
        self.layers = [layer for _, layer in pst_layers(model)]
        self._threshold = OneThreshold()
        if self.config.allocation == "global" and self.config.train_kept and in_several_processes():
            raise RuntimeError(
                "allocation='global' with train_kept=True runs in one process: pst_kept gets its size at the freeze,"
                " after DistributedDataParallel and FSDP have laid it out; use allocation='uniform' or train_kept=False"
            )
        for layer in self.layers:
            layer.scheduled = True
            if restart:
                layer.unfreeze_mask()
        self.total_steps = total_steps
        # rounded: 0.8 of the steps must not begin one late for what a product of floats adds
        self.freeze_step = math.ceil(round((1.0 - self.config.freeze) * total_steps, 6)) if self.config.freeze else None
        self._read_pruned()
        self.step_count = step_count
        # The sparsity that the layers were trained or loaded at, and their counts; 0 for what was converted only.
        self._least = [0 if restart or not layer.has_learned_mask else n for layer, n in self._counted()]
        self.least = min(self._reached(), self.config.sparsity)
        if self.least > self._planned():
            logger.warning(
                "the model is at sparsity %.4g already, and the schedule's %.4g at step %d of %d is below it: the"
                " sparsity stays until the schedule is past it; to start over, pass restart=True",
                self.least, self._planned(), step_count, total_steps,
            )  # fmt: skip
        self._set_sparsity()
        self._follow_freeze()

    @property
    def sparsity(self) -> float:
        """The sparsity of the converted layers at the present step."""
        return max(self.least, self._planned())

    @property
    def ended(self) -> bool:
        """Whether the layers are as sparse as they shall be in the end."""
        return self.sparsity >= self.config.sparsity

    @property
    def freezes(self) -> bool:
        """Whether the masks are fixed at this step."""
        return self.freeze_step is not None and self.step_count >= self.freeze_step

    def _follow_freeze(self) -> None:
        fresh = [layer for layer in self.layers if not layer.frozen] if self.freezes else []
        for layer in fresh:
            layer.mark_stale()
        refresh_layers(fresh)
        for layer in fresh:
            layer.freeze_mask()
        for layer in self.layers:
            layer.at_step(self.step_count)

    def _counted(self) -> list[tuple[PSTLayer, int]]:
        return list(zip(self.layers, self._pruned, strict=True))

    def _reached(self) -> float:
        """The sparsity that the layers were trained or loaded at; that of all together where each has its own."""
        if self.config.allocation == "global":
            return sum(self._least) / sum(layer.weight.numel() for layer in self.layers)
        reached = [layer.sparsity for (layer, _), least in zip(self._counted(), self._least, strict=True) if least]
        return max(reached, default=0.0)

    def _planned(self) -> float:
        whole_intervals = self.step_count - self.step_count % self.config.mask_interval
        step = self.step_count if self.step_count >= self.total_steps or self.freezes else whole_intervals
        if self.events is not None:
            return self.events.sparsity_at(step, self.total_steps, self.config)
        return sparsity_at(step, self.total_steps, self.config)

    def step(self) -> None:
        """Go on by one optimizer step."""
        self.go_to(self.step_count + 1)

    def go_to(self, step_count: int) -> None:
        """Be where `step_count` optimizer steps lead: for a loop that counts its steps itself."""
        check_count("step_count", step_count, 0)
        if step_count == self.step_count:
            return
        self.step_count = step_count
        self._set_sparsity()
        if step_count % self.config.mask_interval == 0 or step_count >= self.total_steps:
            for layer in self.layers:
                if not layer.frozen:
                    layer.mark_stale()
        self._follow_freeze()
        refresh_layers(self.layers, only_grouped=True)

    def _read_pruned(self) -> None:
        self._pruned = [int(layer.pst_num_pruned) for layer in self.layers]  # a step need not ask the device

    def _set_sparsity(self) -> None:
        sparsity = self.sparsity
        if self.config.allocation == "global":
            self._allocate(sparsity)
            return
        for i, layer in enumerate(self.layers):
            pruned = max(layer.num_pruned_at(sparsity), self._least[i])
            if layer.frozen:
                continue
            if pruned != self._pruned[i]:
                layer.set_num_pruned(pruned)
                self._pruned[i] = pruned
            layer.has_learned_mask = True

    def _allocate(self, sparsity: float) -> None:
        """One threshold for all layers; the counts stay on their device."""
        layers = [layer for layer in self.layers if not layer.frozen]
        for layer in layers:
            layer.refuse_cut()
            layer.has_learned_mask = True
        at_work = (
            self.step_count % self.config.mask_interval == 0 or self.freezes or self.step_count >= self.total_steps
        )
        if not layers or not at_work:
            return
        uniform = [layer.num_pruned_at(sparsity) for layer in layers]
        sizes = [layer.weight.numel() for layer in layers]
        most = [n - math.ceil(LEAST_SHARE * (n - k)) for n, k in zip(sizes, uniform, strict=True)]
        with torch.no_grad():
            nothing = not any(uniform)
            counts = uniform if nothing else self._threshold.counts(lambda i: layers[i].scores(), most, sum(uniform))
        for layer, count in zip(layers, counts, strict=True):
            layer.set_num_pruned(count)

    def state_dict(self) -> dict[str, Any]:
        return {"step_count": self.step_count, "total_steps": self.total_steps, "kind": self.kind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved step; the model's own state may be loaded before or after.

        Raises ValueError when the schedule was made for another number of steps.
        """
        if not {"step_count", "total_steps"} <= state.keys():
            raise ValueError(f"state must hold step_count and total_steps, got {sorted(state)}; pass a state_dict()")
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"this schedule has total_steps={self.total_steps}, the saved one {state['total_steps']};"
                " make it with the same number of steps"
            )
        if state.get("kind", "cubic") != self.kind:
            raise ValueError(f"this schedule has kind={self.kind!r}, the saved one {state['kind']!r}; make it as that")
        self._read_pruned()  # the model may have been loaded since: its masks fit these counts
        self.least, self._least = 0.0, [0] * len(self.layers)
        if self.freeze_step is None or state["step_count"] < self.freeze_step:
            for layer in self.layers:
                layer.unfreeze_mask()
        self.go_to(state["step_count"])
