"""What README and pages show runs, and prints what they say; troubleshooting quotes real messages."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import PAGES, README, ROOT, blocks
from transformers import BertConfig, BertForSequenceClassification

import pst_kernels as pst
from bench.accuracy import catalogue, methods
from bench.accuracy.tasks import Size, Topic

TROUBLESHOOTING = PAGES["troubleshooting"]
OTHER_LIBRARIES = (
    "torch.amp.grad_scaler",
    "torch.utils.checkpoint",
    "torch.distributed.tensor.parallel.style",
    "torch.utils._typing_utils",
    "accelerate.utils.dataclasses",
    "peft.utils.peft_types",
)


def printed(code: str, names: dict[str, Any]) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "page", "exec"), names)
    return output.getvalue()


# What is for several processes has a test of its own below, the recipe of the study too.
SHOWN = {page: blocks(page) for page in PAGES if blocks(page)}


@pytest.mark.slow
@pytest.mark.parametrize("page", SHOWN)
def test_what_a_page_shows_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    if page == "accuracy":
        size = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
        names = {"torch": torch, "pst": pst, "model": BertForSequenceClassification(BertConfig(**size))}
    for code, expected in SHOWN[page]:
        if "accelerator.end_training()" in code:
            continue
        output = printed(code, names)
        assert expected is None or output == expected


def test_the_readme_fits_on_a_screen_or_two():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


LAUNCHERS = {
    "alone": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--main_process_port", "0",
        "--config_file", str(ROOT / "configs" / "accelerate_ddp.yaml"),
    ],
}  # fmt: skip
THREADS = """
import os, pathlib
names = [task.joinpath("comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()]
pathlib.Path("threads." + os.environ.get("RANK", "0")).write_text("\\n".join(names))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_trainer(launcher, tmp_path):
    """The same output from one process and from two. No thread of their group is left when Python ends: a running one
    may abort the process then (docs/troubleshooting.md).
    """
    pytest.importorskip("accelerate")
    code, expected = next(block for block in blocks("training") if "Trainer(" in block[0])
    (tmp_path / "train.py").write_text(code + THREADS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert expected
    assert done.stdout.endswith(expected)
    assert done.stdout.count("trainable params") == 1
    threads = [path.read_text().split("\n") for path in tmp_path.glob("threads.*")]
    assert len(threads) == (2 if launcher else 1)
    assert not [name for names in threads for name in names if "gloo" in name]


def test_the_recipe_is_the_one_that_was_measured():
    size = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(**size, vocab_size=50, max_position_embeddings=16)
    shown: dict[str, Any] = {"torch": torch, "pst": pst, "model": BertForSequenceClassification(config)}
    exec(compile(blocks("accuracy")[0][0], "page", "exec"), shown)
    measured, task = BertForSequenceClassification(config), Topic(Size())
    catalogue.METHODS["PST, our recipe"].convert(measured, methods.Plan(task, 0.9, 0))
    setting = catalogue.FOUND.grid[1]  # the one that validation chose on topics, at 50 and at 90 %

    def rates(model, groups):
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}

    assert rates(shown["model"], shown["optimizer"].param_groups) == rates(
        measured, methods.groups(measured, task, setting)
    )
    of_shown, of_measured = (model.bert.encoder.layer[0].output.dense.config for model in (shown["model"], measured))
    assert of_shown.to_dict() | {"modules_to_save": None} == of_measured.to_dict() | {"modules_to_save": None}


def messages(source: str) -> list[str]:
    """Every string of a module, those in several pieces joined, with … for what is filled in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    return [text(node) for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.JoinedStr, ast.Constant))]


def test_troubleshooting_quotes_messages_that_exist():
    ours, theirs = TROUBLESHOOTING.read_text(encoding="utf-8").split("## Messages of other libraries")
    package = Path(pst.__file__).parent
    said = [m for path in package.rglob("*.py") for m in messages(path.read_text(encoding="utf-8"))]
    quoted = re.findall(r"^\| `(.+?)` \|", ours, re.M)
    assert len(quoted) > 20
    missing = [quote for quote in quoted if not any(quote.strip("… ") in message for message in said)]
    assert not missing
    said = []
    for name in OTHER_LIBRARIES:
        if importlib.util.find_spec(name.partition(".")[0]):
            said += messages(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8"))
    quoted = re.findall(r"^\| `(.+?)` \|", theirs, re.M)
    assert len(quoted) == 6
    if importlib.util.find_spec("peft"):
        assert not [quote for quote in quoted if not any(quote in message for message in said)]
