"""Block patterns and N:M: the products with blocks against float64, the masks against their definition."""

from __future__ import annotations

import pytest
import torch
from block_problem import COMPILED, INTERPRETED, OUTPUTS, Problem
from dyadic import exact_scores, problem
from linear_problem import relative_error
from oracle import PATTERNS, mask_by_definition
from places import TORCH, Place
from torch import Tensor

from pst_kernels import functional, ops
from pst_kernels.masks import packing, patterns

LARGE = [
    Problem(1024, 1024, 512, 8, 64, "bfloat16", kept=0.1),
    Problem(1024, 1024, 512, 8, 128, "float16", kept=0.5),
    Problem(1024, 1024, 300, 8, 32, "bfloat16", kept=0.3, learn=True),
    Problem(1000, 1003, 777, 8, 16, "bfloat16", kept=0.3),
    Problem(768, 3072, 256, 16, 64, "float32", kept=0.2),
    Problem(1024, 1024, 300, 64, 64, "bfloat16", kept=0.2, weight="float32"),
    Problem(512, 512, 300, 24, 64, "bfloat16", kept=0.3),
    Problem(512, 768, 40, 40, 64, "bfloat16", kept=0.3, through=False),
    Problem(512, 512, 300, 64, 128, "float16", kept=0.5),
]


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(Problem(32, 48, 3, 3, 16, "bfloat16"), marks=pytest.mark.emulated), *COMPILED, *INTERPRETED,
        *(pytest.param(problem, marks=pytest.mark.large) for problem in LARGE),
    ],
    ids=str,
)  # fmt: skip
def test_equals_float64(gpu: Place, problem: Problem) -> None:
    found = gpu.twice(problem.ready(gpu.device))
    errors = dict(zip(OUTPUTS, map(relative_error, found, problem.exact(gpu.device)), strict=True))
    if gpu.kind == TORCH and problem.dtype != "float32":  # G is rounded to 16 bits there
        errors = {
            name: 0.0 if name[0] == "d" and name != "dx" and error <= 1e-2 else error for name, error in errors.items()
        }
    assert problem.wrong(errors, 4.0 if problem in LARGE else 1.0) == {}


def _mask(tensors: list[Tensor], count: Tensor, pattern: str) -> Tensor:
    return ops.prune_mask(*tensors, 1.0, 1.0, 1.0, count, functional.new_guess(count.device), pattern)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", [(1, 1), (48, 80), (129, 65), (70, 300)], ids=str)
def test_masks_equal_the_definition(gpu: Place, name: str, shape: tuple[int, int]) -> None:
    tensors, pattern = gpu.to(problem(*shape, 5)), patterns.parse(name)
    scores = exact_scores(tensors).cpu()
    for sparsity in (0.0, 0.5, 0.9):
        num_pruned = pattern.num_pruned_at(shape, sparsity)
        count = torch.tensor(num_pruned, device=gpu.device)
        (mask,) = gpu.twice(lambda count=count: [_mask(tensors, count, name)])
        kept = packing.unpack_mask(mask, shape[1]).cpu()
        assert torch.equal(kept, mask_by_definition(scores, pattern, num_pruned))


@pytest.mark.large
@pytest.mark.parametrize("name", ["block:64", "2:4", "3:7"])
def test_a_mask_of_training_size(gpu: Place, name: str) -> None:
    """4096 x 1000, the last group and the last blocks not whole: the count and the structure."""
    tensors, pattern = gpu.to(problem(4096, 1000, 8)), patterns.parse(name)
    num_pruned = pattern.num_pruned_at((4096, 1000), 0.5)
    count = torch.tensor(num_pruned, device=gpu.device)
    (mask,) = gpu.twice(lambda: [_mask(tensors, count, name)])
    kept = packing.unpack_mask(mask, 1000)
    assert pattern.fits(kept, num_pruned)
    assert torch.equal(kept, pattern.keep(exact_scores(tensors).float(), num_pruned))
