"""`pst-kernels finetune` in this process: only its trainings are processes of their own, as they always are."""

from __future__ import annotations

import argparse
import contextlib
import io

import pytest

from pst_kernels import finetune


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    return finetune.main(parser.parse_args(arguments))


def printed_by(*arguments: str) -> str:
    """Run to the end; returns what the job itself prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        assert call(*arguments) == 0, printed.getvalue()
    return printed.getvalue()
