"""The dense models that methods with distillation learn from: trained once a task and seed, and kept on disk."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from pst_kernels.files import replacing

from . import train
from .claims import claim, name_of
from .methods import Method
from .record import Cell
from .tasks import Task


def get(folder: Path, cell: Cell, task: Task, dense: Method) -> nn.Module:
    """The model that `cell` trains, for evaluation; from `folder` if it is there. It is judged on nothing.

    Waits while another process trains it.
    """
    path = _path(folder, cell)
    with claim(folder, cell, wait=True):
        if path.is_file():
            model = task.model()
            model.load_state_dict(torch.load(path, map_location=task.device, weights_only=True))
        else:
            model = _trained(cell, task, dense)
            with replacing(path) as temporary:
                torch.save(model.state_dict(), temporary)
    return model.eval().requires_grad_(False)


def in_work(folder: Path, cell: Cell) -> bool:
    """Whether another process trains it now."""
    if _path(folder, cell).is_file():
        return False
    with claim(folder, cell) as free:
        return not free


def _trained(cell: Cell, task: Task, dense: Method) -> nn.Module:
    trained = train.train(cell, task, dense)
    if not math.isfinite(trained.loss):
        raise ValueError(f"the dense model to learn from diverged ({cell}); put lower learning rates into its grid")
    return trained.model


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{name_of(cell)}.pt"
