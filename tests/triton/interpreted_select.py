"""Scores, threshold, mask and masked weight in Triton's interpreter, against reference.py in float64."""

from __future__ import annotations

import pytest
import torch
from dyadic import SHAPES, exact_scores, grid, guess_at, no_guess, problem
from oracle import grouped, masked_weight

from pst_kernels import reference
from pst_kernels import triton as kernels
from pst_kernels.masks import packing
from pst_kernels.triton import select, sweep

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALES = (1.0, 1.0, 1.0)


def counts(numel: int) -> list[int]:
    return sorted({0, 1, numel // 3, int(numel * 0.99), numel})


def check_mask(tensors: list, num_pruned: int, guess: torch.Tensor | None = None) -> torch.Tensor:
    want = reference.prune_mask(exact_scores(tensors), num_pruned)
    guess = no_guess() if guess is None else guess
    mask = kernels.prune_mask(*grouped(tensors, SCALES), torch.tensor(num_pruned), guess)
    assert torch.equal(mask, packing.pack_mask(want))  # padding bits too
    return mask


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """For candidates: no more than for a sample, so that a small weight isn't collected whole."""
    monkeypatch.setattr(select, "capacity_of", lambda numel: select.SAMPLES.value)


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 24])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(shape: tuple, rank: int, dtype: torch.dtype) -> None:
    tensors = problem(*shape, rank, dtype)
    assert torch.equal(kernels.scores(*grouped(tensors, SCALES)).double(), exact_scores(tensors))


@pytest.mark.parametrize("rank", [5, 40])
def test_scores_to_rounding(rank: int) -> None:
    rows, columns = 67, 130
    r = torch.randn
    tensors = [r(rows, columns), r(rows, rank), r(rank, columns), r(rows, rank), r(rank, columns), r(rows), r(columns)]
    want = reference.scores(*(t.double() for t in tensors), beta=0.3, alpha1=-0.7, alpha2=1.9)
    got = kernels.scores(*grouped(tensors, (0.3, -0.7, 1.9)))
    size = tensors[0].abs() + 0.3 * tensors[1].abs() @ tensors[2].abs() + 0.7 * tensors[3].abs() @ tensors[4].abs() + 8
    assert ((got - want).abs() <= 2**-22 * size).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 16, 24])
