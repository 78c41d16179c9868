"""The accuracy grid on a BERT of two small layers: fair cells, no test data in a choice, resuming, what it shows."""

import argparse
import ast
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_text import texts, write_model
from torch import nn

import bench.accuracy
from bench.accuracy import (
    catalogue,
    choose,
    distill,
    final,
    job,
    methods,
    overlap,
    plots,
    record,
    rerun,
    table,
    tasks,
    teachers,
    train,
)
from bench.accuracy.record import FINAL, SHOW, TUNE, Cell, Row
from pst_kernels import PSTConfig, patterns, replace_linear
from pst_kernels.finetune import data
from pst_kernels.finetune.settings import Settings
from pst_kernels.patterns import num_pruned_at
from pst_kernels.schedule import SparsitySchedule, sparsity_at

SIZE = tasks.Size(steps=6, batch=4, length=12, labels_each=3)
LINEARS = 12  # of two layers


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def tiny(model_folder, monkeypatch):
    """The tiny model and texts in the place of MiniLM and the BBC's articles."""
    examples = [data.Example(text, label, str(i)) for i, (text, label) in enumerate(texts(90, seed=0))]
    split = data.Dataset(examples[:50], examples[50:70], examples[70:], sorted({e.label for e in examples}))
    settings = Settings(model=str(model_folder), dropout=0.0)
    tokenizer = tasks.models.load_tokenizer(settings)
    monkeypatch.setattr(tasks, "MINILM", settings)
    monkeypatch.setattr(tasks, "_split", lambda: split)
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


# Methods


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("method", catalogue.METHODS)
def test_a_cell_reaches_its_sparsity_and_moves_only_what_trains(method, name):
    torch.manual_seed(0)
    one = cell(method, name=name)
    trained = train.train(one, task(name), catalogue.METHODS[method], teacher_of(method, name)).model
    masks = methods.masks(trained)
    assert len(masks) == (LINEARS if catalogue.METHODS[method].sparse else 0)
    for layer, mask in masks.items():
        pruned = int((~mask).sum())
        if method == "Wanda + LoRA":
            assert pruned == mask.shape[0] * int(mask.shape[1] * 0.5)
        elif ", block:" in method:
            blocks = patterns.Blocks(int(method.rpartition(":")[2]))
            shape = (mask.shape[0], mask.shape[1])
            assert blocks.fits(mask, blocks.num_pruned_at(shape, 0.5))
        elif method not in ("soft movement", "L0"):
            assert pruned == num_pruned_at(mask.numel(), 0.5), layer
    torch.manual_seed(0)
    fresh = dict(task(name).model().named_parameters())
    frozen = {n: p for n, p in trained.named_parameters() if not p.requires_grad and n in fresh}
    assert all(torch.equal(parameter, fresh[name]) or "classifier" in name for name, parameter in frozen.items())
    factors_only = method not in ("dense", "magnitude", "movement", "soft movement", "L0")
    assert ("bert.encoder.layer.0.attention.self.query.weight" in frozen) == factors_only


def trainable_names(method, name="topic"):
    model = task(name).model()
    catalogue.METHODS[method].convert(model, methods.Plan(task(name), 0.5, 0))
    return {n for n, p in model.named_parameters() if p.requires_grad}, model


def test_what_trains_is_what_each_method_says():
    released, _ = trainable_names("PST as released")
    assert len(released) == 6 * LINEARS
    assert all(".pst_" in name for name in released)
    ours, _ = trainable_names("PST")
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert ours == released | head
    more, model = trainable_names("PST, LayerNorm and biases trained")
    linears = re.compile(r"bert\.encoder\.layer\.\d\..*(query|key|value|dense)\.bias")
    assert more - ours == {n for n, _ in model.named_parameters() if "LayerNorm" in n or linears.fullmatch(n)}
    words, _ = trainable_names("PST", "masked words")
    assert {n for n in words if ".pst_" not in n} == {
        "head.transform.weight", "head.transform.bias", "head.norm.weight", "head.norm.bias", "head.bias"
    }  # fmt: skip
    everything, model = trainable_names("movement")
    assert everything == {n for n, _ in model.named_parameters()}
    assert sum(n.endswith("mask_scores") for n in everything) == LINEARS
    only_W, _ = trainable_names("PST, score of W")
    assert {n.rpartition(".")[2] for n in only_W - head} == {"pst_U", "pst_V"}


