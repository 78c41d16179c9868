"""Other architectures and heads in `pst-kernels finetune`, and refusals in the words of its command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tiny_text import texts, write_csv, write_model

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

from pst_kernels import PSTConfig, cli
from pst_kernels.finetune import data, models, presets, train
from pst_kernels.finetune.result import read_result
from pst_kernels.finetune.settings import Settings

LABELS = ["art", "money", "sport"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer and texts, with a folder for each model that a test asks for."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "bert")
    write_csv(folder / "train.csv", texts(60, 0))
    return folder


def saved(inputs, name, model):
    if not (inputs / name).exists():
        model.save_pretrained(inputs / name)
        transformers.AutoTokenizer.from_pretrained(inputs / "bert").save_pretrained(inputs / name)
    return str(inputs / name)


def bart(inputs, eos=3):
    """`eos` is the token that its classifier reads; the tokenizer ends each text with 3."""
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIZES.items()}
    config = transformers.BartConfig(
        vocab_size=29, d_model=24, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=eos,
        decoder_start_token_id=eos, forced_eos_token_id=None, **sides,
    )  # fmt: skip
    return saved(inputs, f"bart{eos}", transformers.BartForSequenceClassification(config))


SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 40}


def bert_for(inputs, problem_type, labels):
    config = transformers.BertConfig(
        vocab_size=29, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=64, num_labels=labels, problem_type=problem_type,
    )  # fmt: skip
    return saved(inputs, problem_type, transformers.BertForSequenceClassification(config))


@pytest.fixture
def quiet():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "regression"])
def test_it_is_trained_and_evaluated(inputs, tmp_path, quiet, name):
    model = bart(inputs) if name == "bart" else bert_for(inputs, "regression", 1)
    dataset = data.load(inputs / "train.csv", None, None, "text", "label", 0)
    settings = Settings(model=model, output=str(tmp_path), method="pst", steps=2, evaluations=1, max_length=32)
    train.run("pst", settings, dataset, tmp_path / "state")
    result = read_result(tmp_path / "state", "pst")
    assert result.history["validation_step"] == [2]
    right = result.history["validation_accuracy"][0] * len(dataset.validation)
    assert right == pytest.approx(round(right))
    assert 0.8 < result.row["zeros_pruned"] < 0.9 + 1e-6  # what a matrix of 24 x 24 can do
    config = transformers.AutoConfig.from_pretrained(tmp_path / "pst" / "merged")
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")


@pytest.mark.parametrize(("problem_type", "labels"), [("regression", 1), ("multi_label_classification", 3)])
def test_a_head_for_another_problem_is_told(inputs, problem_type, labels):
    settings = Settings(model=bert_for(inputs, problem_type, labels), max_length=32)
    assert models.check(settings, LABELS) == [
        f"--model {settings.model} was for problem_type {problem_type!r}; here it learns one of 3 labels for each text"
    ]
    model = models.load_model(settings, LABELS)
    out = model(input_ids=torch.tensor([[2, 7, 3]]), labels=torch.tensor([1]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([1])))


def test_a_tokenizer_that_does_not_end_texts_as_the_model_expects_is_refused(inputs):
    assert models.check(Settings(model=bart(inputs), max_length=32), LABELS) == []
    with pytest.raises(ValueError, match="is a bart that looks for token 4 at the end of a text, but its tokenizer"):
        models.check(Settings(model=bart(inputs, eos=4), max_length=32), LABELS)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "target_modules='all-linear' matches no linear layer; the model has none",
            "has no linear layer in its blocks; the model has none",
        ),
        ("weight_rank must be at least 1, got 0", "--rank must be at least 1, got 0"),
        ("sparsity=0.7 does not fit", "--sparsity 0.7 does not fit"),
        (
            "x is parametrised; or leave it out with exclude_modules=['x']",
            "x is parametrised; or leave it out with exclude_modules=['x'] (this command has no option for"
            " exclude_modules; call replace_linear in Python to set it)",
        ),
    ],
)
def test_a_refusal_names_the_options_of_the_command_line(error, told):
    assert str(presets.refusal("m", ValueError(error))) == f"--model m: {told}"


def test_what_cannot_be_converted_is_refused_before_anything_is_written(inputs, tmp_path, monkeypatch, capsys):
    class WithoutTargets(PSTConfig):
        def __post_init__(self):
            super().__post_init__()
            self.target_modules = []

    monkeypatch.setattr(presets, "PSTConfig", WithoutTargets)
    rows = texts(60, 0)
    path = write_csv(tmp_path / "a.csv", [*rows, (rows[0][0], "money")])
    command = ["finetune", "--model", str(inputs / "bert"), "--train-file", str(path), "--max-length", "32"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main([*command, "--output", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert f"pst-kernels finetune: --model {inputs / 'bert'}: " in printed.err
    assert printed.out.count(f"note: 1 text has more than one label and is used with each: {path}:2 ('sport')") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_damaged_weight_is_refused_in_one_line(inputs, tmp_path):
    """In a process of its own: that which forks the trainings prints to where its first one did."""
    model = transformers.BertModel.from_pretrained(inputs / "bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    folder = saved(inputs, "damaged", model)
    command = [sys.executable, "-m", "pst_kernels.cli", "finetune", "--model", folder, "--max-length", "32"]
    command += ["--train-file", str(inputs / "train.csv"), "--output", str(tmp_path / "run"), "--steps", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    printed = done.stderr
    assert (
        f"pst-kernels finetune: --model {folder}: the weight of bert.encoder.layer.0.output.dense has 1 NaN" in printed
    )
    assert "Traceback" not in printed
