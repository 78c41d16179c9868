"""The console script: jobs, exit codes, and `pst-kernels env`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pst_kernels as pst
from bench import __main__ as bench
from pst_kernels import cli, env, ops
from pst_kernels import env_report as report

ROOT = Path(pst.__file__).parents[1]


def test_env_as_text(capsys):
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "versions"
    for section in ("machine", "variables", "backend on cpu"):
        assert section in lines
    assert f"  {'torch':<22} {torch.__version__.split('+')[0]}" in [line.split("+")[0] for line in lines]
    by_numba = "numba (passes over W; products are torch's, in float32 and bfloat16)"
    assert f"  {'linear_forward':<22} {by_numba}" in lines
    assert f"  {'block_forward':<22} torch (no kernels for cpu tensors)" in lines
    assert f"  {'kth_value':<22} numba (a look at more than 65,536 scores; the rest is NumPy's)" in lines
    assert (
        f"  {'kept_blocks_forward':<22} numba (stored blocks, up to 128 tokens; above a product of torch's a block,"
        in (line.removesuffix(" in float32 and bfloat16)") for line in lines)
    )
    assert f"  {'sparse_forward':<22} numba (lists of kept weights, in float32 and bfloat16)" in lines


def test_env_answers_for_every_op_and_its_variables(capsys, monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", "torch")
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backend on cpu"]
    assert found.keys() == set(ops.NAMES)
    assert found["linear_forward"] == found["sparse_forward"] == "torch (PST_KERNELS_CPU=torch)"
    assert found["kth_value"] == "numpy (PST_KERNELS_CPU=torch)"
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backend on cpu"]
    assert found["linear_forward"] == "triton (PST_KERNELS_BACKEND=triton)"
    assert found["kept_blocks_forward"].startswith("torch")
    assert found["sparse_forward"].startswith("triton")


def test_env_as_json(capsys, monkeypatch):
    monkeypatch.setenv("PST_KERNELS_BACKEND", "torch")
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"].keys() == {"pst_kernels", "python", *env.PACKAGES}
    assert found["variables"] == {
        "PST_KERNELS_BACKEND": "torch", "PST_KERNELS_CPU": "auto", "PST_KERNELS_ARCH": "sm_90",
        "PST_KERNELS_TUNING": "none",
    }  # fmt: skip
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert list(found["backend on cpu"]) == ops.NAMES
    assert found["backend on cpu"]["block_forward"] == "torch (PST_KERNELS_BACKEND=torch)"


def test_an_absent_package_is_reported(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package",))
    assert env.versions()["no-such-package"] == "not installed"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "PST_KERNELS_BACKEND",
            "cuda",
            "PST_KERNELS_BACKEND='cuda' is not known; set it to one of auto, triton, torch",
        ),
        ("PST_KERNELS_ARCH", "h100", "PST_KERNELS_ARCH='h100' is not known; set it to one of sm_80"),
        ("PST_KERNELS_TUNING", "/no/such", "PST_KERNELS_TUNING='/no/such' is not a file"),
    ],
)
def test_a_bad_variable_is_one_line_and_exit_code_2(name, value, message, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    assert cli.main(["env"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"pst-kernels env: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("value", ["", "  ", " torch "])
def test_blank_and_padded_variables(value, monkeypatch):
    monkeypatch.setenv("PST_KERNELS_BACKEND", value)
    assert env.backend() == (value.strip() or "auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: JOB"),
        (["prune"], "invalid choice: 'prune'"),
        (["env", "--yaml"], "unrecognized arguments: --yaml"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "usage: pst-kernels" in error
    assert message in error


def test_help_names_every_job_and_imports_none(capsys, monkeypatch):
    monkeypatch.setattr(cli.jobs.importlib, "import_module", None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(job in text for job in cli.JOBS)


@pytest.mark.parametrize(
    ("command", "name", "job"),
    [*((cli, "pst-kernels", job) for job in cli.JOBS), *((bench, "python -m bench", job) for job in bench.JOBS)],
)
def test_each_job_has_a_help(command, name, job, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main([job, "--help"])
    assert caught.value.code == 0
    assert f"{name} {job}" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ImportError, ValueError, FileNotFoundError, OSError])
@pytest.mark.parametrize("place", ["add_arguments", "main"])
def test_what_a_job_raises_is_one_line_and_exit_code_2(error, place, capsys, monkeypatch):
    def fail(*arguments):
        raise error("triton is not installed")

    monkeypatch.setattr(report, place, fail)
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == "pst-kernels env: triton is not installed\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(report, "main", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


@pytest.mark.slow
def test_as_a_process():
    command = [sys.executable, "-m", "pst_kernels.cli", "env", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "backend on cpu" in json.loads(done.stdout)
    assert done.stderr == ""