@pytest.mark.parametrize("method", catalogue.METHODS)
def test_every_parameter_has_one_rate(method):
    names, model = trainable_names(method)
    found = catalogue.METHODS[method]
    setting = (found.grid or catalogue.METHODS[found.like].grid)[0]
    groups = methods.groups(model, task(), setting)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(names)
    for name, parameter in model.named_parameters():
        if name in names:
            role = methods.role(name, task().head)
            assert rates[id(parameter)] == setting.get(role, methods.HEAD_RATE)
    assert rates.get(id(model.classifier.weight), methods.HEAD_RATE) == methods.HEAD_RATE


def test_a_setting_without_a_rate_is_refused():
    _, model = trainable_names("PST")
    with pytest.raises(ValueError, match="no learning rate for scores"):
        methods.groups(model, task(), {"factors": 1e-3})
    with pytest.raises(ValueError, match="no layer of the model has one"):
        run(cell(setting={"factors": 1e-3, "scores": 1e-3, "penalty": 1.0}))


def test_all_methods_are_tuned_over_equally_many_settings():
    tuned = [catalogue.METHODS[m.like] if m.like else m for m in (*catalogue.BASELINES, *catalogue.RECIPES)]
    assert {len(method.grid) for method in tuned} == {3}
    assert all(catalogue.METHODS[method.like].grid and not method.grid for method in catalogue.ABLATIONS)
    assert [m.name for m in catalogue.METHODS.values() if m.candidate] == [m.name for m in catalogue.CANDIDATES]


def test_a_penalty_prunes():
    setting = {"weights": 1e-4, "scores": 4.0, "penalty": 1e5}
    assert run(cell("soft movement", setting=setting)).sparsity_reached > 0.9
    assert run(cell("soft movement", setting=setting | {"penalty": 0.0})).sparsity_reached < 0.7


def test_the_penalty_is_the_mean_over_layers():
    _, model = trainable_names("L0")
    layers = list(methods.sparse_layers(model).values())
    for number, layer in enumerate(layers):
        layer.gate_scores.data.fill_(float(number - 3))
    expected = [1 / (1 + math.exp(-(number - 3 - 2 / 3 * math.log(1 / 11)))) for number in range(LINEARS)]
    assert methods.penalty(model).item() == pytest.approx(sum(expected) / LINEARS, rel=1e-6)


def test_masks_follow_the_schedule_of_the_package():
    config = PSTConfig(sparsity=0.8)
    for step in range(121):
        count = num_pruned_at(147456, 0.8 * train.progress_at(step, 120))
        assert abs(count - num_pruned_at(147456, sparsity_at(step, 120, config))) <= 1
    assert (train.progress_at(0, 120), train.progress_at(120, 120)) == (0.0, 1.0)


def test_the_last_mask_is_that_of_the_last_factors_whatever_the_interval():
    model = train.train(cell("PST, mask every 16 steps"), task(), catalogue.METHODS["PST, mask every 16 steps"]).model
    for name, mask in methods.masks(model).items():
        layer = model.get_submodule(name)
        layer.refresh_mask(force=True)
        assert torch.equal(layer.mask, mask)


def test_input_norms_leave_padding_out():
    model = task().model()
    layers = methods.targets(model)
    norms = methods.Plan(task(), 0.5, 0).norms(model, layers)
    batch = next(task().calibration(0))
    name = "bert.encoder.layer.0.attention.self.query"
    embedded = model.bert.embeddings(input_ids=batch["input_ids"])
    real = embedded[batch["attention_mask"].bool()]
    assert 0 < len(real) <= batch["input_ids"].numel()
    torch.testing.assert_close(norms[name], real.square().sum(0).sqrt(), rtol=1e-5, atol=1e-6)
    assert not layers[name]._forward_pre_hooks


