"""The accuracy grid on a BERT of two small layers, and cells that finish at once: helpers, and fixtures as a plugin."""

import argparse

import pytest
from tiny_text import texts, write_model

from bench.accuracy import catalogue, job, methods, record, tasks, train
from bench.accuracy.record import FINAL, TUNE, Cell, Row
from pst_kernels.finetune import data
from pst_kernels.finetune.settings import Settings

SIZE = tasks.Size(steps=6, batch=4, length=12, labels_each=3)
LINEARS = 12  # of two layers


@pytest.fixture(scope="session")
def tiny_grid_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny(tiny_grid_model, monkeypatch):
    """The tiny model and texts in the place of MiniLM and the BBC's articles."""
    examples = [data.Example(text, label, str(i)) for i, (text, label) in enumerate(texts(90, seed=0))]
    split = data.Dataset(examples[:50], examples[50:70], examples[70:], sorted({e.label for e in examples}))
    settings = Settings(model=str(tiny_grid_model), dropout=0.0)
    tokenizer = tasks.models.load_tokenizer(settings)
    monkeypatch.setattr(tasks, "MINILM", settings)
    monkeypatch.setattr(tasks, "_split", lambda source: split)
    monkeypatch.setattr(tasks, "_tokenizer", lambda: tokenizer)
    return split


def task(name="topic"):
    return tasks.TASKS[name](SIZE)


def cell(method="PST", stage=TUNE, sparsity=0.5, setting=None, seed=0, name="topic"):
    found = catalogue.METHODS[method]
    grid = found.grid or catalogue.METHODS[found.like].grid
    text = record.setting_text(grid[len(grid) // 2] if setting is None else setting)
    return Cell(stage, name, method, sparsity if found.sparse else 0.0, text, seed, 6, 4, 12, 3)


def run(one: Cell, **more) -> Row:
    return train.run(one, task(one.task), catalogue.METHODS[one.method], **more)


def teacher_of(method, name="topic"):
    """An untrained one, for a method that learns from one."""
    return task(name).model().eval() if catalogue.METHODS[method].distillation else None


def row(one: Cell, validation=0.5, test=None, reached=None, trainable=100, metric="accuracy") -> Row:
    reached = one.sparsity if reached is None else reached
    return Row(one, metric, validation, test, 1.0, reached, trainable, 2.0, "machine", 1, "versions", "day", "abc")


def trainable_names(method, name="topic"):
    model = task(name).model()
    catalogue.METHODS[method].convert(model, methods.Plan(task(name), 0.5, 0))
    return {n for n, p in model.named_parameters() if p.requires_grad}, model


def options(tmp_path, *more):
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    given = ["--tasks", "topic", "--sparsities", "0.5", "0.9", "--methods", "dense", "PST", "PST, rank 2"]
    return parser.parse_args([*given, "--seeds", "2", "--steps", "6", "--output", str(tmp_path), *more])


@pytest.fixture
def fake(tiny, monkeypatch, tmp_path):
    """Cells that finish at once; validation prefers the largest rate. Returns the cells in the order they ran."""
    ran = []

    def run(one, task, method, masks_folder=None, teacher=None):
        ran.append(one)
        rates = one.rates
        best = rates.get("factors", rates.get("weights"))
        return row(one, validation=best, test=0.5 if one.stage == FINAL else None)

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(job, "MASKS", tmp_path / "masks")
    return ran
