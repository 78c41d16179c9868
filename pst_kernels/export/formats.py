"""What a PST layer becomes after training: a dense layer, one that stores blocks or single weights, or torch's
semi-structured one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers.block_sparse_linear import BlockSparseLinear
from ..layers.experts import PSTExperts
from ..layers.hooks import carry_over
from ..layers.linear import PSTConv1D
from ..layers.pst_layer import PSTLayer
from ..layers.sparse_linear import SparseLinear
from ..masks import patterns

FORMATS = ("dense", "sparse", "bsr", "semi_structured")
TWO_OF_FOUR = patterns.Groups(2, 4)
ROWS, COLUMNS = 32, 64  # of which a semi-structured fp16 or bf16 weight has multiples, in both of torch's libraries


def check_name(name: str) -> None:
    """Raise ValueError for a format that does not exist."""
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is not known; use one of {', '.join(map(repr, FORMATS))}")


def refuse(format: str, name: str, layer: PSTLayer) -> None:
    """Raise ValueError, naming the layer, when it cannot take a format."""
    pattern = layer.config.pattern
    if isinstance(layer, PSTExperts):  # the model multiplies by their weights itself
        return
    if format == "bsr" and not isinstance(layer.pattern, patterns.Blocks):
        raise ValueError(
            f"format='bsr' stores blocks, but {name or 'the layer'} was pruned with pattern={pattern!r}; use"
            " format='dense', or train with pattern='block:32', say"
        )
    if format != "semi_structured":
        return
    if layer.pattern != TWO_OF_FOUR:
        raise ValueError(
            f"format='semi_structured' needs 2 of every 4 weights, but {name or 'the layer'} was pruned with"
            f" pattern={pattern!r}; use format='dense', or train with pattern='2:4'"
        )
    weight = layer.oriented_weight
    refuse_semi_structured(name, (weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
    if not layer.pattern.fits(layer.mask, layer.num_pruned_at(0.5)):
        raise ValueError(
            f"format='semi_structured' needs 2 of every 4 weights, but {name or 'the layer'} is {layer.sparsity:.1%}"
            " pruned: its schedule has not ended; train to the end, or set layer.sparsity = 0.5"
        )


def refuse_semi_structured(name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError when torch has no semi-structured product for such a weight (out, in)."""
    what = f"format='semi_structured' needs {{}}, but the weight of {name or 'the layer'} is {{}}; {{}}"
    otherwise = "use format='dense' there"
    if device.type != "cuda":
        raise ValueError(what.format("CUDA", f"on {device}", f"call model.cuda() first, or {otherwise}"))
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(what.format("float16 or bfloat16", dtype, "call model.to(torch.bfloat16) first"))
    if shape[0] % ROWS or shape[1] % COLUMNS:
        needed = f"multiples of {ROWS} outputs and {COLUMNS} inputs"
        raise ValueError(what.format(needed, f"{shape[0]} x {shape[1]}", "use format='dense'"))


def plain(format: str, layer: PSTLayer) -> nn.Module:
    """The layer without PST, in a format that `refuse` let pass; that of experts is merged, for `detach`."""
    if isinstance(layer, PSTExperts):
        layer.merge()
        return layer
    made = {"dense": _dense, "sparse": _sparse, "bsr": _blocks, "semi_structured": _semi_structured}[format](layer)
    return made.train(layer.training)


def _dense(layer: PSTLayer) -> nn.Module:
    layer.merge()
    plain: Any
    if isinstance(layer, PSTConv1D):
        from transformers.pytorch_utils import Conv1D

        plain = Conv1D(0, 0)
        plain.nx, plain.nf = layer.nx, layer.nf
    else:
        plain = _empty_linear(layer)
    plain.weight, plain.bias = layer.weight, layer.bias
    carry_over(layer, plain)
    return plain


def _blocks(layer: PSTLayer) -> nn.Module:
    size = layer.pattern.size  # type: ignore[attr-defined]
    kept = layer.mask[::size, ::size]  # of a block all weights are kept or none
    return BlockSparseLinear.from_dense(layer.masked_weight(), layer.bias, size, kept)


def _sparse(layer: PSTLayer) -> nn.Module:
    return SparseLinear.from_dense(layer.masked_weight(), layer.bias, layer.mask)


def _semi_structured(layer: PSTLayer) -> nn.Module:
    plain: Any = _empty_linear(layer)
    weight = torch.sparse.to_sparse_semi_structured(layer.masked_weight().contiguous())
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return plain


def _empty_linear(layer: PSTLayer) -> nn.Linear:
    out, columns = layer.oriented_weight.shape
    return nn.Linear(columns, out, layer.bias is not None, device="meta")
