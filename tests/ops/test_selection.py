"""Exact selection: every distribution, every rank, and the path that was meant to be taken."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import grouped, make_problem, masked_weight

from pst_kernels import cpu, functional
from pst_kernels.cpu import row_blocks, scratch, select
from pst_kernels.cpu.compiled import launch
from pst_kernels.masks import guess as guesses

N = 100_003  # above the size from which a sample is drawn, and prime


def distributions():
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(N, generator=generator)
    yield "normal", normal
    yield "constant", torch.full((N,), 0.25)
    yield "two values", (normal > 0).float()
    yield "bimodal", torch.where(normal > 0, normal + 1e6, normal - 1e6)
    yield "heavy tails", normal.sign() * torch.exp(normal.abs() * 20)
    yield "denormals", normal * 1e-41
    yield "signed zeros", torch.where(normal > 0, 0.0, -0.0)
    yield "few distinct", (normal * 8).round()
    yield "sorted", normal.sort().values
    yield "reversed", normal.sort(descending=True).values
    yield "bf16 magnitudes", normal.abs().to(torch.bfloat16).float()
    yield "infinities", torch.where(normal.abs() > 1.5, normal.sign() * math.inf, normal)
    yield "some NaN", torch.where(normal > 2, math.nan, normal)
    yield "mostly NaN", torch.where(normal > -2, math.nan, normal)
    yield "all NaN", torch.full((N,), math.nan)


@pytest.mark.parametrize(("name", "scores"), distributions(), ids=lambda v: v if isinstance(v, str) else "")
def test_kth_value_of_every_distribution(name, scores, cpu_passes):
    order = torch.argsort(scores, stable=True)
    for k in (1, 2, N // 10, N // 2, int(N * 0.9), int(N * 0.99), N - 1, N):
        value, index = functional.kth_value(scores, k)
        assert index == order[k - 1]
        assert value == scores[order[k - 1]] or (value.isnan() and scores[order[k - 1]].isnan())


@pytest.mark.parametrize("size", [1, 4095, 65536, 65537, 140_000])
def test_a_look_finds_what_numpy_finds(size):
    """Candidates in order, of every task: few, none, all of them, and more than there is room for in one task alone."""
    passes = pytest.importorskip("pst_kernels.cpu.compiled.flat_scores", reason="numba is not installed")
    scores = torch.randn(size)
    scores[::7], scores[::11], scores[size // 2 :] = math.nan, -0.0, scores[size // 2 :].clamp(min=0.5)
    array = scores.numpy()
    for lower, upper in ((-0.1, 0.1), (0.0, 0.0), (0.5, 0.5), (3.0, 3.0), (-math.inf, math.inf)):
        bracket = guesses.Bracket(lower, upper)
        found = passes.gather(scores, bracket, scratch.get)
        expected = select._gather(lambda: iter([(0, array)]), bracket, None)
        assert found.below == expected.below
        assert np.array_equal(found.index, expected.index)
        assert np.array_equal(found.scores.view(np.int32), expected.scores.view(np.int32))


def test_many_scores_take_the_compiled_look(monkeypatch):
    passes = pytest.importorskip("pst_kernels.cpu.compiled.flat_scores", reason="numba is not installed")
    looks, gather = [], passes.gather
    monkeypatch.setattr(passes, "gather", lambda *given: looks.append(given[1]) or gather(*given))
    scores = torch.randn(2, N).t()  # not contiguous
    value, index = functional.kth_value(scores, N)
    assert (scores.flatten()[index], len(looks)) == (value, 1)
    functional.kth_value(scores[:100], 3)
    assert len(looks) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40), st.integers(0, 10**6), st.integers(1, 5))
def test_kth_value_of_anything(values, seed, repeat):
    scores = torch.tensor(values * repeat, dtype=torch.float32)
    k = seed % scores.numel() + 1
    value, index = functional.kth_value(scores, k)
    order = torch.argsort(scores, stable=True)
    assert index == order[k - 1]
    assert torch.equal(value, scores[order[k - 1]]) or value.isnan()


@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 4, 5)])
def test_shape_and_dtype(shape):
    scores = torch.randn(shape)
    value, index = functional.kth_value(scores, 1)
    assert value.shape == index.shape == ()
    assert value.dtype == torch.float32
    assert index.dtype == torch.int64
    assert scores.flatten()[index] == value == scores.min()


def count_passes(monkeypatch):
    passes = []
    for source in (select.ChunkedScores, launch.CompiledScores):

        def counting(self, bracket, gather=source.gather):
            passes.append(bracket)
            return gather(self, bracket)

        monkeypatch.setattr(source, "gather", counting)
    monkeypatch.setattr(select, "_sort", lambda *_: pytest.fail("sorted everything"))
    return passes


def mask_of(weight, factors, num_pruned, guess):
    return cpu.prune_mask(*grouped((weight, *factors)), torch.tensor(num_pruned), guess)


@pytest.mark.usefixtures("cpu_passes")
def test_a_warm_guess_needs_one_pass_over_few_candidates(monkeypatch):
    weight, factors = make_problem(400, 500, weight_dtype=torch.float32, factor_dtype=torch.float32)
    guess = functional.new_guess()
    mask_of(weight, factors, 180_000, guess)
    passes = count_passes(monkeypatch)
    for step in range(1, 6):  # factors and sparsity move as they do in training
        moved = [f + 1e-3 * step for f in factors]
        num_pruned = 180_000 + 300 * step
        packed = mask_of(weight, moved, num_pruned, guess)
        order = torch.argsort(functional.scores(weight, *moved).flatten(), stable=True)
        kept = functional.unpack_mask(packed, 500).flatten()
        assert not kept[order[:num_pruned]].any()
        assert kept[order[num_pruned:]].all()
        assert len(passes) == step


@pytest.mark.usefixtures("cpu_passes")
def test_a_wrong_guess_is_found_out(monkeypatch):
    weight, factors = make_problem(300, 400, weight_dtype=torch.float32, factor_dtype=torch.float32)
    expected = functional.prune_mask(weight, *factors, 60_000)
    passes = count_passes(monkeypatch)
    for wrong in ([1e9, 1.0, 0.5, 0.01], [-1e9, 1.0, 0.5, 0.01], [0.0, 0.0, 0.5, 0.0], [math.inf, 1.0, 0.5, 0.1]):
        guess = torch.tensor(wrong)
        passes.clear()
        assert torch.equal(mask_of(weight, factors, 60_000, guess), expected)
        assert len(passes) == 2  # the guess, then the sample
        passes.clear()
        assert torch.equal(mask_of(weight, factors, 60_000, guess), expected)
        assert len(passes) == 1  # and now the guess is right


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("end", ["lower", "upper"])
def test_a_bracket_that_ends_at_the_answer(end, offset):
    """The k-th is the first score inside, the last one below, and so on: each end is inclusive."""
    scores = np.arange(1000, dtype=np.float32)
    edge = 500.0 + offset
    bracket = guesses.Bracket(edge, 600.0) if end == "lower" else guesses.Bracket(400.0, edge)
    kept = np.empty(1000, bool)
    source = select.ChunkedScores(lambda: iter([(0, scores)]), kept)
    chosen = select.select(source, 1000, 501, [bracket])
    assert (chosen.value, chosen.index) == (500.0, 500)
    assert np.array_equal(kept, scores > 500)


@pytest.mark.usefixtures("cpu_passes")
def test_nan_beside_a_good_guess(monkeypatch):
    weight, factors = make_problem(400, 500, weight_dtype=torch.float32, factor_dtype=torch.float32)
    guess = functional.new_guess()
    mask_of(weight, factors, 100_000, guess)
    count_passes(monkeypatch)
    factors[4][3] = math.nan
    kept = functional.unpack_mask(mask_of(weight, factors, 100_000, guess), 500)
    assert kept[3].all()
    assert int((~kept).sum()) == 100_000


def test_the_sample_brackets_the_answer():
    generator = np.random.default_rng(3)
    for fraction in (1e-4, 0.1, 0.5, 0.9, 0.9999):
        scores = generator.standard_normal(200_000).astype(np.float32)
        bracket = guesses.sample_bracket(generator.choice(scores, guesses.SAMPLE), fraction)
        answer = np.sort(scores)[int(fraction * scores.size)]
        assert bracket.lower <= answer <= bracket.upper
        inside = np.count_nonzero((scores >= bracket.lower) & (scores <= bracket.upper))
        assert inside < 0.05 * scores.size


@pytest.mark.usefixtures("cpu_passes")
def test_nan_in_the_factors_prunes_exactly_all_the_same():
    weight, factors = make_problem(50, 60, weight_dtype=torch.float32, factor_dtype=torch.float32)
    factors[4][7] = math.nan
    for num_pruned in (100, 2_900, 2_960, 3_000):
        mask = functional.unpack_mask(functional.prune_mask(weight, *factors, num_pruned), 60)
        assert int((~mask).sum()) == num_pruned
    assert functional.unpack_mask(functional.prune_mask(weight, *factors, 2_900), 60)[7].all()


@pytest.mark.usefixtures("cpu_passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("route", ["sample", "warm", "missed", "sorted", "nothing pruned"])
def test_the_mask_and_the_masked_weight_from_one_pass(dtype, route, monkeypatch):
    """Whichever bracket finds the threshold, they are those of the two ops, over several blocks."""
    for name, value in {"BLOCK": 1 << 13, "BLOCK_ROWS": 8, "BLOCK_AT_MOST": 1 << 14}.items():
        monkeypatch.setattr(row_blocks, name, value)
    generator = torch.Generator().manual_seed(3)
    shapes = [(300, 310), (300, 5), (5, 310), (300, 5), (5, 310), (300,), (310,)]
    factors = [torch.randn(shape, generator=generator) for shape in shapes]
    factors[0] = factors[0].to(dtype)
    factors[0][::3] = 0.25  # many ties
    numel = factors[0].numel()
    count = torch.tensor(0 if route == "nothing pruned" else int(numel * 0.6))
    guess = functional.new_guess()
    if route in ("warm", "missed"):
        cpu.prune_mask(*grouped(factors), count, guess)
    if route == "missed":
        guess[0] += 1e3
    if route == "sorted":
        monkeypatch.setattr(cpu.ops, "SAMPLE", numel)
    masked = torch.full(factors[0].shape, 7.0, dtype=dtype)
    mask = cpu.prune_mask(*grouped(factors), count, guess.clone(), masked)
    assert torch.equal(mask, cpu.prune_mask(*grouped(factors), count, guess.clone()))
    kept = functional.unpack_mask(mask, 310)
    assert int(kept.sum()) == numel - int(count)
    assert torch.equal(masked, cpu.masked_weight(masked_weight(factors, mask), dtype))
