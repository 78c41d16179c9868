"""`pst-kernels finetune` from outside: what it writes, and that a killed run resumes to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from finetune_job import call, printed_by
from safetensors.torch import load_file
from tiny_text import texts, write_csv, write_jsonl, write_model

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from pst_kernels import PSTConfig, load_pretrained
from pst_kernels.config import WORDS_RANK
from pst_kernels.finetune.callbacks import COMPLETE, StopOnNaN, newest_checkpoint
from pst_kernels.finetune.measure import count_zeros
from pst_kernels.finetune.settings import Settings

STEPS = 40
RATES = ["--learning-rate", "5e-3", "--pst-learning-rate", "5e-3", "--head-learning-rate", "1e-2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model folder and three files, the training one as CSV and the others as JSON lines."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    rows = texts(120, 0)
    write_csv(folder / "train.csv", rows[:80])
    write_jsonl(folder / "validation.jsonl", rows[80:95])
    write_jsonl(folder / "test.jsonl", rows[95:])
    return folder


def arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model", str(inputs / "model"), "--train-file", str(inputs / "train.csv"),
        "--validation-file", str(inputs / "validation.jsonl"), "--test-file", str(inputs / "test.jsonl"),
        "--output", str(output), "--steps", str(STEPS), "--save-steps", "7", "--evaluations", "2",
        "--dropout", "0.1", "--max-length", "64", *RATES, *more,
    ]  # fmt: skip


def start(inputs: Path, output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pst_kernels.cli", "finetune", *arguments(inputs, output, *more)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )  # fmt: skip


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """An uninterrupted run of both methods: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, printed_by(*arguments(inputs, folder))


