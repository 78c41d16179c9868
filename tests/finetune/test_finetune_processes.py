"""`pst-kernels finetune` under torchrun, with two CPU processes (gloo): the run of one process, and how it ends when a
process dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune_job import printed_by
from safetensors.torch import load_file
from tiny_text import texts, write_csv, write_model

import pst_kernels as pst

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROOT = Path(pst.__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
STEPS = 4  # of one epoch: its last batch is smaller, and two processes fill it up


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_csv(folder / "train.csv", texts(96, 0))
    return folder


def arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(inputs / "model"), "--train-file", str(inputs / "train.csv"), "--output", str(output)]
    return [*given, "--save-steps", "2", "--evaluations", "2", "--max-length", "32", *more]


def start(inputs: Path, output: Path, *more: str) -> subprocess.Popen:
    """On two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = ["-m", "pst_kernels.cli", "finetune", *arguments(inputs, output, *more)]
    command = [sys.executable, *launcher, *job]
    return subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def end(process: subprocess.Popen, seconds: float = 150) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_do_what_one_does(inputs, tmp_path):
    # alone, PST has no dense model of the run to learn from; squares of halves of a batch do not add up to its own
    steps = ["--steps", str(STEPS), "--hardness", "0", "--magnitude", "plain"]
    printed_by(*arguments(inputs, tmp_path / "one", *steps, "--method", "pst"))
    two = start(inputs, tmp_path / "two", *steps)
    printed = end(two)
    assert two.returncode == 0, printed
    assert printed.count("Fine-tuned on the same batches") == 1  # one process prints
    assert printed.count(f"pst: step {STEPS} of {STEPS}") == 1
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert [result["processes"] for result in results] == [1, 2]
    assert [row["method"] for row in results[1]["rows"]] == ["dense", "pst"]
    for key in ("test_accuracy", "zeros_pruned", "zeros_model", "trainable"):
        assert results[1]["rows"][1][key] == results[0]["rows"][0][key]
    single, shared = (load_file(tmp_path / name / "pst/adapter/pst_adapter.safetensors") for name in ("one", "two"))
    assert single.keys() == shared.keys()
    for name, tensor in single.items():
        if name.endswith("key.bias"):
            continue  # no loss depends on it: its gradient is rounding alone, which AdamW makes steps of
        if name.endswith("pst_mask"):
            assert torch.equal(shared[name], tensor), name
        else:  # AdamW divides by small second moments, which magnifies how the gradients' sums were rounded
            torch.testing.assert_close(shared[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    losses = [result["history"]["pst"]["loss"] for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert not list((tmp_path / "two").rglob("checkpoint-*"))


def training_process(launcher: int, rank: int) -> int | None:
    """The process that trains for `rank`, among all those that the launcher started: one of a server's own."""
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or os.getpgid(int(folder.name)) == 0:
                continue
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            command = Path(f"/proc/{parent}/cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = os.getsid(int(folder.name)) in _sessions(launcher)
        if ours and b"forkserver" in command and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    return None


def _sessions(launcher: int) -> set[int]:
    """Sessions of a process and its children; torchrun gives each worker its own."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return {os.getsid(int(pid)) for pid in [launcher, *children] if Path(f"/proc/{pid}").exists()}


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(inputs, tmp_path):
    job = start(inputs, tmp_path / "run", "--steps", "100000", "--method", "pst")
    deadline = time.monotonic() + 100
    while not any((tmp_path / "run/state/pst").glob("checkpoint-*/complete")):
        assert job.poll() is None, end(job)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [training_process(job.pid, rank) for rank in (0, 1)]
    assert None not in pids
    os.kill(pids[1], signal.SIGKILL)
    printed = end(job, 60)  # torch's own patience with a rank that is gone is ten minutes
    assert job.returncode == 1
    assert "training pst ended with exit status -9" in printed
    for _ in range(200):
        if not Path(f"/proc/{pids[0]}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{pids[0]}").exists()  # the other rank's training has ended too


def test_a_batch_that_the_processes_cannot_share_is_refused(inputs, tmp_path, monkeypatch):
    from pst_kernels import cli

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["finetune", "--batch-size", "16", "--output", str(tmp_path / "run")]) == 2
