"""Layers whose scores weigh |W'| in Triton's interpreter against reference.py in float64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from weighed_problem import OUTPUTS, PROBLEMS, Problem

# A weight in 16 bits is rounded once; G and its quotient are once each where x has 16 bits.
ALLOWED = {"float32": 1e-6, "float16": 3e-3, "bfloat16": 6e-3}


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_equals_float64(found: dict[Problem, dict[str, float]], problem: Problem) -> None:
    errors = found[problem]
    # a weighing of zero counts as 1/1024, in one row of 40 and one column of 64
    allowed = max(ALLOWED[problem.dtype], 3e-4 if problem.dead else 0.0)
    assert {name: errors[name] for name in OUTPUTS if not errors[name] <= allowed} == {}
    assert errors["mask"] == 0.0
