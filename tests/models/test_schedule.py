"""The cubic schedule, and when masks move under it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math

import pytest
import torch
import toys

import pst_kernels as pst
from pst_kernels.model import pst_layers
from pst_kernels.schedule import sparsity_at

SETTINGS = [
    {},
    {"warmup": 0.0, "cooldown": 0.0},
    {"warmup": 0.25, "cooldown": 0.5, "initial_sparsity": 0.3, "sparsity": 0.7},
    {"warmup": 0.0, "cooldown": 1.0},
    {"warmup": 1.0, "cooldown": 0.0},
    {"warmup": 0.5, "cooldown": 0.5, "sparsity": 0.99},
]


def formula(t: int, T: int, *, s_i: float, s_f: float, iw: float, fw: float) -> float:
    """method.md, word for word."""
    if t <= iw * T and t < T:
        return s_i
    if t > (1 - fw) * T or t >= T:
        return s_f
    return s_f + (s_i - s_f) * (1 - (t - iw * T) / (T * (1 - iw - fw))) ** 3


@pytest.mark.parametrize("total", [1, 2, 7, 10, 100, 997])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_formula_at_every_step(settings, total):
    config = pst.PSTConfig(**settings)
    names = {"s_i": config.initial_sparsity, "s_f": config.sparsity, "iw": config.warmup, "fw": config.cooldown}
    values = [sparsity_at(step, total, config) for step in range(total + 3)]
    for step, value in enumerate(values):
        near_a_corner = any(math.isclose(step, corner * total) for corner in (config.warmup, 1 - config.cooldown))
        if not near_a_corner or 0 < step < total:
            assert value == pytest.approx(formula(step, total, **names), abs=1e-12), step
    assert values == sorted(values)
    assert values[total:] == [config.sparsity] * 3
    assert config.initial_sparsity <= values[0] <= config.sparsity


def test_defaults_by_hand():
    config = pst.PSTConfig()
    values = {step: sparsity_at(step, 100, config) for step in (0, 10, 25, 40, 55, 70, 71, 100)}
    expected = {0: 0.0, 10: 0.0, 25: 0.9 * (1 - 0.75**3), 40: 0.9 * 0.875, 55: 0.9 * (1 - 0.25**3), 70: 0.9}
    assert values == pytest.approx(expected | {71: 0.9, 100: 0.9}, abs=1e-12)


def model_and_schedule(total: int = 10, **settings):
    model = toys.perturb(pst.replace_linear(toys.plain(), pst.PSTConfig(**settings)))
    return model, pst.SparsitySchedule(model, total)


def test_layers_follow_the_schedule_exactly():
    model, schedule = model_and_schedule(20, initial_sparsity=0.1)
    for step in range(1, 25):
        schedule.step()
        sparsity = sparsity_at(step, 20, schedule.config)
        assert schedule.sparsity == sparsity
        for _, layer in pst_layers(model):
            numel = layer.weight.numel()
            assert int(layer.pst_num_pruned) == int(numel * sparsity)
            assert int((~layer.mask).sum()) == int(numel * sparsity)
            assert layer.sparsity == int(numel * sparsity) / numel


def test_a_schedule_starts_at_the_initial_sparsity():
    model = pst.replace_linear(toys.plain(), pst.PSTConfig(sparsity=0.9))
    assert all(layer.sparsity == pytest.approx(0.9, abs=1e-2) for _, layer in pst_layers(model))
    pst.SparsitySchedule(model, 100)
    assert all(layer.sparsity == 0.0 for _, layer in pst_layers(model))


def test_state_dict_round_trip():
    model, schedule = model_and_schedule(20)
    for _ in range(9):
        schedule.step()
    other_model, other = model_and_schedule(20)
    other.load_state_dict(schedule.state_dict())
    assert other.step_count == 9
    assert other.sparsity == schedule.sparsity
    assert [la.sparsity for _, la in pst_layers(other_model)] == [la.sparsity for _, la in pst_layers(model)]
    resumed = pst.SparsitySchedule(toys.perturb(pst.replace_linear(toys.plain())), 20, step_count=9)
    assert resumed.sparsity == schedule.sparsity


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step_count": 3, "total_steps": 21}, r"total_steps=20, the saved one 21"),
        ({"step_count": 3}, r"state.*total_steps"),
        ({"step_count": -1, "total_steps": 20}, r"step_count must be at least 0, got -1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state, message):
    model, schedule = model_and_schedule(20)
    schedule.step()
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(state)
    assert schedule.step_count == 1
    assert not toys.differences(toys.snapshot(model), before)


def masks_over(model, steps: int, schedule=None, start: int = 0) -> list[tuple[int, torch.Tensor]]:
    """Train a plain loop; after each step, (pruned, mask) that the next forward of the first layer used."""
    generator = torch.Generator().manual_seed(start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for _ in range(steps):
        model(torch.randn(8, 24, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        with torch.no_grad():
            model(torch.randn(8, 24, generator=generator))
        seen.append((int(model[0].pst_num_pruned), model[0].pst_mask.clone()))
    return seen


def moves(seen) -> list[int]:
    """Steps, counted from 1, after which the mask was another than before."""
    return [i + 2 for i, (one, two) in enumerate(itertools.pairwise(seen)) if not torch.equal(one[1], two[1])]


def test_without_a_schedule_every_step_moves_the_mask():
    model = toys.perturb(pst.replace_linear(toys.plain(), pst.PSTConfig(sparsity=0.5)))
    assert moves(masks_over(model, 6)) == [2, 3, 4, 5, 6]


def test_mask_interval_without_a_schedule():
    model = toys.perturb(pst.replace_linear(toys.plain(), pst.PSTConfig(sparsity=0.5, mask_interval=3)))
    assert moves(masks_over(model, 9)) == [3, 6, 9]


def test_mask_interval_with_a_schedule_moves_mask_and_sparsity_at_its_multiples_and_the_end():
    settings = {"mask_interval": 4, "warmup": 0.0, "cooldown": 0.0, "initial_sparsity": 0.2, "sparsity": 0.8}
    model, schedule = model_and_schedule(10, **settings)
    numel = model[0].weight.numel()
    seen = masks_over(model, 10, schedule)
    assert moves(seen) == [4, 8, 10]
    by_step = [0] * 3 + [4] * 4 + [8] * 2 + [10]
    assert [pruned for pruned, _ in seen] == [int(numel * sparsity_at(s, 10, schedule.config)) for s in by_step]


@pytest.mark.parametrize("interval", [1, 5])
def test_a_changed_sparsity_is_due_at_once(interval):
    model = toys.perturb(pst.replace_linear(toys.plain(), pst.PSTConfig(sparsity=0.5, mask_interval=interval)))
    x = torch.randn(4, 24)
    for sparsity in (0.5, 0.75, 0.25, 0.0):
        model[0].sparsity = sparsity
        model(x)
        assert int((~pst.functional.unpack_mask(model[0].pst_mask, 24)).sum()) == 960 * sparsity


def test_evaluation_and_accumulation_do_not_count_as_steps():
    model = toys.perturb(pst.replace_linear(toys.plain(), pst.PSTConfig(sparsity=0.5, mask_interval=2)))
    x = torch.randn(4, 24)
    model(x)
    first = model[0].pst_mask.clone()
    with torch.no_grad():
        model[0].pst_R.add_(torch.randn(40))
    for _ in range(5):
        model(x)
        model[0].masked_weight()
        _ = model[0].mask
    assert torch.equal(model[0].pst_mask, first)
    with torch.no_grad():
        model[0].pst_R.add_(torch.randn(40))
    model(x)
    assert not torch.equal(model[0].pst_mask, first)


RESUME = {"mask_interval": 4, "warmup": 0.0, "cooldown": 0.2}


@pytest.mark.parametrize("order", ["model first", "schedule first", "step_count"])
@pytest.mark.parametrize("stop", [4, 6, 7])
def test_resume_within_an_interval(stop, order):
    model, schedule = model_and_schedule(12, **RESUME)
    masks_over(model, stop, schedule)
    model_state, schedule_state = toys.snapshot(model), schedule.state_dict()
    expected = masks_over(model, 12 - stop, schedule, start=1)

    torch.manual_seed(99)
    if order == "step_count":
        resumed = pst.replace_linear(toys.plain(), pst.PSTConfig(**RESUME))
        resumed.load_state_dict(model_state)
        again = pst.SparsitySchedule(resumed, 12, step_count=stop)
    else:
        resumed, again = model_and_schedule(12, **RESUME)
        if order == "model first":
            resumed.load_state_dict(model_state)
            again.load_state_dict(schedule_state)
        else:
            again.load_state_dict(schedule_state)
            resumed.load_state_dict(model_state)
    actual = masks_over(resumed, 12 - stop, again, start=1)
    assert [pruned for pruned, _ in actual] == [pruned for pruned, _ in expected]
    assert all(torch.equal(one[1], two[1]) for one, two in zip(actual, expected, strict=True))
    assert not toys.differences(toys.snapshot(resumed), toys.snapshot(model))


def trained(sparsity=0.8, steps=10):
    model = pst.replace_linear(toys.plain(24, 40, 8), pst.PSTConfig(sparsity=sparsity))
    schedule = pst.SparsitySchedule(model, steps)
    for _ in range(steps):
        schedule.step()
    return model


def sparsities(model, schedule, steps):
    (layer,) = [layer for _, layer in pst_layers(model)]
    found = [layer.sparsity]
    for _ in range(steps):
        schedule.step()
        found.append(layer.sparsity)
    return found


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(("step_count", "total"), [(0, 10), (10, 40)])
def test_a_trained_model_does_not_fall_back(loaded, step_count, total, caplog, tmp_path):
    """A second training, and one that is resumed with more steps, in this process and from a checkpoint."""
    model = trained()
    if loaded:
        pst.save_pretrained(model, tmp_path)
        model = pst.load_pretrained(toys.plain(24, 40, 8), tmp_path)
        caplog.clear()  # the base is another, which is said
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        schedule = pst.SparsitySchedule(model, total, step_count)
    (record,) = caplog.records
    assert "at sparsity 0.8 already" in record.message
    assert "restart=True" in record.message
    assert set(sparsities(model, schedule, total - step_count)) == {0.8}


def test_a_higher_goal_goes_on_from_where_the_model_is(caplog):
    model = trained(0.5)
    for _, layer in pst_layers(model):
        layer.config = dataclasses.replace(layer.config, sparsity=0.9)
    found = sparsities(model, pst.SparsitySchedule(model, 10), 10)
    assert found[0] == 0.5
    assert found[-1] == 0.9
    assert found == sorted(found)


def test_restart_is_the_word_for_falling_back(caplog):
    model = trained()
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        found = sparsities(model, pst.SparsitySchedule(model, 10, restart=True), 10)
    assert not caplog.records
    assert found[0] == 0.0
    assert found[-1] == 0.8


def test_a_converted_model_starts_at_the_schedules_start(caplog):
    model = pst.replace_linear(toys.plain(24, 40, 8), pst.PSTConfig(sparsity=0.8))
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        assert sparsities(model, pst.SparsitySchedule(model, 10), 0) == [0.0]
    assert not caplog.records
