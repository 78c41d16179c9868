"""One threshold over several matrices: the counts of a sort of all scores, and those that a schedule sets."""

from __future__ import annotations

import copy

import pytest
import torch
import toys

import pst_kernels as pst
from pst_kernels.masks.allocation import global_counts


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
    counts = global_counts(matrices.__getitem__, most, count)
    assert counts.tolist() == by_definition(matrices, most, count)
    assert int(counts.sum()) == count


def test_too_many():
    with pytest.raises(ValueError, match=r"count must be in \[0, 8\]"):
        global_counts(lambda _: torch.zeros(3, 3), [4, 4], 9)


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


def test_what_it_is_not_for():
    for settings in ({"train_kept": True}, {"pattern": "2:4"}):
        with pytest.raises(ValueError, match="allocation='global' is for pattern='unstructured' and train_kept=False"):
            pst.PSTConfig(allocation="global", **settings)
    with pytest.raises(ValueError, match="allocation='layers' is not known; use one of uniform, global"):
        pst.PSTConfig(allocation="layers")
