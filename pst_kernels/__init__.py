"""pst_kernels: fine-tune a pretrained transformer into a sparse one, with a drop-in for nn.Linear.

    import pst_kernels as pst
    model = pst.replace_linear(model, pst.PSTConfig(sparsity=0.9))

Importing this needs torch and numpy; neither triton nor transformers, and it touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import functional
from .checkpoint import load_pretrained, save_pretrained
from .config import PSTConfig
from .distillation import Distillation
from .events import RewindLR
from .export.compressed import load_compressed, save_compressed
from .export.folder import save_sparse
from .layers.block_sparse_linear import BlockSparseLinear
from .layers.linear import PSTConv1D, PSTLinear
from .layers.sparse_linear import SparseLinear
from .model import (
    get_layer_status,
    merge_and_unload,
    print_trainable_parameters,
    refresh_masks,
    replace_linear,
)
from .parameter_groups import parameter_groups
from .schedule import SparsitySchedule

if TYPE_CHECKING:
    from .callback import PSTCallback
    from .distillation_trainer import DistillationTrainer
    from .hf import load_sparse

__version__ = "0.2.0"
__all__ = [
    "BlockSparseLinear",
    "Distillation",
    "DistillationTrainer",
    "PSTCallback",
    "PSTConfig",
    "PSTConv1D",
    "PSTLinear",
    "RewindLR",
    "SparseLinear",
    "SparsitySchedule",
    "functional",
    "get_layer_status",
    "load_compressed",
    "load_pretrained",
    "load_sparse",
    "merge_and_unload",
    "parameter_groups",
    "print_trainable_parameters",
    "refresh_masks",
    "replace_linear",
    "save_compressed",
    "save_pretrained",
    "save_sparse",
]


# Their files import transformers, which the rest does not need.
LAZY = {"PSTCallback": ".callback", "DistillationTrainer": ".distillation_trainer", "load_sparse": ".hf"}


if not TYPE_CHECKING:  # to a type checker, a module with this has every name

    def __getattr__(name: str) -> Any:
        if name in LAZY:
            try:
                return getattr(importlib.import_module(LAZY[name], __name__), name)
            except ModuleNotFoundError as error:
                raise ImportError(f"{name} needs {error.name}; run: pip install 'pst_kernels[finetune]'") from error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
