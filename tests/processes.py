"""A script in a process of its own, which starts the others of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pst_kernels as pst


def launch(folder: Path, script: str, worker: ModuleType) -> Path:
    """Run the script with the folder as its argument; it finds `worker` and the package. Returns the folder."""
    (folder / "launch.py").write_text(script)
    paths = [*map(str, Path(str(worker.__file__)).parents[:2]), str(Path(pst.__file__).parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(folder / "launch.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder
