"""The README's quick start runs, and prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_quick_start(tmp_path, monkeypatch):
    blocks = re.findall(r"```(python|text)\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    code, printed = (next(text for kind, text in blocks if kind == wanted) for wanted in ("python", "text"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, str(README), "exec"), {})
    assert output.getvalue() == printed
    assert (tmp_path / "runs/adapter/pst_adapter.safetensors").is_file()
    assert (tmp_path / "runs/merged/model.safetensors").is_file()
