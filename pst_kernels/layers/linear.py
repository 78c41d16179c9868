"""PSTLinear and PSTConv1D: linear layers whose frozen weight is updated and pruned by small trainable factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import PSTConfig
from .checks import is_conv1d
from .hooks import carry_over
from .pst_layer import PSTLayer


class PSTLinear(PSTLayer, nn.Linear):
    """`nn.Linear` with a frozen weight (out, in), trained by PST.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        config: the settings; `PSTConfig()` if None. The layer starts at `config.sparsity`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None,
        *, config: PSTConfig | None = None,
    ):  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._add_factors(config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: PSTConfig | None = None) -> PSTLinear:
        """The same layer under PST: it holds the same `weight` and `bias` Parameters, which are frozen."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}; PSTConv1D takes a Conv1D")
        layer = cls.__new__(cls)
        nn.Linear.__init__(layer, linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        return _take_over(layer, linear, config)


class PSTConv1D(PSTLayer):
    """Hugging Face's `Conv1D` (GPT-2), a linear layer whose weight is stored (in, out), trained by PST.

    Args:
        nf: output features.
        nx: input features.
        config: the settings; `PSTConfig()` if None. The layer starts at `config.sparsity`.
    """

    def __init__(self, nf: int, nx: int, device: Any = None, dtype: Any = None, *, config: PSTConfig | None = None):
        nn.Module.__init__(self)
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self._add_factors(config)

    @classmethod
    def from_linear(cls, conv: Any, config: PSTConfig | None = None) -> PSTConv1D:
        """The same layer under PST: it holds the same `weight` and `bias` Parameters, which are frozen."""
        if not is_conv1d(conv):
            raise TypeError(
                f"conv must be a transformers Conv1D, got {type(conv).__name__}; PSTLinear takes an nn.Linear"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.nx, layer.nf = conv.weight.shape
        return _take_over(layer, conv, config)

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.t()

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, weight_rank={self.config.weight_rank}, score_rank={self.config.score_rank}"


def _take_over(layer: Any, base: Any, config: PSTConfig | None) -> Any:
    layer.weight, layer.bias = base.weight, base.bias
    layer._add_factors(config)
    carry_over(base, layer)
    return layer.train(base.training)
