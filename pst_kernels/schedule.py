"""How sparse a model is at each step: the cubic schedule of gradual pruning.

Source: Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), as used by Li et al., IJCAI 2022.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from .config import PSTConfig, check_count
from .layers.pst_layer import PSTLayer
from .layers.together import refresh_layers
from .model import get_config, pst_layers

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
        restart: go back to the sparsity of `step_count`, if the model was trained or loaded at a higher one. Without
            it the sparsity stays where it is until the schedule is past it, and a warning says so.

    With `mask_interval` above 1 the sparsity moves, and masks are made, at every `mask_interval`-th step and the last.

    Example:
        schedule = SparsitySchedule(model, total_steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step(); optimizer.zero_grad(); schedule.step()
    """

    def __init__(self, model: nn.Module, total_steps: int, step_count: int = 0, *, restart: bool = False):
        check_count("total_steps", total_steps, 1)
        check_count("step_count", step_count, 0)
        self.config = get_config(model)
        self.layers = [layer for _, layer in pst_layers(model)]
        for layer in self.layers:
            layer.scheduled = True
        self.total_steps = total_steps
        self._read_pruned()
        self.step_count = step_count
        # The sparsity that the layers were trained or loaded at, and their counts; 0 for what was converted only.
        self._least = [0 if restart or not layer.has_learned_mask else n for layer, n in self._counted()]
        reached = [layer.sparsity for (layer, _), least in zip(self._counted(), self._least, strict=True) if least]
        self.least = min(max(reached, default=0.0), self.config.sparsity)
        if self.least > self._planned():
            logger.warning(
                "the model is at sparsity %.4g already, and the schedule's %.4g at step %d of %d is below it: the"
                " sparsity stays until the schedule is past it; to start over, pass restart=True",
                self.least, self._planned(), step_count, total_steps,
            )  # fmt: skip
        self._set_sparsity()

    @property
    def sparsity(self) -> float:
        """The sparsity of the converted layers at the present step."""
        return max(self.least, self._planned())

    @property
    def ended(self) -> bool:
        """Whether the layers are as sparse as they shall be in the end."""
        return self.sparsity >= self.config.sparsity

    def _counted(self) -> list[tuple[PSTLayer, int]]:
        return list(zip(self.layers, self._pruned, strict=True))

    def _planned(self) -> float:
        whole_intervals = self.step_count - self.step_count % self.config.mask_interval
        step = self.step_count if self.step_count >= self.total_steps else whole_intervals
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
                layer.mark_stale()
        refresh_layers(self.layers, only_grouped=True)

    def _read_pruned(self) -> None:
        self._pruned = [int(layer.pst_num_pruned) for layer in self.layers]  # on the host: stepping never waits

    def _set_sparsity(self) -> None:
        sparsity = self.sparsity
        for i, layer in enumerate(self.layers):
            pruned = max(layer.num_pruned_at(sparsity), self._least[i])
            if pruned != self._pruned[i]:
                layer.set_num_pruned(pruned)
                self._pruned[i] = pruned
            layer.has_learned_mask = True

    def state_dict(self) -> dict[str, Any]:
        return {"step_count": self.step_count, "total_steps": self.total_steps}

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
        self._read_pruned()  # the model may have been loaded since: its masks fit these counts
        self.least, self._least = 0.0, [0] * len(self.layers)
        self.go_to(state["step_count"])
