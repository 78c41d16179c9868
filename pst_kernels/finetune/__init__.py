"""The main job behind `pst-kernels finetune`: a pretrained model fine-tuned dense and by PST, side by side.

`data` reads, `train` trains one method in a process of its own, `report` writes. Importing this is cheap.
"""

from __future__ import annotations

import argparse

from .settings import add_arguments

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> int:
    """Run the job; returns the exit status."""
    from .job import main as job

    return job(args)
