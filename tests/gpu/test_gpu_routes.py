"""Every way that the search for a threshold can take: all must find the same exact one, and the one that is meant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dyadic import exact_scores, guess_at, no_guess, problem
from places import CUDA, Place
from torch import Tensor

from pst_kernels import ops, reference
from pst_kernels.masks import packing

SCALES = (1.0, 1.0, 1.0)
SHAPE = (96, 384)  # just more scores than there is room to collect whole
ROUTES = {"guess": "guess", "sample": "sample", "missed": "radix", "overflowed": "radix"}


def start_of(name: str, scores: Tensor, k: int) -> Tensor:
    if name == "sample":
        return no_guess()
    guess = guess_at(scores, k, 0.025 if name == "overflowed" else 0.01)
    if name == "missed":
        guess[0] += 0.5  # the bracket lies elsewhere
    if name == "overflowed":
        guess[1] *= 100.0  # far more candidates than there is room for
    return guess


def find(gpu: Place, tensors: list[Tensor], k: int, start: Tensor) -> Tensor:
    """The guess for the next time; the mask was found twice with equal bits, and is right."""
    count, first = torch.tensor(k, device=gpu.device), start.to(gpu.device)

    def once() -> tuple[Tensor, Tensor]:
        guess = first.clone()
        return ops.prune_mask(*tensors, *SCALES, count, guess, "unstructured"), guess

    mask, guess = gpu.twice(once)
    assert torch.equal(mask, packing.pack_mask(reference.prune_mask(exact_scores(tensors), k)))
    return guess


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", [SHAPE, pytest.param((1500, 2000), marks=pytest.mark.large)], ids=str)
def test_every_route(
    gpu: Place, routes: Callable[[], list[str]], shape: tuple[int, int], name: str, transposed: bool
) -> None:
    tensors = gpu.to(problem(*shape, 8))
    k = tensors[0].numel() // 2
    scores = exact_scores(tensors)
    if transposed:
        tensors[0] = tensors[0].T.contiguous().T
    guess = find(gpu, tensors, k, start_of(name, scores.cpu(), k))
    assert set(routes()) <= {ROUTES[name]}
    assert len(routes()) == (2 if gpu.kind == CUDA else 0)
    assert guess[0] == scores.flatten().sort().values[k - 1]
    assert guess[2] == 0.5


@pytest.mark.emulated
def test_small_weights_are_collected_whole(gpu: Place, routes: Callable[[], list[str]]) -> None:
    tensors = gpu.to(problem(33, 65, 8))
    find(gpu, tensors, 700, no_guess())
    assert set(routes()) <= {"everything"}


def test_a_guess_follows_the_threshold(gpu: Place, routes: Callable[[], list[str]]) -> None:
    """It must be a hit when nothing has changed, and when the sparsity has moved a little."""
    tensors, guess = gpu.to(problem(*SHAPE, 8)), no_guess()
    for k in (18432, 18432, 18500, 18600):
        guess = find(gpu, tensors, k, guess)
    assert routes() == (["sample"] * 2 + ["guess"] * 6 if gpu.kind == CUDA else [])


@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("shape", [SHAPE, pytest.param((1500, 2000), marks=pytest.mark.large)], ids=str)
def test_ties_of_thousands(gpu: Place, routes: Callable[[], list[str]], shape: tuple[int, int], values: int) -> None:
    """More equal scores than there is room for candidates: the search ends among the indices of equal scores."""
    tensors = problem(*shape, 1)
    tensors = [torch.randint(1, values + 1, shape).float(), *(torch.zeros_like(factor) for factor in tensors[1:])]
    tensors = gpu.to(tensors)
    numel = tensors[0].numel()
    for num_pruned in (1, numel // 2, numel - 1, numel):
        find(gpu, tensors, num_pruned, no_guess())
    if values == 1:
        assert set(routes()) <= {"radix"}


@pytest.mark.large
@pytest.mark.parametrize("fraction", [0.0001, 0.5, 0.9, 0.9999])
def test_a_weight_of_training_size(gpu: Place, routes: Callable[[], list[str]], fraction: float) -> None:
    """4096 x 4096 in bf16: many programs, and the guess after a small change of the factors."""
    tensors = gpu.to(problem(4096, 4096, 8))
    k, guess = int(tensors[0].numel() * fraction), no_guess()
    guess = find(gpu, tensors, k, guess)
    tensors[5] += 2**-10 * torch.randint(-1, 2, tensors[5].shape, device=gpu.device)  # R, still dyadic
    find(gpu, tensors, k, guess)
    if 0.1 < fraction < 0.99:
        assert routes()[:2] == ["sample", "sample"]
