"""Which weights each pattern prunes: against an argsort of block scores, per group, with ties and ragged edges."""

import pytest
import torch
from oracle import PATTERNS, SCALES, make_problem, mask_by_definition
from torch.utils._python_dispatch import TorchDispatchMode

import pst_kernels as pst
from pst_kernels import functional, ops
from pst_kernels.masks import patterns

SHAPES = [(1, 1), (16, 32), (48, 80), (129, 65), (70, 300)]


def mask_of(problem, name, num_pruned):
    tensors, scales = (problem.weight, *problem.factors), SCALES.values()
    mask = ops.prune_mask(*tensors, *scales, torch.tensor(num_pruned), functional.new_guess(), name)
    return functional.unpack_mask(mask, problem.weight.shape[1])


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dyadic", [False, True], ids=["random", "dyadic"])
def test_masks_equal_the_definition(name, shape, dyadic):
    problem = make_problem(*shape, weight_dtype=torch.float32, factor_dtype=torch.float32, dyadic=dyadic)
    pattern, scores = patterns.parse(name), functional.scores(problem.weight, *problem.factors, **SCALES)
    for sparsity in (0.0, 0.3, 0.5, 0.9):
        num_pruned = pattern.num_pruned_at(shape, sparsity)
        mask = mask_of(problem, name, num_pruned)
        assert torch.equal(mask, mask_by_definition(scores, pattern, num_pruned))
        assert pattern.fits(mask, num_pruned)
        assert pattern.weights_pruned(shape, num_pruned) in (None, int((~mask).sum()))


class NothingIsLookedAt(TorchDispatchMode):
    """What reads a tensor's value or a size that depends on it waits for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "index.Tensor")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in self.WAITS), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["unstructured", *PATTERNS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_count_on_the_device_is_not_looked_at(name, shape):
    pattern, scores = patterns.parse(name), torch.randn(shape, generator=torch.Generator().manual_seed(0)).round()
    for sparsity in (0.0, 0.3, 0.5, 0.9):
        num_pruned = pattern.num_pruned_at(shape, sparsity)
        count = torch.tensor(num_pruned)
        with NothingIsLookedAt():
            kept = pattern.keep(scores, count)
        assert torch.equal(kept, pattern.keep(scores, num_pruned))


def test_looking_is_noticed():
    with NothingIsLookedAt(), pytest.raises(AssertionError, match="waits for the device"):
        int(torch.tensor(3))


def test_ties_go_by_index():
    scores = torch.ones(32, 48)
    blocks = patterns.parse("block:16").keep(scores, 2)
    assert not blocks[:16, :32].any()
    assert blocks[:16, 32:].all()
    assert blocks[16:].all()
    groups = patterns.parse("2:4").keep(scores, 32 * 24)
    assert torch.equal(groups, torch.tensor([False, False, True, True]).repeat(32, 12))


@pytest.mark.parametrize("name", ["2:4", "5:20"])  # ranked by comparing, by sorting
@pytest.mark.parametrize("nan", [False, True])
def test_order_of_odd_scores(name, nan):
    """As a stable argsort has it: -0.0 ties with 0.0, and NaN comes last, after infinity."""
    pattern = patterns.parse(name)
    odd = [float("nan")] if nan else []
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-40, -2.5, *odd])
    generator = torch.Generator().manual_seed(0)
    scores = values[torch.randint(len(values), (50, 40), generator=generator)]
    num_pruned = pattern.num_pruned_at((50, 40), pattern.sparsity)
    assert torch.equal(pattern.keep(scores, num_pruned), mask_by_definition(scores, pattern, num_pruned))


def test_a_block_counts_the_weights_that_it_has():
    scores = torch.zeros(20, 33)
    scores[16:, :] = 3.0
    scores[:, 32] = 5.0
    means = patterns.parse("block:16").scores(scores)
    assert means.tolist() == [[0.0, 0.0, 5.0], [3.0, 3.0, 5.0]]


@pytest.mark.parametrize(
    ("name", "shape", "sparsity", "count"),
    [
        ("block:64", (3072, 768), 0.9, 518), ("block:32", (100, 70), 0.5, 6), ("block:128", (100, 70), 0.9, 0),
        ("2:4", (10, 40), 0.5, 200), ("2:4", (10, 40), 0.49, 100), ("2:4", (10, 43), 0.5, 210), ("2:4", (1, 2), 0.5, 0),
        ("3:10", (1, 10), 1 - 3 / 10, 7), ("4:5", (1, 5), 1 - 4 / 5, 1),
    ],
)  # fmt: skip
def test_how_many_are_pruned(name, shape, sparsity, count):
    assert patterns.parse(name).num_pruned_at(shape, sparsity) == count


def test_a_foreign_count_is_refused():
    with pytest.raises(ValueError, match=r"num_pruned=3 is not the same number .* of 4 of a weight \(2, 8\)"):
        patterns.parse("2:4").keep(torch.randn(2, 8), 3)


def test_fits_tells_structures_apart():
    for name, shape in (("block:16", (40, 40)), ("2:4", (40, 43))):
        pattern = patterns.parse(name)
        count = pattern.num_pruned_at(shape, 0.5)
        mask = pattern.keep(torch.randn(shape), count)
        assert pattern.fits(mask, count)
        assert not pattern.fits(mask, count + 1)
        for place in ((0, 1), (39, shape[1] - 1)):
            other = mask.clone()
            other[place] ^= True
            assert not pattern.fits(other, count)


@pytest.mark.parametrize("name", ["block:8", "block:", "block:64x", "4:4", "5:4", "0:4", "2:4:8", "n:m", "", None, 4])
def test_unknown_patterns_are_refused(name):
    with pytest.raises(ValueError, match=r"^pattern=.* is not known; use one of 'unstructured', 'block:16'.* '2:4'"):
        pst.PSTConfig(pattern=name)


def test_defaults_follow_the_pattern():
    assert (pst.PSTConfig().sparsity, pst.PSTConfig().mask_interval) == (0.9, 1)
    blocks, groups = pst.PSTConfig(pattern="block:64"), pst.PSTConfig(pattern="2:4")
    assert (blocks.sparsity, blocks.mask_interval) == (0.9, 16)
    assert (groups.sparsity, groups.mask_interval) == (0.5, 1)
    assert pst.PSTConfig(pattern="block:64", mask_interval=1).mask_interval == 1
    assert pst.PSTConfig(pattern="3:10", sparsity=0.7).sparsity == 0.7
    for config in (blocks, groups):
        assert pst.PSTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"sparsity=0\.9 does not fit pattern='2:4', which prunes 0\.5; leave"):
        pst.PSTConfig(pattern="2:4", sparsity=0.9)


def test_a_schedule_reaches_n_of_m_in_stages():
    model = pst.replace_linear(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 2)), pst.PSTConfig(
        pattern="1:4", warmup=0.1, cooldown=0.2,
    ))  # fmt: skip
    schedule, stages = pst.SparsitySchedule(model, 40), []
    for _ in range(40):
        per_group = (~model[0].mask).reshape(-1, 4).sum(1)
        assert (per_group == per_group[0]).all()
        stages.append(int(per_group[0]))
        schedule.step()
    assert stages == sorted(stages)
    assert set(stages) == {0, 1, 2, 3}
    assert stages[0] == 0
    assert model[0].sparsity == 0.75
