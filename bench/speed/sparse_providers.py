"""Providers of structured sparsity: PST with a pattern, and the forward of what is left after training.

They run in the full benchmark and when they are asked for by name, not in the quick one.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

import pst_kernels as pst
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear

from ..baselines.torch_bsr import TorchBSR
from .providers import OURS, SPARSITY, Provider, ours, pst_expected

BLOCK = "block:64"


def sparse_providers() -> list[Provider]:
    """All of PyTorch's backend: block patterns have no other."""
    return [
        pattern_provider(f"{OURS} {BLOCK}", BLOCK, SPARSITY),
        pattern_provider(f"{OURS} 2:4", "2:4", 0.5),
        _forward_only(f"{OURS} {BLOCK}, merged", BlockSparseLinear),
        _forward_only(f"torch BSR, {BLOCK}", TorchBSR),
    ]


def pattern_provider(name: str, pattern: str, sparsity: float) -> Provider:
    """PST with a pattern. A step is the mean over those from one mask to the next."""
    config = pst.PSTConfig(pattern=pattern, sparsity=sparsity)
    expected = _expected_of_blocks if pattern.startswith("block") else pst_expected
    return ours(name, "torch", config, expected)


def _expected_of_blocks(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    """y with the gradients of a step that is not the last one before a mask: U and V learn from kept blocks alone,
    Q = G * M * (1 + |W'|), and the factors of the scores get zeros.
    """
    U, V, *of_scores = layer.factors
    updated = layer.oriented_weight + layer.config.beta * U @ V
    constant = updated.detach()
    passed = updated + (updated - constant) * constant.abs()  # the value W', the derivative 1 + |W'|
    zeros = 0.0 * sum(factor.sum() for factor in of_scores)
    return linear(x, mask * passed, layer.bias) + zeros


def _forward_only(name: str, kind: type[BlockSparseLinear]) -> Provider:
    return Provider(
        name, functools.partial(_merged, kind), _no_model, kind,
        lambda layer, x, _: linear(x, layer.to_dense(), layer.bias), trains=False,
    )  # fmt: skip


def _merged(kind: type[BlockSparseLinear], base: nn.Linear) -> nn.Module:
    """The blocks that PST keeps of this layer before its first step."""
    layer = pst.PSTLinear.from_linear(base, pst.PSTConfig(pattern=BLOCK, sparsity=SPARSITY))
    return kind.from_dense(layer.masked_weight(), layer.bias, layer.pattern.size)  # type: ignore[attr-defined]


def _no_model(model: nn.Module) -> nn.Module:
    raise ValueError("this provider has no training step, and so no part in mode model")
