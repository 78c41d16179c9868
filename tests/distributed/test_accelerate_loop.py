"""A plain loop with Accelerate: gradient accumulation, clipping, and a state that is saved and loaded in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels import cpu

accelerate = pytest.importorskip("accelerate")
STEPS, MICRO_BATCHES = 6, 2


class Run:
    """A model under an Accelerator; the schedule is saved and loaded with its state."""

    def __init__(self, seed: int = 0):
        base = toys.seeded()
        torch.manual_seed(seed)
        model = pst.replace_linear(base, pst.PSTConfig(sparsity=0.7)).train()
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
        self.model, self.optimizer = self.accelerator.prepare(model, adamw(model))
        self.schedule = pst.SparsitySchedule(self.model, STEPS)
        self.accelerator.register_for_checkpointing(self.schedule)

    def train(self, first: int = 0, last: int = STEPS) -> Run:
        for step in range(first, last):
            for batch in micro_batches(step):
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(**batch).loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    if self.accelerator.sync_gradients:
                        self.schedule.step()
        return self


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def micro_batches(step: int) -> list[dict[str, torch.Tensor]]:
    return [toys.inputs("bert", seed=MICRO_BATCHES * step + i) for i in range(MICRO_BATCHES)]


def test_as_a_loop_without_accelerate_and_one_mask_a_step(monkeypatch):
    made, compute = [], cpu.prune_mask
    monkeypatch.setattr(cpu, "prune_mask", lambda *args: (made.append(1), compute(*args))[1])
    found = toys.snapshot(Run().train().model)
    assert len(made) == (STEPS + 1) * toys.LINEARS["bert"]  # the last for the state dict

    base = toys.seeded()
    torch.manual_seed(0)
    model = pst.replace_linear(base, pst.PSTConfig(sparsity=0.7)).train()
    schedule, optimizer = pst.SparsitySchedule(model, STEPS), adamw(model)
    for step in range(STEPS):
        for batch in micro_batches(step):
            (model(**batch).loss / MICRO_BATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert not toys.differences(found, toys.snapshot(model))


@pytest.mark.parametrize("stop", [2, 4])
def test_a_saved_state_goes_on_to_the_same_bits(stop, tmp_path: Path):
    whole = toys.snapshot(Run().train().model)
    Run().train(0, stop).accelerator.save_state(str(tmp_path))
    resumed = Run(seed=7)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.schedule.step_count == stop
    assert not toys.differences(toys.snapshot(resumed.train(stop).model), whole)
