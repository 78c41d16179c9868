"""The methods of the accuracy grid: what trains, at which rates, how far each is pruned, and what it learns from."""

import dataclasses
import math
import re

import pytest
import torch
from tiny_grid import LINEARS, SIZE, cell, run, task, teacher_of, trainable_names

from bench.accuracy import catalogue, methods, tasks, teachers, train
from bench.accuracy.record import FINAL
from pst_kernels import Distillation, PSTConfig
from pst_kernels.masks import patterns
from pst_kernels.masks.patterns import num_pruned_at
from pst_kernels.parameter_groups import grouping
from pst_kernels.schedule import SparsitySchedule, sparsity_at

pytest_plugins = ["tiny_grid"]
# Over the rate of dense fine-tuning.
FACTORS = {"update": 5.0, "scores": 5.0, "kept": 5.0, "words": 20.0, "embeddings": 5.0, "others": 10.0}
pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("method", catalogue.METHODS)
def test_a_cell_reaches_its_sparsity_and_moves_only_what_trains(method, name):
    torch.manual_seed(0)
    one = cell(method, name=name)
    trained = train.train(one, task(name), catalogue.METHODS[method], teacher_of(method, name)).model
    masks = methods.masks(trained)
    assert len(masks) == (LINEARS if catalogue.METHODS[method].sparse else 0)
    if "one threshold" in method:
        assert sum(int((~m).sum()) for m in masks.values()) == sum(
            num_pruned_at(m.numel(), 0.5) for m in masks.values()
        )
        assert any(int((~m).sum()) != num_pruned_at(m.numel(), 0.5) for m in masks.values())
        masks = {}
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
    trains_all = ("magnitude", "dense", "movement", "soft movement", "L0")
    factors_only = method.removeprefix("candidate: ").partition(",")[0] not in trains_all
    assert ("bert.encoder.layer.0.attention.self.query.weight" in frozen) == factors_only


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
            expected = setting.get(role, methods.HEAD_RATE)
            expected = setting.get("embeddings", expected) if methods.WORDS in name else expected
            if "lr" in setting:
                group = grouping(model)(name)
                smaller = 4 if group == "update" and "paper" not in method else 1  # beta is 1 / 16
                expected = setting.get(group, setting["lr"] * FACTORS[group] * smaller)
                expected = setting.get("embeddings", expected) if methods.WORDS in name else expected
            assert rates[id(parameter)] == pytest.approx(expected)
    head_rate = setting.get("others", 10 * setting["lr"]) if "lr" in setting else methods.HEAD_RATE
    assert rates.get(id(model.classifier.weight), head_rate) == head_rate


def test_a_setting_without_a_rate_is_refused():
    _, model = trainable_names("PST")
    with pytest.raises(ValueError, match="no learning rate for scores"):
        methods.groups(model, task(), {"factors": 1e-3})
    with pytest.raises(ValueError, match="no layer of the model has one"):
        run(cell(setting={"factors": 1e-3, "scores": 1e-3, "penalty": 1.0}))


def test_all_methods_are_tuned_over_equally_many_settings():
    tuned = [catalogue.METHODS[m.like] if m.like else m for m in (*catalogue.BASELINES, *catalogue.RECIPES)]
    grids = {method.name: len(method.grid) for method in tuned}
    assert {grids.pop(name) for name in list(grids) if ", at " in name} == {1}
    assert grids.pop(catalogue.FASTER_WORDS.name) == 2  # the rates that validation chose without
    assert set(grids.values()) == {3}
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
        count = num_pruned_at(147456, 0.8 * methods.progress_at(step, 120))
        assert abs(count - num_pruned_at(147456, sparsity_at(step, 120, config))) <= 1
    assert (methods.progress_at(0, 120), methods.progress_at(120, 120)) == (0.0, 1.0)


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


def counts_of(method):
    """Pruned weights of each layer at every step of a cell, and in the end."""
    seen = []

    class Watched(tasks.Topic):
        def loss(self, model, batch):
            seen.append([int(layer.pst_num_pruned) for layer in methods.sparse_layers(model).values()])
            return super().loss(model, batch)

    model = train.train(cell(method.name), Watched(SIZE), method).model
    return [*seen, [int(layer.pst_num_pruned) for layer in methods.sparse_layers(model).values()]]


