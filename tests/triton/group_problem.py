"""Layers for a table, with poisoned outputs, and what the kernels of one layer at a time make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dyadic import no_guess
from torch import Tensor

from pst_kernels import triton as kernels
from pst_kernels.masks.packing import packed_width
from pst_kernels.operands import Factors, Scales
from pst_kernels.triton.group_layer import LayerTensors


def layer_of(
    tensors: Sequence[Tensor], num_pruned: int, guess: Tensor | None = None, masked: torch.dtype | None = None,
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> LayerTensors:  # fmt: skip
    weight, *factors = tensors
    rows, columns = weight.shape
    return LayerTensors(
        weight, Factors(*factors), Scales(*scales), torch.tensor(num_pruned),
        no_guess() if guess is None else guess.clone(),
        torch.full((rows, packed_width(columns)), 0x5A5A5A5A, dtype=torch.int32),
        None if masked is None else torch.full((rows, columns), torch.nan, dtype=masked),
    )  # fmt: skip


def poisoned(layer: LayerTensors) -> LayerTensors:
    """Another such layer: the same weights, its own guess, mask and masked weight."""
    return layer_of(
        (layer.weight, *layer.factors), int(layer.num_pruned), layer.guess,
        None if layer.masked is None else layer.masked.dtype, layer.scales,
    )  # fmt: skip


def alone(layer: LayerTensors) -> LayerTensors:
    """What the kernels of one layer make of such a layer."""
    other = poisoned(layer)
    weight, factors, scales, num_pruned, guess, _, masked = other
    return other._replace(mask=kernels.prune_mask(weight, factors, scales, num_pruned, guess, masked))


def assert_same(layer: LayerTensors, other: LayerTensors) -> None:
    """Every bit of the mask, the next guess and M * W'."""
    assert torch.equal(layer.mask, other.mask)
    assert torch.equal(layer.guess.view(torch.int32), other.guess.view(torch.int32))
    if layer.masked is not None:
        assert torch.equal(layer.masked, other.masked)


def transposed(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[0].T.contiguous().T, *tensors[1:]]


def strided(tensors: list[Tensor]) -> list[Tensor]:
    """A step of two along the columns, and NaN between."""
    weight = tensors[0]
    wide = torch.full((*weight.shape, 2), torch.nan, dtype=weight.dtype)
    return [wide[..., 0].copy_(weight), *tensors[1:]]


def rounding(rows: int, columns: int, rank: int) -> list[Tensor]:
    """Scores that do round."""
    r = torch.randn
    return [r(rows, columns), r(rows, rank), r(rank, columns), r(rows, rank), r(rank, columns), r(rows), r(columns)]
