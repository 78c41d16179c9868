"""What PST is measured against, in plain PyTorch: one small class a method, its source named.

Every class turns an `nn.Linear` into a trainable layer (`from_linear`) and tells what trains by `requires_grad`. Those
of the speed benchmark (Dense, LoRA, ReleasedPST) state their method once more as `expected`, y as a differentiable
function in the dtype of the layer's parameters, which the correctness check runs in float64. The others are checked
against the closed form of their gradients in `tests/test_baselines.py`.
"""

from .dense import Dense
from .hard_concrete import HardConcrete
from .lora import LoRA
from .magnitude import Magnitude
from .masked_lora import MaskedLoRA
from .movement import Movement
from .pst_variant import PSTVariant
from .released_pst import ReleasedPST
from .soft_movement import SoftMovement
from .sparse import SparseLayer

__all__ = [
    "Dense",
    "HardConcrete",
    "LoRA",
    "Magnitude",
    "MaskedLoRA",
    "Movement",
    "PSTVariant",
    "ReleasedPST",
    "SoftMovement",
    "SparseLayer",
]  # fmt: skip