def test_a_schedule_of_its_own():
    method = dataclasses.replace(catalogue.METHODS["PST"], convert=methods.pst(warmup=0.0, cooldown=0.5))
    found = counts_of(method)
    config = PSTConfig(sparsity=0.5, warmup=0.0, cooldown=0.5)
    model = task().model()
    sizes = [layer.weight.numel() for layer in methods.targets(model).values()]
    for step, counts in enumerate(found):
        assert counts == [num_pruned_at(size, sparsity_at(step, SIZE.steps, config)) for size in sizes]
    assert found[2] < found[3] == found[-1]  # half of six steps


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("name", ["paper", "accurate", "fast"])
def test_a_preset_is_the_packages_own(name, sparsity):
    model, topic = task().model(), task()
    saved = [*topic.head, *(methods.NORMS if name != "paper" else ())]
    expected = PSTConfig.preset(name, sparsity=sparsity, modules_to_save=saved)
    if name != "paper":
        catalogue.METHODS[f"PST, {name}"].convert(model, methods.Plan(topic, sparsity, 0))
    else:
        methods.preset(name)(model, methods.Plan(topic, sparsity, 0))
    found = [layer.config for layer in methods.sparse_layers(model).values()]
    assert found == [expected] * LINEARS


@pytest.mark.parametrize("pattern", ["block:16", "2:4"])
def test_patterns_rise_along_the_schedule(pattern):
    """What each layer holds at every step is what `SparsitySchedule` gives it."""
    method = catalogue.METHODS[f"PST, {pattern}"]
    seen = counts_of(method)
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
    return tasks.Outputs(torch.tensor(loss).double(), logits, tuple(states), real)


def test_the_loss_of_distillation_is_its_formula():
    torch.manual_seed(0)
    mine, theirs = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    states = [torch.randn(2, 4, 6).double() for _ in range(6)]
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    student = outputs(mine, states[:3], real=real)
    teacher = outputs(theirs, states[3:], loss=7.0, real=real)
    p, q = torch.softmax(theirs / 3.0, 1), torch.softmax(mine / 3.0, 1)
    divergence = 9.0 * float((p * (p / q).log()).sum() / 5)
    assert float(Distillation(3.0, 0.25)(student, teacher, real=real)) == pytest.approx(
        0.75 * 2.0 + 0.25 * divergence, rel=1e-12
    )
    ratios = []
    for s, t in zip(states[1:3], states[4:], strict=True):  # without the embeddings
        apart = sum(float((s[i, j] - t[i, j]).square().sum()) for i, j in real.nonzero().tolist())
        ratios.append(apart / sum(float(t[i, j].square().sum()) for i, j in real.nonzero().tolist()))
    assert float(Distillation(3.0, 0.25, 4.0)(student, teacher, real=real)) == pytest.approx(
        0.75 * 2.0 + 0.25 * divergence + 4.0 * sum(ratios) / 2, rel=1e-12
    )
    assert float(Distillation(2.0, 1.0, 1.0)(student, student, real=real)) == pytest.approx(0.0, abs=1e-12)


def test_a_batch_without_a_masked_word_teaches_nothing():
    logits = torch.randn(0, 3, requires_grad=True)
    found = Distillation().divergence(logits, torch.randn(0, 3))
    found.backward()
    assert found.item() == 0.0
    assert logits.grad.shape == (0, 3)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_only_the_student_learns(name):
    method = dataclasses.replace(catalogue.METHODS["PST"], distillation=Distillation(2.0, 0.5, 1.0))
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


def test_the_rate_of_movement_scores_changes_nothing():
    """They start at 0 and only their order counts, so Adam's rate scales them and no more."""
    setting = {"weights": 1e-3, "scores": 1e-2}
    found = []
    for rate in (1e-2, 4e-2):  # a power of two apart, so that the scaling is exact
        one = cell("movement", setting=setting | {"scores": rate})
        found.append(train.train(one, task(), catalogue.METHODS["movement"]))
    assert found[0].loss == found[1].loss
    first, second = (dict(one.model.named_parameters()) for one in found)
    for name, parameter in first.items():
        scale = 4.0 if name.endswith("mask_scores") else 1.0
        assert torch.equal(scale * parameter, second[name]), name
    assert all(first[name].any() for name in first if name.endswith("mask_scores"))
