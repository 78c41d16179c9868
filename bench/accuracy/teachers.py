"""The dense models that methods with distillation learn from: trained once a task and seed, and kept on disk."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import nn

from pst_kernels.files import replacing

from . import train
from .methods import Method
from .record import Cell
from .tasks import Task


def get(folder: Path, cell: Cell, task: Task, dense: Method) -> nn.Module:
    """The model that `cell` trains, for evaluation; from `folder` if it is there. It is judged on nothing."""
    path = folder / f"{hashlib.sha256(repr(cell).encode()).hexdigest()[:24]}.pt"
    if path.is_file():
        model = task.model()
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        trained = train.train(cell, task, dense)
        if not math.isfinite(trained.loss):
            raise ValueError(f"the dense model to learn from diverged ({cell}); put lower learning rates into its grid")
        model = trained.model
        with replacing(path) as temporary:
            torch.save(model.state_dict(), temporary)
    return model.eval().requires_grad_(False)