def test_a_schedule_of_its_own(monkeypatch):
    found = []
    monkeypatch.setattr(methods, "go_to", lambda model, sparsity, progress: found.append(progress))
    method = dataclasses.replace(catalogue.METHODS["PST"], warmup=0.0, cooldown=0.5)
    train.train(cell(), task(), method)
    config = PSTConfig(sparsity=0.9, warmup=0.0, cooldown=0.5)
    expected = [sparsity_at(step, SIZE.steps, config) / 0.9 for step in range(SIZE.steps)]
    assert found == pytest.approx([*expected, 1.0])
    assert found[2] < 1.0 == found[3]  # half of six steps


@pytest.mark.parametrize("pattern", ["block:16", "2:4"])
def test_patterns_rise_along_the_schedule(pattern, monkeypatch):
    """What each layer holds at every step is what `SparsitySchedule` gives it."""
    method, seen = catalogue.METHODS[f"PST, {pattern}"], []
    whole = methods.go_to

    def watched(model, sparsity, progress):
        whole(model, sparsity, progress)
        seen.append([int(layer.pst_num_pruned) for layer in methods.sparse_layers(model).values()])

    monkeypatch.setattr(methods, "go_to", watched)
    train.train(cell(f"PST, {pattern}"), task(), method)
    model = task().model()
    method.convert(model, methods.Plan(task(), 0.5, 0))
    schedule, expected = SparsitySchedule(model, SIZE.steps), []
    for _ in range(SIZE.steps + 1):
        expected.append([int(layer.pst_num_pruned) for layer in methods.sparse_layers(model).values()])
        schedule.step()
    assert seen == expected
    assert seen[0] != seen[-1]


# Distillation


def outputs(logits, states, loss=2.0, real=None):
    real = torch.ones(states[0].shape[:2], dtype=torch.bool) if real is None else real
    return distill.Outputs(torch.tensor(loss).double(), logits, tuple(states), real)


def test_the_loss_of_distillation_is_its_formula():
    torch.manual_seed(0)
    mine, theirs = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    states = [torch.randn(2, 4, 6).double() for _ in range(6)]
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    student = outputs(mine, states[:3], real=real)
    teacher = outputs(theirs, states[3:], loss=7.0, real=real)
    p, q = torch.softmax(theirs / 3.0, 1), torch.softmax(mine / 3.0, 1)
    divergence = 9.0 * float((p * (p / q).log()).sum() / 5)
    assert float(distill.Distillation(0.25, 3.0).loss(student, teacher)) == pytest.approx(
        0.75 * 2.0 + 0.25 * divergence, rel=1e-12
    )
    ratios = []
    for s, t in zip(states[1:3], states[4:], strict=True):  # without the embeddings
        apart = sum(float((s[i, j] - t[i, j]).square().sum()) for i, j in real.nonzero().tolist())
        ratios.append(apart / sum(float(t[i, j].square().sum()) for i, j in real.nonzero().tolist()))
    assert float(distill.Distillation(0.25, 3.0, 4.0).loss(student, teacher)) == pytest.approx(
        0.75 * 2.0 + 0.25 * divergence + 4.0 * sum(ratios) / 2, rel=1e-12
    )
    assert float(distill.Distillation(1.0, 2.0, 1.0).loss(student, student)) == pytest.approx(0.0, abs=1e-12)


def test_a_batch_without_a_masked_word_teaches_nothing():
    logits = torch.randn(0, 3, requires_grad=True)
    found = distill.Distillation().divergence(logits, torch.randn(0, 3))
    found.backward()
    assert found.item() == 0.0
    assert logits.grad.shape == (0, 3)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_only_the_student_learns(name):
    method = dataclasses.replace(catalogue.METHODS["PST"], distillation=distill.Distillation(0.5, 2.0, 1.0))
    teacher = task(name).model().eval()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    taught = train.train(cell(name=name), task(name), method, teacher).model
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    alone = train.train(cell(name=name), task(name), catalogue.METHODS["PST"]).model
    trained = {key: value for key, value in alone.named_parameters() if key.endswith("pst_V")}
    assert len(trained) == LINEARS
    assert not any(torch.equal(taught.get_parameter(key), value) for key, value in trained.items())
    with pytest.raises(ValueError, match="learns from a dense model"):
        train.train(cell(name=name), task(name), method)