@pytest.mark.slow
def test_results_hold_every_number_of_the_table(finished, inputs):
    folder, printed = finished
    results = json.loads((folder / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    columns = {"test_accuracy", "zeros_pruned", "zeros_model", "trainable", "step_ms", "peak_mb", "checkpoint_mb"}
    columns |= {"inference_ms", "folder_mb"}
    assert list(rows) == ["dense", "pst"]
    for row in rows.values():
        assert set(row) == {"method", *columns}
        assert row["step_ms"] > 0
        assert row["peak_mb"] > 100
    assert {"machine", "versions", "date", "seed", "settings", "data"} <= set(results)
    assert results["settings"]["steps"] == STEPS
    assert results["data"]["train"] == 80
    assert rows["dense"]["test_accuracy"] >= 0.9  # eleven words of which three tell the label
    dense, pst = (results["details"][name] for name in ("dense", "pst"))
    weights = sum(t.numel() for t in load_file(folder / "dense" / "model.safetensors").values())
    assert dense["model_numel"] == rows["dense"]["trainable"] == weights
    assert pst["prunable_numel"] == 2 * (4 * 24 * 24 + 2 * 24 * 40)
    factors = 2 * (4 * (4 * 24 * 8 + 48) + 2 * (2 * 64 * 8 + 64))
    kept, biases, norms = 8 * 58 + 4 * 96, 2 * (4 * 24 + 40 + 24), 5 * 48
    vocabulary = json.loads((inputs / "model" / "config.json").read_text())["vocab_size"]
    words = WORDS_RANK * (vocabulary + 24)
    # and the pooler and the classifier
    assert rows["pst"]["trainable"] == factors + kept + biases + norms + words + 24 * 24 + 24 + 24 * 3 + 3
    assert pst["trainable_of_movement"] == rows["pst"]["trainable"] / (weights + pst["prunable_numel"])
    for name in ("dense", "pst"):
        history = results["history"][name]
        assert history["step"] == list(range(1, STEPS + 1))
        assert len(history["loss"]) == STEPS
        assert history["validation_step"] == [STEPS // 2, STEPS]
    assert results["history"]["pst"]["sparsity"][-1] == 0.9
    assert set(results["history"]["dense"]["sparsity"]) == {0.0}
    for text in ("test accuracy", f"{rows['pst']['trainable']:,}", "of what movement pruning trains"):
        assert text in printed
    said = " ".join(printed.split())
    assert "Trained with dropout 0.1. A step of PST, and its memory, have its teacher's forward in them." in said
    assert set(pst["inference"]) == {"this", "dense"}
    assert rows["pst"]["inference_ms"] == pst["inference"]["this"] > 0
    files = [path.stat().st_size / 1e6 for path in (folder / "pst" / "sparse").glob("*.safetensors")]
    assert rows["pst"]["folder_mb"] == pytest.approx(sum(files), rel=1e-6)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("checkpoint-*"))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_merged_checkpoint_is_a_plain_model_with_the_stated_zeros(finished, inputs):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    weights = load_file(folder / "pst" / "merged" / "model.safetensors")
    dense = load_file(folder / "dense" / "model.safetensors")
    assert {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in dense.items()}
    pruned = {n: t for n, t in weights.items() if ".encoder." in n and n.endswith("weight") and t.dim() == 2}
    assert len(pruned) == 12
    for name, tensor in pruned.items():
        assert int((tensor == 0).sum()) == int(tensor.numel() * 0.9), name
    share = sum(int((t == 0).sum()) for t in weights.values()) / sum(t.numel() for t in weights.values())
    assert results["rows"][1]["zeros_model"] == share
    tokenizer = AutoTokenizer.from_pretrained(folder / "pst" / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "pst" / "merged").eval()
    assert merged.config.id2label == {0: "art", 1: "money", 2: "sport"}
    rows = texts(120, 0)[95:]
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = merged(**batch).logits
        base = AutoModelForSequenceClassification.from_pretrained(inputs / "model", num_labels=3)
        adapted = load_pretrained(base, folder / "pst" / "adapter").eval()(**batch).logits
    right = [merged.config.id2label[i] == label for i, (_, label) in zip(logits.argmax(1).tolist(), rows, strict=True)]
    assert results["rows"][1]["test_accuracy"] == sum(right) / len(right)
    torch.testing.assert_close(adapted, logits, rtol=1e-4, atol=1e-5)
    assert PSTConfig.from_pretrained(folder / "pst" / "adapter").sparsity == 0.9


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, f"the run ended before it could be stopped: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def group_is_gone(process: subprocess.Popen) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_killed_and_interrupted_runs_resume_to_the_same_bits(finished, inputs, tmp_path):
    folder, output = finished[0], tmp_path / "run"

    first = start(inputs, output)
    wait_for(lambda: any((output / "state" / "dense").glob(f"checkpoint-*/{COMPLETE}")), first)
    first.kill()
    first.wait()
    deadline = time.monotonic() + 20
    while not group_is_gone(first):  # the training process ends with the command
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.stdout.close()
    assert not (output / "results.json").exists()
    assert not (output / "dense").exists()
    assert 0 < steps_done(output / "state" / "dense") < STEPS

    second = start(inputs, output, "--resume")
    wait_for(lambda: any((output / "state" / "pst").glob(f"checkpoint-*/{COMPLETE}")), second)
    os.killpg(second.pid, signal.SIGINT)
    assert "--resume" in finish(second, 130)
    assert 0 < steps_done(output / "state" / "pst") < STEPS
    written = (output / "dense" / "model.safetensors").stat().st_mtime_ns

    finish(start(inputs, output, "--resume"))
    assert (output / "dense" / "model.safetensors").stat().st_mtime_ns == written  # not trained again
    for name in ("dense/model.safetensors", "pst/merged/model.safetensors", "pst/adapter/pst_adapter.safetensors"):
        resumed, straight = load_file(output / name), load_file(folder / name)
        assert resumed.keys() == straight.keys()
        for key, tensor in straight.items():
            assert torch.equal(resumed[key], tensor), (name, key)
    histories = [json.loads((path / "results.json").read_text())["history"] for path in (output, folder)]
    assert histories[0] == histories[1]

    again = printed_by(*arguments(inputs, output, "--resume"))
    assert "step" not in again.split("Fine-tuned")[0]  # all done: the table, and no training


def steps_done(checkpoints: Path) -> int:
    return max(int(p.parent.name.rpartition("-")[2]) for p in checkpoints.glob(f"checkpoint-*/{COMPLETE}"))


def test_half_written_checkpoints_are_not_resumed_from(tmp_path):
    assert newest_checkpoint(tmp_path / "absent", 200) is None
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 100:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert newest_checkpoint(tmp_path, 200) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-100").exists()
    assert newest_checkpoint(tmp_path, 10) == str(tmp_path / "checkpoint-5")  # a run of ten steps was at its end
    assert newest_checkpoint(tmp_path, 5) is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    state = SimpleNamespace(global_step=3)
    StopOnNaN().on_log(None, state, None, {"loss": 0.5})
    StopOnNaN().on_log(None, state, None, {"eval_accuracy": 0.5})
    with pytest.raises(RuntimeError, match=f"the loss is {loss} at step 3; lower the learning rates"):
        StopOnNaN().on_log(None, state, None, {"loss": loss})


def test_zeros_are_counted_in_the_file(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"a.weight": torch.tensor([[0.0, 1e-30], [-0.0, -2.0]]), "a.bias": torch.zeros(3)}, tmp_path / "m.safetensors"
    )
    zeros = count_zeros(tmp_path, ["a"])
    assert (zeros.pruned_share, zeros.model_share) == (0.5, 5 / 7)
    with pytest.raises(RuntimeError, match=r"lacks 1 of 2 pruned weights, such as b\.weight"):
        count_zeros(tmp_path, ["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"--sparsity 1.0 must lie in \[0, 1\)"),
        ({"sparsity": -0.1}, "--sparsity -0.1"),
        ({"sparsity": float("nan")}, "--sparsity nan"),
        ({"dropout": 1.0}, "--dropout 1.0"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_length": 2}, "--max-length 2"),
        ({"pst_learning_rate": 0.0}, "--pst-learning-rate 0.0"),
        ({"method": "magic"}, "--method 'magic'"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "/no/such/folder"], "--model /no/such/folder is not a folder"),
        (["--max-length", "65"], "--max-length 65 is more than the 64 tokens"),
        (["--train-file", "absent.csv"], "absent.csv is not a file"),
        (["--text-column", "body"], "has no column 'body'"),
    ],
)
def test_bad_requests_write_nothing(inputs, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments(inputs, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_is_named(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        call(*arguments(inputs, tmp_path / "run", "--model", str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weights"):
        call(*arguments(inputs, tmp_path / "run", "--model", str(tmp_path)))


@pytest.mark.slow
def test_existing_results_are_neither_overwritten_nor_mixed(finished, inputs):
    folder, _ = finished
    before = (folder / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a run already \(results\.json.*--resume"):
        call(*arguments(inputs, folder))
    with pytest.raises(ValueError, match="had seed = 0, now it is 1"):
        call(*arguments(inputs, folder, "--resume", "--seed", "1"))
    other = write_csv(inputs / "other.csv", texts(80, 9))
    with pytest.raises(ValueError, match="had train_file"):
        call(*arguments(inputs, folder, "--resume", "--train-file", str(other)))
    assert (folder / "results.json").read_bytes() == before
