"""Dense products by oneDNN, which PyTorch has but does not take in fp32: it takes MKL, on AMD without AVX-512."""

from __future__ import annotations

import torch
from torch import Tensor


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, in) W^T (in, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