def test_a_teacher_is_the_dense_model_of_the_seed_trained_once(tmp_path, monkeypatch):
    one = cell("dense", FINAL, seed=1)
    expected = train.train(one, task(), catalogue.METHODS["dense"]).model.state_dict()
    found = [teachers.get(tmp_path, one, task(), catalogue.METHODS["dense"])]
    monkeypatch.setattr(train, "train", None)
    found.append(teachers.get(tmp_path, one, task(), catalogue.METHODS["dense"]))
    for model in found:
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="to learn from diverged"):
        teachers.get(tmp_path, cell("dense", FINAL, setting={"weights": 1e30}), task(), catalogue.METHODS["dense"])


# Tasks


def test_every_method_starts_from_the_same_head_and_sees_the_same_batches(monkeypatch):
    heads, batches = {}, {}

    class Seen(tasks.Topic):
        def loss(self, model, batch):
            heads.setdefault(current, model.classifier.weight.detach().clone())
            batches.setdefault(current, []).append(batch["input_ids"])
            return super().loss(model, batch)

    for current in ("dense", "PST", "Wanda + LoRA", "L0"):
        train.train(cell(current), Seen(SIZE), catalogue.METHODS[current])
    assert all(torch.equal(head, heads["dense"]) for head in heads.values())
    assert all(torch.equal(torch.stack(seen), torch.stack(batches["dense"])) for seen in batches.values())
    assert len(batches["PST"]) == SIZE.steps


def test_few_labels_as_many_of_each_class_and_others_for_another_seed(tiny):
    chosen = task().training_texts(0)
    assert sorted(text.label for text in chosen) == sorted(tiny.labels * 3)
    assert chosen == task().training_texts(0) != task().training_texts(1)
    assert set(chosen) <= set(tiny.train)


def test_an_epoch_holds_every_text_once():
    size = tasks.Size(steps=9, batch=2, length=12, labels_each=6)
    seen = [tuple(ids.tolist()) for batch in tasks.Topic(size).batches(0) for ids in batch["input_ids"]]
    assert len(set(seen)) == len(seen) == 18


def test_words_are_masked_as_in_bert(tiny):
    words, tokenizer = task("masked words"), tasks._tokenizer()
    many = tiny.train * 40
    rows = words.encode(many, seed=3)
    ids = torch.stack([batch["input_ids"] for batch in rows])
    labels = torch.stack([batch["labels"] for batch in rows])
    plain = words._tokens(many)["input_ids"]
    real = words._tokens(many)["attention_mask"].bool() & (plain != tokenizer.cls_token_id)
    real &= plain != tokenizer.sep_token_id
    chosen = labels != tasks.IGNORED
    assert not (chosen & ~real).any()
    assert torch.equal(labels[chosen], plain[chosen])
    assert torch.equal(ids[~chosen], plain[~chosen])
    assert (chosen.sum() / real.sum()).item() == pytest.approx(0.15, abs=0.01)
    masked = (ids[chosen] == tokenizer.mask_token_id).double().mean().item()
    assert masked == pytest.approx(0.8 + 0.1 / len(tokenizer), abs=0.02)
    assert (ids[chosen] == plain[chosen]).double().mean().item() == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=0.02)
    again = words.encode(many, seed=4)
    assert not torch.equal(ids, torch.stack([batch["input_ids"] for batch in again]))


