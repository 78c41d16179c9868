"""The products with blocks in Triton's interpreter against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from block_problem import INTERPRETED, Problem


@pytest.fixture(scope="module")
def found() -> dict[Problem, dict[str, float]]:
    here = Path(__file__).parent
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "PST_KERNELS_BACKEND": "triton", "PYTHONPATH": str(here.parents[1]),
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, str(here / "block_problem.py")], env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {Problem(**problem): errors for problem, errors in json.loads(run.stdout)}


@pytest.mark.parametrize("problem", INTERPRETED, ids=str)
def test_equals_float64(found: dict[Problem, dict[str, float]], problem: Problem) -> None:
    # the interpreter cuts bf16 off where it should round
    assert problem.wrong(found[problem], 2.0 if problem.dtype == "bfloat16" else 1.0) == {}
