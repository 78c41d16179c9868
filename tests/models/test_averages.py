"""Averages of a model's weights and buffers: the masks fit what is there, and the sparsity is the model's own."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pst_kernels as pst
from pst_kernels import reference
from pst_kernels.layers import averages
from pst_kernels.model import pst_layers

AVERAGES = {
    "buffers as they are": {"use_buffers": False},
    "mean": {"use_buffers": True},
    "ema": {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema one by one": {"use_buffers": True, "avg_fn": lambda mean, new, _: 0.9 * mean + 0.1 * new},
}


def under_pst(**settings) -> torch.nn.Module:
    """A model without blocks, whose factors are on a dyadic grid."""
    model = pst.replace_linear(toys.plain(24, 33, 20, 3), pst.PSTConfig(sparsity=0.8, **settings))
    for i, (_, layer) in enumerate(pst_layers(model)):
        layer.weight.data.copy_(toys.dyadic(*layer.weight.shape, seed=i))
    return move(model, 0)


def move(model: torch.nn.Module, seed: int, through_data: bool = False) -> torch.nn.Module:
    for i, (_, layer) in enumerate(pst_layers(model)):
        for j, factor in enumerate(layer.factors):
            new = toys.dyadic(*factor.shape, seed=100 * seed + 10 * i + j)
            (factor.data if through_data else factor.detach()).copy_(new)
    return model


def expected_mask(layer: torch.nn.Module) -> torch.Tensor:
    scores = reference.scores(*(t.detach().double() for t in (layer.weight, *layer.factors)))
    return reference.prune_mask(scores, layer.num_pruned_at(0.8))


def fits(model: torch.nn.Module) -> bool:
    """Of the buffers as they are, without a look that would mend them."""
    masks = ((pst.functional.unpack_mask(m.pst_mask, m.in_features), m) for _, m in pst_layers(model))
    return all(torch.equal(mask, expected_mask(layer)) for mask, layer in masks)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("settings", AVERAGES.values(), ids=AVERAGES)
def test_an_averaged_model_is_as_sparse_as_its_model(settings, interval):
    model = under_pst(mask_interval=interval)
    schedule = pst.SparsitySchedule(model, 6)
    x, averaged = torch.randn(5, 24), AveragedModel(model, **settings)
    for step in range(1, 7):
        model(x)
        move(model, step)
        schedule.step()
        averaged.update_parameters(model)
    y = averaged.module.eval()(x)
    for (name, layer), (_, own) in zip(pst_layers(averaged.module), pst_layers(model), strict=True):
        assert int(layer.pst_num_pruned) == int(own.pst_num_pruned) == layer.num_pruned_at(0.8), name
        assert int((~pst.functional.unpack_mask(layer.pst_mask, layer.in_features)).sum()) == layer.num_pruned_at(0.8)
    pst.refresh_masks(averaged.module)
    if interval == 1:  # else the mask may be one of earlier factors
        assert torch.equal(averaged.module(x), y)


def test_buffers_of_a_model_with_a_fixed_mask_are_averaged_too():
    model = under_pst(freeze=0.2)
    schedule = pst.SparsitySchedule(model, 2)
    x, averaged = torch.randn(5, 24), AveragedModel(model, use_buffers=True)
    for _ in range(4):
        schedule.step()
        averaged.update_parameters(model)
    assert all(layer.frozen for _, layer in pst_layers(model))
    torch.testing.assert_close(averaged.module(x), model(x))
    move(model, 1)  # and the masks stay
    later = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        later.update_parameters(model)
    torch.testing.assert_close(later.module(x), model(x))
    assert not fits(later.module)


def test_a_copy_that_is_given_a_sparsity_of_its_own_keeps_it():
    model = under_pst()
    other = copy.deepcopy(model)
    for _, layer in pst_layers(other):
        layer.sparsity = 0.5
    for _, layer in pst_layers(model):
        layer.sparsity = 0.25
    third = copy.deepcopy(model)
    third.load_state_dict(other.state_dict())
    x = torch.randn(2, 24)
    for one, sparsity in ((model, 0.25), (other, 0.5), (third, 0.5)):
        one(x)
        assert [layer.sparsity for _, layer in pst_layers(one)] == pytest.approx([sparsity] * 2, abs=1e-2)


@pytest.mark.parametrize("whole", [False, True], ids=["as floats", "cast back"])
def test_an_averaged_state_dict_loads_with_masks_made_anew(whole, caplog):
    averages._said.clear()
    model = under_pst()
    mean = model.state_dict()
    for step in (1, 2):
        state = move(model, step).state_dict()
        mean = {name: 0.7 * mean[name] + 0.3 * state[name] for name in state}
    if whole:
        mean = {name: tensor.to(state[name].dtype) for name, tensor in mean.items()}
    target = under_pst()
    target(torch.randn(2, 24))
    target.load_state_dict(mean)
    target(torch.randn(2, 24))
    assert fits(target)
    assert target[0].pst_num_pruned.dtype == torch.int64
    (record,) = caplog.records
    assert "the mask of 0 does not fit its count" in record.message


def test_saving_and_merging_make_masks_anew_after_a_write_that_leaves_no_trace(tmp_path):
    model, x = under_pst(), torch.randn(3, 24)
    model(x)
    for seed, save in enumerate((lambda: model.state_dict(), lambda: pst.save_pretrained(model, tmp_path)), 1):
        move(model, seed, through_data=True)
        assert not fits(model)
        save()
        assert fits(model)
    move(model, 3, through_data=True)
    right = copy.deepcopy(model)
    pst.refresh_masks(right)
    assert torch.equal(pst.merge_and_unload(model)(x), right(x))


def test_a_mask_of_earlier_factors_and_a_loaded_one_stay_through_a_save():
    model = under_pst(mask_interval=4)
    model(torch.randn(2, 24))
    move(model, 1)
    model(torch.randn(2, 24))
    before = toys.snapshot(model)
    assert not fits(model)
    assert not toys.differences(before, toys.snapshot(model))
    loaded = under_pst()
    loaded.load_state_dict(before)
    assert not toys.differences(before, toys.snapshot(loaded))
    move(loaded, 1, through_data=True)  # what is there already
    assert not toys.differences(before, toys.snapshot(loaded))
    move(loaded, 2, through_data=True)
    loaded.state_dict()
    assert fits(loaded)


def test_a_mask_that_was_written_over_is_made_anew_before_its_next_use():
    model, x = under_pst(mask_interval=5), torch.randn(3, 24)
    right = model(x)
    for _, layer in pst_layers(model):
        layer.pst_mask.bitwise_not_()
    assert torch.equal(model(x), right)
    for _, layer in pst_layers(model):
        layer.pst_mask.copy_(layer.pst_mask.clone())
        layer.pst_guess.random_()
    move(model, 0)
    assert torch.equal(model(x), right)