def test_the_loss_of_masked_words_is_that_of_all_positions_decoded():
    words = task("masked words")
    model = words.model()
    batch = next(iter(words.batches(0)))
    hidden = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    normed = nn.functional.layer_norm(hidden, hidden.shape[-1:])  # the transform starts as the identity
    logits = normed @ model.bert.embeddings.word_embeddings.weight.T
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=tasks.IGNORED)
    torch.testing.assert_close(words.loss(model, batch), expected, rtol=1e-5, atol=1e-6)
    texts_ = words.validation_texts()
    rows = words.encode(texts_, 0)
    with torch.no_grad():
        found = [model(**{n: v[None] for n, v in one.items()}) for one in rows]
    by_hand = float(sum(out.loss * len(out.logits) for out in found)) / sum(len(out.logits) for out in found)
    assert words.judge(model, texts_) == pytest.approx(by_hand, rel=1e-5)


def test_accuracy_counts_right_texts(tiny):
    model = task().model()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    expected = sum(text.label == tiny.labels[1] for text in tiny.validation) / len(tiny.validation)
    assert task().judge(model, tiny.validation) == expected


# No test data in any choice


def test_only_a_final_cell_reads_test_texts(monkeypatch):
    def refuse():
        raise RuntimeError("test texts were read")

    monkeypatch.setattr(tasks, "test_texts", refuse)
    assert run(cell(stage=TUNE)).test is None
    assert run(cell("PST, rank 2", stage=SHOW)).test is None
    with pytest.raises(RuntimeError, match="test texts were read"):
        run(cell(stage=FINAL))


def test_no_other_file_names_the_test_texts():
    readers = {}
    for path in Path(bench.accuracy.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("test_texts", "_split"):
                readers.setdefault(path.name, set()).add(node.attr)
            if isinstance(node, ast.Attribute) and node.attr == "judge" and getattr(node.value, "id", "") == "final":
                readers.setdefault(path.name, set()).add("final.judge")
    assert readers == {"final.py": {"test_texts"}, "train.py": {"final.judge"}}
    # inside tasks.py one function reads the split's test texts
    assert (Path(bench.accuracy.__file__).parent / "tasks.py").read_text(encoding="utf-8").count("_split().test") == 1


def test_a_final_cell_is_judged_on_the_test(tiny):
    one = cell(stage=FINAL)
    trained = train.train(one, task(), catalogue.METHODS["PST"]).model
    got = run(one)
    assert got.test == task().judge(trained, tiny.test) == final.judge(trained, task())
    assert got.validation == task().judge(trained, tiny.validation)


GRID = [{"weights": rate} for rate in (1e-4, 1e-3, 1e-2)]


def tuned(*validations, reached=None):
    cells = choose.tuning_cells(cell("magnitude", stage=FINAL), GRID)
    reached = reached or [0.5] * 3
    found = zip(cells, validations, reached, strict=True)
    return cells, {one: row(one, value, reached=share) for one, value, share in found}


def test_the_best_on_validation_is_chosen():
    cells, rows = tuned(0.6, 0.8, 0.7)
    assert {one.stage for one in cells} == {TUNE}
    assert {one.seed for one in cells} == {choose.TUNING_SEED}
    assert choose.best(rows, cells, higher_is_better=True) == cells[1].setting
    assert choose.best(rows, cells, higher_is_better=False) == cells[0].setting
    del rows[cells[2]]
    assert choose.best(rows, cells, higher_is_better=True) is None
    cells, rows = tuned(0.7, 0.7, None)
    assert choose.best(rows, cells, higher_is_better=True) == cells[0].setting
    cells, rows = tuned(None, None, None)
    with pytest.raises(ValueError, match="every setting of magnitude diverged"):
        choose.best(rows, cells, higher_is_better=True)


def test_a_setting_that_misses_the_target_is_chosen_only_if_all_do():
    cells, rows = tuned(0.9, 0.5, 0.6, reached=[0.1, 0.49, 0.6])
    assert choose.best(rows, cells, higher_is_better=True) == cells[2].setting
    cells, rows = tuned(0.9, 0.5, 0.6, reached=[0.1, 0.2, 0.15])
    assert choose.best(rows, cells, higher_is_better=True) == cells[1].setting


# Cells and the record


def test_the_same_cell_comes_out_the_same():
    one, again = run(cell("PST")), run(cell("PST"))
    assert (one.validation, one.train_loss) == (again.validation, again.train_loss)
    assert run(cell("PST", seed=1)).train_loss != one.train_loss


def test_training_that_diverges_is_recorded_and_not_tested():
    got = run(cell("dense", stage=FINAL, setting={"weights": 1e30}))
    assert (got.validation, got.test, got.train_loss) == (None, None, None)


def test_the_record_reads_back_what_was_added(tmp_path):
    path = tmp_path / "accuracy.csv"
    assert record.read(path) == {}
    rows = [
        row(cell("magnitude", FINAL, seed=1), 0.75, 0.5),
        row(cell("PST"), None),
        row(cell("dense", FINAL), 0.25, 0.125),
    ]
    for one in rows:
        record.add(path, one)
    assert record.read(path) == {one.cell: one for one in rows}
    better = dataclasses.replace(rows[1], validation=0.5)
    record.add(path, better)
    assert record.read(path)[better.cell] == better
    assert len(record.read(path)) == 3
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="has columns"):
        record.read(path)


