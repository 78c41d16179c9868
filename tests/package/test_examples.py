"""Each example runs, as a user runs it but for its size, and says what it should."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_text
import torch
import toys

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*command: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs a script in this process: what it imports is there already."""
    monkeypatch.chdir(tmp_path)

    def run_here(*command: str) -> str:
        monkeypatch.setattr(sys, "argv", list(command))
        runpy.run_path(command[0], run_name="__main__")
        return capsys.readouterr().out

    return run_here


def example(name: str) -> str:
    return str(ROOT / "examples" / f"{name}.py")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_is_short_and_tested(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") < 60
    assert f'example("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")


@pytest.mark.slow
def test_plain_loop(here):
    output = here(example("plain_loop"), "--steps", "5", "--width", "32")
    assert "sparsity 0.90" in output
    assert float(output.split("differs by ")[1]) < 1e-5


@pytest.mark.slow
def test_trainer_on_a_text_file(here, tmp_path):
    tiny_text.write_model(tmp_path / "base")
    (tmp_path / "texts.tsv").write_text("".join(f"text {i} of a kind\tkind {i % 2}\n" for i in range(40)))
    output = here(example("trainer_text"), "texts.tsv", "--model", "base", "--steps", "3")
    assert "40 texts, 2 labels" in output


@pytest.mark.slow
def test_causal_lm(here):
    output = here(example("causal_lm"), "--steps", "3", "--width", "32")
    assert "The mask " in output


@pytest.mark.slow
def test_vit(here):
    output = here(example("vit"), "--steps", "3", "--width", "48")
    assert "SparseLinear" in output
    assert output.count("vit.") >= 12


@pytest.mark.slow
def test_fsdp2(tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = run(*launch, example("fsdp2"), "--steps", "2", "--width", "32", folder=tmp_path)
    assert "sparsity 0.90" in output


@pytest.mark.slow
def test_convert_a_checkpoint(here, tmp_path):
    torch.manual_seed(0)
    model = toys.gpt2()
    for module in model.transformer.h.modules():
        if hasattr(module, "nf"):
            with torch.no_grad():
                module.weight[torch.rand(module.weight.shape) < 0.9] = 0.0
    model.save_pretrained(tmp_path / "pruned")
    output = here(example("convert_checkpoint"), "pruned", "--tokens", "4")
    dense, sparse = (line.rsplit(", ", 1)[1] for line in output.splitlines()[-2:])
    assert float(dense) == pytest.approx(float(sparse), abs=2e-5)
