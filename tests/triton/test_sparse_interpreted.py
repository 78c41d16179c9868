"""The products with packed weights in Triton's interpreter against float64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from sparse_problem import INTERPRETED, Problem


@pytest.mark.parametrize("problem", INTERPRETED, ids=str)
def test_equals_float64(found: dict[Problem, dict[str, float]], problem: Problem) -> None:
    assert problem.wrong(found[problem]) == {}