# The job


def options(tmp_path, *more):
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    given = ["--tasks", "topic", "--sparsities", "0.5", "0.9", "--methods", "dense", "PST", "PST, rank 2"]
    return parser.parse_args([*given, "--seeds", "2", "--steps", "6", "--output", str(tmp_path), *more])


@pytest.fixture
def fake(monkeypatch, tmp_path):
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


def test_the_job_tunes_then_reports_every_cell_once(fake, tmp_path):
    assert job.main(options(tmp_path)) == 0
    stages = [one.stage for one in fake]
    # dense: 3 settings; PST: 3 at each sparsity; 2 seeds of dense, and of PST and its ablation at each sparsity
    assert (stages.count(TUNE), stages.count(FINAL), stages.count(SHOW)) == (9, 2 + 4, 4)
    assert len(set(fake)) == len(fake)
    largest = record.setting_text(catalogue.PST_RATES[-1])
    assert {one.setting for one in fake if one.method != "dense" and one.stage != TUNE} == {largest}
    seeds = [one.seed for one in fake if one.stage != TUNE]
    assert seeds == sorted(seeds)
    assert set(record.read(tmp_path / record.CSV_NAME)) == set(fake)
    before = len(fake)
    assert job.main(options(tmp_path)) == 0
    assert len(fake) == before


