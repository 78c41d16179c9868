"""The script kill_and_resume.py, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


@pytest.mark.slow
def test_a_killed_trainer_resumes_to_the_same_bits(tmp_path):
    pytest.importorskip("accelerate")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200,
        cwd=SCRIPT.parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"killed after step \d+ of 40, resumed; of \d+ tensors 0 differ", done.stdout), done.stdout