def test_mask_and_masked_weight(shape: tuple, rank: int) -> None:
    for dtype in DTYPES if shape == (7, 33) else DTYPES[-1:]:
        tensors = problem(*shape, rank, dtype)
        weight, U, V = tensors[:3]
        for num_pruned in counts(weight.numel()) if rank == 8 else [weight.numel() // 3]:
            mask = check_mask(tensors, num_pruned)
            kept = packing.unpack_mask(mask, shape[1])
            want = reference.updated_weight(weight.double(), U.double(), V.double()) * kept
            assert torch.equal(
                kernels.masked_weight(masked_weight((weight, *tensors[1:]), mask), torch.float32).double(), want
            )


@pytest.mark.parametrize("kind", ["transposed", "strided", "column step"])
@pytest.mark.parametrize("shape", [(7, 33), (33, 65), (1, 40), (40, 1)])
def test_weights_of_other_strides(kind: str, shape: tuple) -> None:
    tensors = problem(*shape, 5)
    weight = tensors[0]
    if kind == "transposed":
        weight = weight.T.contiguous().T
    elif kind == "strided":
        weight = torch.full((shape[0], shape[1] + 3), torch.nan, dtype=weight.dtype)[:, : shape[1]].copy_(weight)
    else:
        weight = torch.full((shape[0], shape[1], 2), torch.nan, dtype=weight.dtype)[..., 0].copy_(weight)
    mask = check_mask([weight, *tensors[1:]], weight.numel() // 2)
    assert torch.equal(kernels.scores(*grouped((weight, *tensors[1:]), SCALES)).double(), exact_scores(tensors))
    masked = kernels.masked_weight(masked_weight((weight, *tensors[1:]), mask), torch.float32)
    want = reference.updated_weight(*(t.double() for t in tensors[:3])) * packing.unpack_mask(mask, shape[1])
    assert masked.is_contiguous()
    assert torch.equal(masked.double(), want)


def test_mask_and_masked_weight_in_one_pass() -> None:
    from pst_kernels.triton import mask as mask_module

    for transposed in (False, True):
        tensors = problem(96, 384, 8)
        if transposed:
            tensors[0] = tensors[0].T.contiguous().T
        state = select.threshold(*grouped(tensors, SCALES), torch.tensor(9000), no_guess())
        masked = torch.full((96, 384), torch.nan)
        mask = mask_module.mask_from(state, *grouped(tensors, SCALES), masked=masked)
        assert torch.equal(mask, packing.pack_mask(reference.prune_mask(exact_scores(tensors), 9000)))
        assert torch.equal(masked, kernels.masked_weight(masked_weight(tensors, mask), torch.float32))


@pytest.mark.parametrize("programs", [1, 264])
@pytest.mark.parametrize("values", [1, 2, 5])
def test_ties_of_thousands(values: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More equal scores than there is room for candidates: the radix search ends among indices."""
    monkeypatch.setattr(sweep, "programs_wanted", lambda device: programs)
    tensors = problem(37, 500, 1)  # few rows: a program's tile has two of up to 512 columns
    for factor in tensors[1:]:
        factor.zero_()
    tensors[0] = torch.randint(1, values + 1, (37, 500)).float()
    # room for a sample, at least
    monkeypatch.setattr(select, "capacity_of", lambda numel: int(numel * (0.45 if values < 5 else 0.47)))
    numel = tensors[0].numel()
    for num_pruned in (1, int(0.49 * numel), numel - 1, numel):
        check_mask(tensors, num_pruned)


def test_routes() -> None:
    tensors = problem(96, 384, 8)
    scores, k = exact_scores(tensors), 18432
    want = torch.argsort(scores.flatten(), stable=True)[k - 1].item()
    moved = guess_at(scores, k, 0.01)
    moved[0] += 0.5  # the bracket misses
    wide = guess_at(scores, k, 0.025)
    wide[1] *= 100.0  # far more candidates than there is room for
    unknown = no_guess()
    starts = {"guess": guess_at(scores, k, 0.01), "sample": unknown, "missed": moved, "overflowed": wide}
    for name, guess in starts.items():
        state = select.threshold(*grouped(tensors, SCALES), torch.tensor(k), guess)
        route = select.route(state)
        assert route == {"missed": "radix", "overflowed": "radix"}.get(name, name)
        assert int(state[select.INDEX.value]) == want
        assert guess[0] == scores.flatten()[want]
        assert 0.0 < guess[1] < 100.0
        assert guess[2] == 0.5
        assert select.NARROW.value <= guess[3] <= select.WIDE.value + 1e-6


def test_a_guess_follows_the_threshold() -> None:
    """A new guess must be a hit when nothing has changed, and when the sparsity has moved a little."""
    tensors, guess = problem(96, 384, 8), no_guess()
    for k in (18432, 18432, 18500, 18600):
        state = select.threshold(*grouped(tensors, SCALES), torch.tensor(k), guess)
        want = torch.argsort(exact_scores(tensors).flatten(), stable=True)[k - 1].item()
        assert int(state[select.INDEX.value]) == want
        assert select.route(state) == ("sample" if k == 18432 and guess[3] >= select.WIDE.value - 1e-6 else "guess")


def test_small_weights_are_collected_whole() -> None:
    tensors = problem(33, 65, 8)
    state = select.threshold(*grouped(tensors, SCALES), torch.tensor(700), no_guess())
    assert select.route(state) == "everything"


@pytest.mark.parametrize("size", [1, 513, 40000])
def test_kth_value(size: int) -> None:
    scores = torch.randn(size)
    scores[torch.rand(size) < 0.2] = 0.25
    scores[torch.rand(size) < 0.1] = -0.0
    scores[torch.rand(size) < 0.1] = 0.0
    scores[torch.rand(size) < 0.05] = 1e-41
    scores[torch.rand(size) < 0.05] = -1e-41
    scores[torch.rand(size) < 0.05] = torch.nan
    scores[torch.rand(size) < 0.05] = torch.inf
    scores[torch.rand(size) < 0.05] = -torch.inf
    order = torch.argsort(scores, stable=True)
    for k in sorted({1, size // 8 + 1, size // 2 + 1, int(size * 0.92) + 1, size}):
        k = min(k, size)
        value, index = kernels.kth_value(scores, k)
        assert index.item() == order[k - 1].item()
        torch.testing.assert_close(value, scores[order[k - 1]], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_nan_ends_and_sorts_last(share: float, little_room: None) -> None:
    tensors = problem(19, 500, 1)
    for factor in tensors[1:]:
        factor.zero_()
    tensors[0] = grid(19, 500).masked_fill(torch.rand(19, 500) < share, torch.nan)
    for num_pruned in (1, 5000, 9499):
        for guess in (no_guess(), torch.tensor([torch.nan, 1.0, 0.5, 0.01]), torch.tensor([0.1, torch.inf, 0.5, 0.01])):
            check_mask(tensors, num_pruned, guess)


def test_signed_zeros_and_denormals_tie_by_value(little_room: None) -> None:
    tensors = problem(19, 500, 1)
    for factor in tensors[1:]:
        factor.zero_()
    values = torch.tensor([0.0, -0.0, 1e-41, 2e-41, 3e-41, 1.0])
    tensors[0] = values[torch.randint(0, 6, (19, 500))]
    for num_pruned in (1250, 3750, 5000, 7500):
        check_mask(tensors, num_pruned)


def test_the_same_bits_whatever_the_tile() -> None:
    """Scores that do round: the sweep's tiles and the scores kernel's must find the same threshold and mask."""
    rows, columns, rank, r = 96, 384, 8, torch.randn
    tensors = [r(rows, columns), r(rows, rank), r(rank, columns), r(rows, rank), r(rank, columns), r(rows), r(columns)]
    scores = kernels.scores(*grouped(tensors, (0.3, -0.7, 1.9)))
    mask = kernels.prune_mask(*grouped(tensors, (0.3, -0.7, 1.9)), torch.tensor(20000), no_guess())
    assert torch.equal(mask, packing.pack_mask(reference.prune_mask(scores, 20000)))
    transposed = [tensors[0].T.contiguous().T, *tensors[1:]]
    assert torch.equal(
        mask, kernels.prune_mask(*grouped(transposed, (0.3, -0.7, 1.9)), torch.tensor(20000), no_guess())
    )
    assert torch.equal(scores, kernels.scores(*grouped(transposed, (0.3, -0.7, 1.9))))


def test_float64_is_refused() -> None:
    tensors = [t.double() for t in problem(7, 33, 1)]
    with pytest.raises(TypeError, match="PST_KERNELS_BACKEND=torch"):
        kernels.scores(*grouped(tensors, SCALES))
    with pytest.raises(TypeError, match="PST_KERNELS_BACKEND=torch"):
        kernels.prune_mask(*grouped(tensors, SCALES), torch.tensor(3), no_guess())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_weights(shape: tuple) -> None:
    tensors = problem(*shape, 2)
    assert kernels.scores(*grouped(tensors, SCALES)).shape == shape
    assert kernels.prune_mask(*grouped(tensors, SCALES), torch.tensor(0), no_guess()).shape == (
        shape[0],
        -(-shape[1] // 32),
    )
