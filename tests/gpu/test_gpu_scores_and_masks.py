"""Scores, thresholds and masks against reference.py: bit for bit, on numbers whose scores are exact in fp32."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from dyadic import SHAPES, exact_scores, grid, no_guess, problem
from places import Place
from torch import Tensor

from pst_kernels import functional, ops, reference
from pst_kernels.masks import packing

SCALES = (1.0, 1.0, 1.0)
EMULATED, LARGE = pytest.mark.emulated, pytest.mark.large


def counts(numel: int) -> list[int]:
    return sorted({0, 1, numel // 3, int(numel * 0.99), numel})


def mask_of(gpu: Place, tensors: list[Tensor], num_pruned: int, guess: Tensor | None = None) -> Tensor:
    """The packed mask, found twice with equal bits, checked against a stable sort of the exact scores."""
    count = torch.tensor(num_pruned, device=gpu.device)
    start = (no_guess() if guess is None else guess).to(gpu.device)
    mask, _ = gpu.twice(lambda: _mask_and_guess(tensors, count, start))
    kept = reference.prune_mask(exact_scores(tensors), num_pruned)
    assert torch.equal(mask, packing.pack_mask(kept))  # padding bits too
    return mask


def _mask_and_guess(tensors: list[Tensor], count: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    guess = start.clone()
    return ops.prune_mask(*tensors, *SCALES, count, guess, "unstructured"), guess


class Layout(NamedTuple):
    shape: tuple[int, int]
    rank: int = 8
    dtype: torch.dtype = torch.bfloat16
    factors: torch.dtype = torch.float32

    def tensors(self, gpu: Place) -> list[Tensor]:
        return gpu.to(problem(*self.shape, self.rank, self.dtype, self.factors))


# Each row is some kernels more to compile: all shapes, all ranks and all dtypes, but not their product.
LAYOUTS = [
    *(Layout(shape) for shape in SHAPES),
    *(Layout((129, 65), rank) for rank in (1, 5, 16, 24, 64)),
    *(Layout((96, 384), dtype=dtype) for dtype in (torch.float32, torch.float16)),
    *(Layout((96, 384), dtype=dtype, factors=dtype) for dtype in (torch.float16, torch.bfloat16)),
    pytest.param(Layout((1000, 3001)), marks=LARGE),
    pytest.param(Layout((1000, 3008), 24, torch.float32), marks=LARGE),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores(gpu: Place, layout: Layout) -> None:
    tensors = layout.tensors(gpu)
    (scores,) = gpu.twice(lambda: [ops.scores(*tensors, *SCALES)])
    assert torch.equal(scores.double(), exact_scores(tensors))


@pytest.mark.parametrize("rank", [5, 40])
def test_scores_to_rounding(gpu: Place, rank: int) -> None:
    """Numbers that do round, and scales: within some roundings of the terms."""
    rows, columns, r = 67, 130, torch.randn
    tensors = gpu.to(
        [r(rows, columns), r(rows, rank), r(rank, columns), r(rows, rank), r(rank, columns), r(rows), r(columns)]
    )
    exact = reference.scores(*(t.double() for t in tensors), beta=0.3, alpha1=-0.7, alpha2=1.9)
    weight, U, V, A, B, R, C = (t.double().abs() for t in tensors)
    terms = weight + 0.3 * U @ V + 0.7 * A @ B + 1.9 * (R[:, None] + C)
    (scores,) = gpu.twice(lambda: [ops.scores(*tensors, 0.3, -0.7, 1.9)])
    assert ((scores - exact).abs() <= 2**-21 * terms).all()
    again = functional.scores(*tensors, beta=0.3, alpha1=-0.7, alpha2=1.9)
    assert torch.equal(again, scores)


@pytest.mark.parametrize("layout", [pytest.param(Layout((33, 70), 3), marks=EMULATED), *LAYOUTS], ids=str)
def test_mask_and_masked_weight(gpu: Place, layout: Layout) -> None:
    tensors = layout.tensors(gpu)
    weight, U, V = tensors[:3]
    for num_pruned in counts(weight.numel()) if layout.rank == 8 else [weight.numel() // 3]:
        mask = mask_of(gpu, tensors, num_pruned)
        kept = packing.unpack_mask(mask, layout.shape[1])
        assert int((~kept).sum()) == num_pruned
    exact = reference.updated_weight(weight.double(), U.double(), V.double()) * kept
    for result in {torch.float32, layout.dtype}:
        (masked,) = gpu.twice(lambda result=result: [ops.masked_weight(*tensors, mask, *SCALES, result)])
        assert torch.equal(masked, exact.to(result))


@pytest.mark.parametrize("kind", ["transposed", "strided", "column step"])
@pytest.mark.parametrize(
    "shape", [(7, 33), (129, 65), (1, 40), (40, 1), pytest.param((700, 1100), marks=LARGE)], ids=str
)
def test_weights_of_other_strides(gpu: Place, kind: str, shape: tuple[int, int]) -> None:
    tensors = gpu.to(problem(*shape, 5))
    weight, (rows, columns) = tensors[0], shape
    if kind == "transposed":
        weight = weight.T.contiguous().T
    elif kind == "strided":
        weight = weight.new_full((rows, columns + 3), torch.nan)[:, :columns].copy_(weight)
    else:
        weight = weight.new_full((rows, columns, 2), torch.nan)[..., 0].copy_(weight)
    mask = mask_of(gpu, [weight, *tensors[1:]], weight.numel() // 2)
    (scores,) = gpu.twice(lambda: [ops.scores(weight, *tensors[1:], *SCALES)])
    assert torch.equal(scores.double(), exact_scores(tensors))
    (masked,) = gpu.twice(lambda: [ops.masked_weight(weight, *tensors[1:], mask, *SCALES, torch.float32)])
    kept = packing.unpack_mask(mask, columns)
    assert masked.is_contiguous()
    assert torch.equal(masked.double(), reference.updated_weight(*(t.double() for t in tensors[:3])) * kept)


def test_signed_zeros_and_denormals_tie_by_value(gpu: Place) -> None:
    tensors = only_weight(torch.tensor([0.0, -0.0, 1e-41, 2e-41, 3e-41, 1.0])[torch.randint(0, 6, (96, 384))])
    for num_pruned in (5000, 15000, 20000, 30000):
        mask_of(gpu, gpu.to(tensors), num_pruned)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_nan_ends_and_sorts_last(gpu: Place, share: float) -> None:
    tensors = only_weight(grid(96, 384).masked_fill(torch.rand(96, 384) < share, torch.nan))
    for num_pruned in (1, 20000, 36863):
        for guess in (no_guess(), torch.tensor([torch.nan, 1.0, 0.5, 0.01]), torch.tensor([0.1, torch.inf, 0.5, 0.01])):
            mask_of(gpu, gpu.to(tensors), num_pruned, guess)


def only_weight(weight: Tensor) -> list[Tensor]:
    """A problem whose factors are all zero: scores are |W|."""
    return [weight, *(torch.zeros_like(factor) for factor in problem(*weight.shape, 1)[1:])]


@pytest.mark.parametrize("size", [pytest.param(1, marks=EMULATED), 513, 40000, pytest.param(10_000_001, marks=LARGE)])
def test_kth_value(gpu: Place, size: int) -> None:
    scores = torch.randn(size)
    for share, value in ((0.2, 0.25), (0.1, -0.0), (0.1, 0.0), (0.05, 1e-41), (0.05, -1e-41), (0.05, torch.inf)):
        scores[torch.rand(size) < share] = value
    scores[torch.rand(size) < 0.05] = torch.nan
    scores[torch.rand(size) < 0.05] = -torch.inf
    order = torch.argsort(scores, stable=True)
    scores, order = scores.to(gpu.device), order.to(gpu.device)
    for k in sorted({1, min(size, size // 2 + 1), min(size, int(size * 0.92) + 1), size}):
        value, index = gpu.twice(lambda k=k: ops.kth_value(scores, k))
        assert torch.equal(index, order[k - 1])
        torch.testing.assert_close(value, scores[order[k - 1]], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(functional.kth_value(scores, k)[1], index)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty_weights(gpu: Place, shape: tuple[int, int]) -> None:
    tensors = gpu.to(problem(*shape, 2))
    assert ops.scores(*tensors, *SCALES).shape == shape
    assert mask_of(gpu, tensors, 0).shape == (shape[0], packing.packed_width(shape[1]))
