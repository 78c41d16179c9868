"""Layers whose scores weigh |W'|, against reference.py in float64 on the same device."""

from __future__ import annotations

import pytest
from places import Place
from weighed_problem import PROBLEMS, Problem, errors_of

ALLOWED = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 6e-3}
TINY = Problem(33, 40, 3, 3, "bfloat16")
LARGE = [
    Problem(1024, 1024, 500, 8, "bfloat16"),
    Problem(4096, 1024, 2048, 8, "bfloat16"),
    Problem(1000, 1003, 507, 8, "bfloat16", weight="float32", conv1d=True),
    Problem(768, 3072, 1000, 16, "float16"),
    Problem(768, 3072, 1000, 8, "float32"),
]


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(TINY, marks=pytest.mark.emulated), *PROBLEMS,
        *(pytest.param(problem, marks=pytest.mark.large) for problem in LARGE),
    ],
    ids=str,
)  # fmt: skip
def test_equals_float64(gpu: Place, problem: Problem) -> None:
    run, exact = problem.ready(gpu.device)
    errors = errors_of(gpu.twice(run), exact())
    allowed = max(ALLOWED[problem.dtype] * (2.0 if problem in LARGE else 1.0), 3e-4 if problem.dead else 0.0)
    assert {name: error for name, error in errors.items() if not error <= allowed} == {}
    assert errors["mask"] == 0.0
