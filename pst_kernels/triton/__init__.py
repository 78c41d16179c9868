"""The ops of ops.py as Triton kernels: for CUDA tensors, and for CPU tensors in the interpreter or an emulator."""

from .tiles import versions  # noqa: F401 (first: where Triton is too old it says so)

# isort: split

from .block_gradients import block_backward, kept_block_gradients
from .block_matmul import block_forward, block_split
from .gradients import linear_backward, rested_backward
from .group_layer import LayerTensors
from .group_mask import prune_masks
from .group_table import MaskTable
from .kept_lists import keep_lists, renew_lists
from .mask import masked_weight, prune_mask
from .matmul import forward_scratch, linear_forward, split_for
from .score import scores
from .select import kth_value
from .sparse_matmul import sparse_forward, sparse_input_gradient
from .sparse_matmul import takes as takes_sparse
from .weighed_gradients import weighed_backward

__all__ = [
    "LayerTensors",
    "MaskTable",
    "block_backward",
    "block_forward",
    "block_split",
    "forward_scratch",
    "keep_lists",
    "kept_block_gradients",
    "kth_value",
    "linear_backward",
    "linear_forward",
    "masked_weight",
    "prune_mask",
    "prune_masks",
    "renew_lists",
    "rested_backward",
    "scores",
    "sparse_forward",
    "sparse_input_gradient",
    "split_for",
    "takes_sparse",
    "weighed_backward",
]  # fmt: skip