def test_the_job_goes_on_where_it_was_stopped(fake, tmp_path, monkeypatch):
    whole = train.run

    def stopped(*args):
        if len(fake) == 7:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(train, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        job.main(options(tmp_path))
    monkeypatch.setattr(train, "run", whole)
    assert job.main(options(tmp_path)) == 0
    assert len(set(fake)) == len(fake) == 9 + 6 + 4


def test_candidates_run_every_setting_by_tuning_seeds_and_are_never_tested(fake, tmp_path):
    name = "candidate: one rate"
    assert job.main(options(tmp_path, "--methods", name)) == 0
    settings = [record.setting_text(setting) for setting in catalogue.METHODS[name].grid]
    found = {(one.setting, one.sparsity, one.seed) for one in fake}
    assert found == {(text, sparsity, seed) for text in settings for sparsity in (0.5, 0.9) for seed in (100, 101)}
    assert {one.stage for one in fake} == {TUNE}
    assert len(fake) == len(found)


def test_a_recipe_is_tested_at_the_setting_of_the_candidate_that_it_was(fake, tmp_path):
    name, before = "PST, our recipe", catalogue.FOUND
    assert job.main(options(tmp_path, "--methods", name)) == 0
    tuning, final_ones = [one for one in fake if one.stage == TUNE], [one for one in fake if one.stage == FINAL]
    assert {(one.method, one.seed) for one in tuning} == {(before.name, choose.TUNING_SEED)}
    assert len(tuning) == 2 * len(before.grid) == 6
    largest = record.setting_text(before.grid[-1])
    assert {(one.method, one.setting) for one in final_ones} == {(name, largest)}
    assert len(final_ones) == 4
    assert len(fake) == 10
    recipe = catalogue.METHODS[name]
    assert dataclasses.replace(recipe, name=before.name, grid=before.grid, like=None, candidate=True) == before


def test_what_learns_from_the_dense_model_waits_for_its_setting(fake, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(teachers, "get", lambda folder, one, task, dense: asked.append((one, dense.name)))
    assert job.main(options(tmp_path, "--methods", "candidate: norms, small beta, logits", "--sparsities", "0.9")) == 0
    assert [one.method for one in fake[:3]] == ["dense"] * 3
    assert {one.method for one in fake[3:]} == {"candidate: norms, small beta, logits"}
    largest = record.setting_text(catalogue.WEIGHT_RATES[-1])
    expected = [
        (dataclasses.replace(one, stage=FINAL, method="dense", sparsity=0.0, setting=largest), "dense")
        for one in fake[3:]
    ]
    assert asked == expected


def test_a_pattern_of_one_sparsity_runs_at_no_other(fake, tmp_path):
    assert job.main(options(tmp_path, "--methods", "PST, 2:4", "--seeds", "1")) == 0
    assert {one.sparsity for one in fake} == {0.5}


def test_a_rerun_is_set_beside_the_record(fake, tmp_path, monkeypatch):
    given = options(tmp_path, "--methods", "PST", "--seeds", "3")
    assert job.main(given) == 0
    for one, value in zip([c for c in fake if c.stage == FINAL and c.sparsity == 0.5], (0.5, 0.6, 0.8), strict=True):
        record.add(tmp_path / record.CSV_NAME, row(one, 0.5, value))
    before = (tmp_path / record.CSV_NAME).read_text()
    found = []

    def again(one, task, method, masks_folder=None, teacher=None):
        found.append(one)
        return row(one, 0.5, 0.75)

    monkeypatch.setattr(train, "run", again)
    only = ["--methods", "PST", "--seeds", "3", "--sparsities", "0.5"]
    assert job.main(options(tmp_path, *only, "--rerun", "1")) == 0
    lines = rerun.read(tmp_path / rerun.CSV_NAME)
    assert [(one.seed, one.stage) for one in found] == [(0, FINAL)]
    assert {name: lines[0][name] for name in ("recorded", "again", "difference", "seed_range", "seeds", "within")} == {
        "recorded": "0.5", "again": "0.75", "difference": "0.25", "seed_range": "0.3", "seeds": "3", "within": "yes"
    }  # fmt: skip
    monkeypatch.setattr(train, "run", lambda one, *_, **__: row(one, 0.5, 0.1))
    assert job.main(options(tmp_path, *only, "--rerun", "2")) == 1
    lines = rerun.read(tmp_path / rerun.CSV_NAME)
    assert [(line["seed"], line["within"]) for line in lines] == [("0", "no"), ("1", "no")]
    assert (tmp_path / record.CSV_NAME).read_text() == before


def test_no_cell_starts_when_the_time_is_up(fake, tmp_path):
    assert job.main(options(tmp_path, "--minutes", "1e-9")) == 0
    assert fake == []


def test_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'pst' is not known"):
        job.grid(options(tmp_path, "--methods", "pst"))


# What is shown


def some_rows():
    rows = []
    for method, values in {"dense": (0.95, 0.96, 0.97), "PST": (0.8, 0.9, 0.85)}.items():
        rows += [row(cell(method, FINAL, seed=s), 0.5, v, trainable=1234) for s, v in enumerate(values)]
    rows.append(row(cell("L0", FINAL), 0.5, 0.7, reached=0.31))
    rows.append(row(cell("PST", FINAL, name="masked words", sparsity=0.9), 5.0, 4.5, metric="loss"))
    return {one.cell: one for one in rows}


def test_the_table_gives_mean_worst_best_and_number_of_seeds(tmp_path):
    text = table.markdown(some_rows())
    assert text.splitlines()[:5] == [
        "| | trainable | topic, 50 % | topic, 90 % | masked words, 50 % | masked words, 90 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| dense | 1,234 | 96.0 (95.0 to 97.0, 3) | 96.0 (95.0 to 97.0, 3) | - | - |",
        "| L0 | 100 | 70.0 (70.0 to 70.0, 1) at 31 % | - | - | - |",
        "| PST | 1,234 | 85.0 (80.0 to 90.0, 3) | - | - | 4.50 (4.50 to 4.50, 1) |",
    ]
    assert "topic: test accuracy, %; masked words: test loss, nats a masked word" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.rewrite_readme(readme, some_rows())
    assert readme.read_text() == f"before\n{table.BEGIN}\n{text}\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match="no final rows"):
        table.markdown({})


def test_overlap_is_the_share_of_kept_weights_that_both_keep(tmp_path):
    one, other = cell("PST", FINAL), cell("magnitude", FINAL)
    mask = torch.tensor([[True, True, False, False, False], [True, False, False, False, True]])
    overlap.save(tmp_path, one, {"a": mask, "b": torch.ones(3, 3, dtype=torch.bool)})
    overlap.save(tmp_path, other, {"a": ~mask, "b": torch.ones(3, 3, dtype=torch.bool)})
    assert np.array_equal(overlap.load(tmp_path, one), [*mask.flatten().tolist(), *[True] * 9])
    assert overlap.load(tmp_path, cell("movement", FINAL)) is None
    path = tmp_path / overlap.CSV_NAME
    overlap.write(path, tmp_path, [one, other, cell("movement", FINAL)])
    rows = overlap.read(path)
    assert [row[3:] for row in rows] == [
        ["PST", "magnitude", "13", "9", f"{9 / 13:.4f}", f"{15 / 19:.4f}"],
        ["magnitude", "PST", "15", "9", f"{9 / 15:.4f}", f"{13 / 19:.4f}"],
    ]
    overlap.write(path, tmp_path / "nothing here", [])
    assert overlap.read(path) == rows


def test_a_final_cell_keeps_its_masks(tmp_path):
    one = cell(stage=FINAL)
    run(one, masks_folder=tmp_path)
    kept = overlap.load(tmp_path, one)
    model = task().model()
    prunable = sum(linear.weight.numel() for linear in methods.targets(model).values())
    exact = sum(num_pruned_at(linear.weight.numel(), 0.5) for linear in methods.targets(model).values())
    assert kept.size == prunable
    assert int((~kept).sum()) == exact


def test_the_pictures_show_what_the_rows_say(tmp_path):
    rows = some_rows()
    figure = plots.by_sparsity(list(rows.values()))
    topic, words = figure.axes
    assert [t.get_text() for t in topic.get_legend().get_texts()] == ["dense", "L0", "PST"]
    dense = next(line for line in topic.lines if line.get_label() == "dense")
    np.testing.assert_allclose(dense.get_ydata(), [96.0, 96.0])
    lines = [line.get_xydata().tolist() for line in topic.lines]
    assert any(np.allclose(line, [[50.0, 85.0]]) for line in lines)
    assert words.get_ylabel() == "test loss, nats a masked word"
    pairs = [["topic", "0.5", "0", "PST", "magnitude", "13", "9", "0.6923", "0.7895"]]
    written = plots.draw(rows, pairs, tmp_path)
    assert sorted(path.name for path in written) == [
        "accuracy_by_sparsity.png", "accuracy_by_trainable.png", "accuracy_overlap.png"
    ]  # fmt: skip
    assert plots.draw({}, [], tmp_path) == []


def test_targets_are_those_of_replace_linear():
    model = task().model()
    names = set(methods.targets(model))
    converted = replace_linear(task().model(), PSTConfig())
    assert names == {n for n, m in converted.named_modules() if type(m).__name__ == "PSTLinear"}
    assert len(names) == LINEARS
