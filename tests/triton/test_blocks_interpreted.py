"""The products with blocks in Triton's interpreter against float64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from block_problem import INTERPRETED, Problem


@pytest.mark.parametrize("problem", INTERPRETED, ids=str)
def test_equals_float64(found: dict[Problem, dict[str, float]], problem: Problem) -> None:
    # the interpreter cuts bf16 off where it should round
    assert problem.wrong(found[problem], 2.0 if problem.dtype == "bfloat16" else 1.0) == {}
