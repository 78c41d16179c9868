"""One threshold over several matrices: the counts of a sort of all scores, and those that a schedule sets."""

from __future__ import annotations

import copy

import pytest
import torch
import toys

import pst_kernels as pst
from pst_kernels.masks import allocation
from pst_kernels.masks.allocation import OneThreshold


def by_definition(matrices, most, count):
    """Takes the smallest one after another by (score, matrix, flat index), passing over what may not lose more."""
    flat = [m.flatten() for m in matrices]
    found = [0] * len(flat)
    everything = torch.cat(flat)
    owner = torch.cat([torch.full_like(f, i) for i, f in enumerate(flat)]).long()
    for place in torch.argsort(everything, stable=True).tolist():
        if sum(found) == count:
            break
        i = int(owner[place])
        if found[i] < most[i]:
            found[i] += 1
    return found


@pytest.mark.parametrize("values", ["normal", "ties", "wide", "nan"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("kept", [0, 0.2])
def test_counts_are_those_of_a_sort(values, share, kept):
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn(shape, generator=generator) * scale for shape, scale in (((30, 7), 1), ((9, 20), 3), ((5, 5), 0.1))
    ]
    if values == "ties":
        matrices = [(m * 2).round() / 2 for m in matrices]
    elif values == "wide":
        matrices = [m * torch.randn(m.shape, generator=generator).mul(20).exp2() for m in matrices]
    elif values == "nan":
        matrices[1][2:4] = torch.nan
    most = [m.numel() - int(kept * m.numel()) for m in matrices]
    count = int(share * sum(most))
    threshold = OneThreshold()
    for moved in (0, 0, 5, -40):  # by histograms, then near where the threshold was, if it is near
        now = min(max(count + moved, 0), sum(most))
        counts = threshold.counts(matrices.__getitem__, most, now)
        assert counts.tolist() == by_definition(matrices, most, now)
        assert int(counts.sum()) == now


def test_one_look_is_enough_near_the_last_threshold(monkeypatch):
    looks = []
    matrices = [torch.randn(300, 200), torch.randn(100, 70) * 0.1, torch.randn(50, 50) * 9]
    most = [50000, 6000, 1000]  # the last two lose as many as they may, the first few more than they

    def scores_of(i):
        looks.append(i)
        return matrices[i]

    threshold = OneThreshold()
    threshold.counts(scores_of, most, 40000)
    assert looks == [0, 1, 2, 0, 1, 2]
    for count in (40000, 40200, 41000):
        del looks[:]
        matrices = [m + 1e-4 * torch.randn_like(m) for m in matrices]
        assert threshold.counts(scores_of, most, count).tolist() == by_definition(matrices, most, count)
        assert looks == [0, 1, 2]
    monkeypatch.setattr(allocation, "_near", lambda *_: pytest.fail("a threshold far away was looked for nearby"))
    OneThreshold().counts(scores_of, most, 40000)


def test_too_many():
    with pytest.raises(ValueError, match=r"count must be in \[0, 8\]"):
        OneThreshold().counts(lambda _: torch.zeros(3, 3), [4, 4], 9)


def model_of(**settings):
    torch.manual_seed(0)
    model = toys.plain(24, 40, 33, 3)
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[4].weight.mul_(0.01)
    return pst.replace_linear(model, pst.PSTConfig(**{"sparsity": 0.8, "allocation": "global"} | settings))


def test_a_schedule_prunes_by_one_threshold():
    model = model_of(warmup=0.0, cooldown=0.5)
    toys.perturb(model)
    schedule = pst.SparsitySchedule(model, 4)
    layers = [layer for layer in model if isinstance(layer, pst.PSTLinear)]
    total = sum(layer.num_pruned_at(0.8) for layer in layers)
    optimizer = torch.optim.AdamW(pst.parameter_groups(model, 1e-3))
    for _ in range(4):
        model(torch.randn(5, 24)).square().mean().backward()
        optimizer.step()
        schedule.step()
    counts = [int(layer.pst_num_pruned) for layer in layers]
    scores = [pst.functional.scores(layer.weight, *layer.factors).detach() for layer in layers]
    most = [
        s.numel() - -(-(s.numel() - layer.num_pruned_at(0.8)) // 4) for s, layer in zip(scores, layers, strict=True)
    ]
    assert counts == by_definition(scores, most, total)
    assert len({round(layer.sparsity, 2) for layer in layers}) > 1
    # the masks are those of one sort of all scores, but where a layer would keep too little
    free = [i for i, (n, k) in enumerate(zip(most, counts, strict=True)) if k < n]
    kept = torch.cat([scores[i][layers[i].mask] for i in free])
    pruned = torch.cat([scores[i][~layers[i].mask] for i in free])
    assert kept.min() >= pruned.max()


def test_a_copy_keeps_the_counts_of_its_own_schedule():
    model = model_of(warmup=0.0, cooldown=0.5)
    found = []
    for one in (model, copy.deepcopy(model)):
        schedule = pst.SparsitySchedule(one, 2)
        schedule.step()
        schedule.step()
        one(torch.randn(2, 24))
        layers = [layer for layer in one if isinstance(layer, pst.PSTLinear)]
        found.append([(int(layer.pst_num_pruned), int((~layer.mask).sum())) for layer in layers])
    assert found[0] == found[1]
    assert all(count == pruned for count, pruned in found[0])


KEPT = {"train_kept": True, "freeze": 0.3, "warmup": 0.0, "cooldown": 0.5}  # for the last 3 of 10 steps


def optimizer_of(model, kind=torch.optim.AdamW):
    return kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, schedule, optimizer, first=0, last=10):
    loss = None
    for step in range(first, last):  # with the last step's loss, and so its graph, still there
        loss = model(torch.randn(9, 24, generator=torch.Generator().manual_seed(step))).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss


def kept_of(model):
    return [layer.pst_kept for layer in model if isinstance(layer, pst.PSTLinear)]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_kept_weights_are_as_many_as_the_freeze_leaves(kind):
    model = model_of(**KEPT)
    optimizer, parameters = optimizer_of(model, kind), kept_of(model)
    uniform = [p.numel() for p in parameters]
    schedule = pst.SparsitySchedule(model, 10)
    train(model, schedule, optimizer, 0, 7)
    kept = [int(layer.mask.sum()) for layer in model if isinstance(layer, pst.PSTLinear)]
    assert all(layer.frozen for layer in model if isinstance(layer, pst.PSTLinear))
    train(model, schedule, optimizer, 7)
    assert all(one is other for one, other in zip(parameters, kept_of(model), strict=True))
    assert [p.numel() for p in parameters] == kept != uniform
    assert sum(kept) == sum(uniform)
    for layer in model:
        if isinstance(layer, pst.PSTLinear):
            assert layer.pst_kept.count_nonzero() > layer.pst_kept.numel() / 2  # all but those of dead units
            added = layer.masked_weight() - (layer.weight + layer.pst_U @ layer.pst_V) * layer.mask
            torch.testing.assert_close(added.abs().sum(), layer.pst_kept.abs().sum(), rtol=1e-4, atol=0)


def test_a_second_freeze_with_the_same_optimizer():
    model = model_of(**KEPT)
    optimizer = optimizer_of(model)
    train(model, pst.SparsitySchedule(model, 10), optimizer)
    uniform = [p.numel() for p in kept_of(model_of(**KEPT))]
    with torch.no_grad():
        model[0].weight.mul_(4)  # and so other counts
    schedule = pst.SparsitySchedule(model, 10, restart=True)
    assert [p.numel() for p in kept_of(model)] == uniform
    train(model, schedule, optimizer)
    for parameter, layer in zip(kept_of(model), (model[0], model[2]), strict=True):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape == (int(layer.mask.sum()),)


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("at", [4, 9])
def test_a_resumed_run_is_the_same_to_the_bit(at, made, tmp_path, caplog):
    """Stopped before the freeze, and in it; with a schedule made before the state is loaded, or after it, as Trainer's.

    That some layers are sparser than the schedule says of all is no reason to warn.
    """
    model = model_of(**KEPT)
    optimizer, schedule = optimizer_of(model), pst.SparsitySchedule(model, 10)
    train(model, schedule, optimizer, 0, at)
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], tmp_path / "state")
    train(model, schedule, optimizer, at, 12)
    again, states = model_of(**KEPT), torch.load(tmp_path / "state")
    its_optimizer, its_schedule = optimizer_of(again), pst.SparsitySchedule(again, 10)
    again.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    if made == "before":
        its_schedule.load_state_dict(states[2])
    else:
        its_schedule = pst.SparsitySchedule(again, 10, step_count=at)
        assert "sparsity stays" not in caplog.text
    train(again, its_schedule, its_optimizer, at, 12)
    assert not toys.differences(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("format", ["dense", "sparse"])
@pytest.mark.parametrize("steps", [4, 10])
def test_saved_and_merged(steps, format, tmp_path):
    model, x = model_of(**KEPT), torch.randn(5, 24)
    train(model, pst.SparsitySchedule(model, 10), optimizer_of(model), 0, steps)
    pst.save_pretrained(model, tmp_path)
    loaded = pst.load_pretrained(model_of(**KEPT), tmp_path)
    assert not toys.differences(model.state_dict(), loaded.state_dict())
    expected = model(x)
    assert torch.equal(loaded(x), expected)
    merged = pst.merge_and_unload(loaded, format=format)
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-6)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("pst_kernels.schedule.in_several_processes", lambda: True)
    pst.SparsitySchedule(model_of(), 10)
    with pytest.raises(RuntimeError, match="allocation='global' with train_kept=True runs in one process: pst_kept"):
        pst.SparsitySchedule(model_of(**KEPT), 10)


def test_what_it_is_not_for():
    with pytest.raises(ValueError, match="allocation='global' is for pattern='unstructured', got pattern='2:4'"):
        pst.PSTConfig(allocation="global", pattern="2:4")
    with pytest.raises(ValueError, match="allocation='layers' is not known; use one of uniform, global"):
        pst.PSTConfig(allocation="layers")
