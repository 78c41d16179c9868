"""A run that is stopped and resumed from a file, beside the same run in one go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pst_kernels as pst

STEPS, SCHEDULED, FROZEN = 12, 10, 8  # the schedule ends before the run, and by itself a mask of `train_kept` is fixed


def whole_and_resumed(new: Callable[[], Any], run: Callable, at: int, folder: Path) -> tuple[nn.Module, nn.Module]:
    """`new()` makes a model and its optimizer; `run(model, steps, schedule, optimizer, start=0)` trains it."""
    model, optimizer = new()
    schedule = pst.SparsitySchedule(model, SCHEDULED)
    run(model, at, schedule, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], folder / "state")
    run(model, STEPS - at, schedule, optimizer, start=at)
    again, its_optimizer = new()
    states = torch.load(folder / "state")
    again.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    its_schedule = pst.SparsitySchedule(again, SCHEDULED)
    its_schedule.load_state_dict(states[2])
    assert again[0].frozen == (at >= FROZEN)
    run(again, STEPS - at, its_schedule, its_optimizer, start=at)
    return model, again
