"""The main job behind `pst-kernels finetune`: a pretrained model fine-tuned dense and by PST, side by side.

`data` reads, `train` trains one method in a process of its own, `report` writes. Importing this is cheap.
"""

from __future__ import annotations

import argparse
import importlib.util

from .settings import add_arguments

PACKAGES = ("transformers", "accelerate", "matplotlib", "rich")
__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> int:
    """Run the job; returns the exit status. Raises ImportError where a package of the extra `finetune` is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; run: pip install 'pst_kernels[finetune]'")
    from .job import main as job

    return job(args)
