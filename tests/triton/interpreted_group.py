"""The masks of a table in Triton's interpreter, against reference.py in float64 and against a layer at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dyadic import exact_scores, guess_at, no_guess, problem
from group_problem import alone, assert_same, layer_of, poisoned, rounding, strided, transposed

from pst_kernels import reference
from pst_kernels.masks import packing
from pst_kernels.operands import Factors
from pst_kernels.triton import group_row, select, sweep
from pst_kernels.triton.group_layer import LayerTensors
from pst_kernels.triton.group_mask import prune_masks
from pst_kernels.triton.group_table import MaskTable


def checked(layers: list[LayerTensors], calls: int = 1) -> MaskTable:
    """A table whose masks were made, and that all of it is as a layer at a time would have it."""
    table, others = MaskTable(layers), [poisoned(layer) for layer in layers]
    for _ in range(calls):
        prune_masks(table)
        others = [alone(layer) for layer in others]
        for layer, other in zip(layers, others, strict=True):
            assert_same(layer, other)
    return table


def check_exact(layer: LayerTensors) -> None:
    weight, factors = layer.weight, layer.factors
    want = reference.prune_mask(exact_scores([weight, *factors]), int(layer.num_pruned))
    assert torch.equal(layer.mask, packing.pack_mask(want))
    if layer.masked is not None:
        updated = reference.updated_weight(weight.double(), factors.U.double(), factors.V.double())
        assert torch.equal(layer.masked.double(), updated * want)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """For candidates: no more than for a sample, so that a small weight isn't collected whole."""
    monkeypatch.setattr(select, "capacity_of", lambda numel: select.SAMPLES.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_kinds_of_layers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MOST_ROWS", 32)  # several strips of a few rows
    layers = []
    for n, (i, j) in enumerate([(1, 1), (7, 33), (41, 65), (1, 40), (40, 1), (32, 32), (16, 544)]):
        for change in (list, transposed, strided):
            shape, numel = (j, i) if change is transposed else (i, j), i * j
            tensors = change(problem(*shape, 3, dtype))
            layers.append(layer_of(tensors, numel * n // 6, masked=torch.float32 if n % 2 else None))
    table = checked(layers)
    assert any(len({tuple(layer.weight.shape) for layer in group.members}) > 2 for group in table.groups)
    for layer in layers:
        check_exact(layer)


@pytest.mark.parametrize("rank", [1, 24])
def test_other_ranks_and_scales(rank: int) -> None:
    shapes = [(19, 70), (9, 130)]
    layers = [layer_of(rounding(*shape, rank), 600, scales=(0.3, -0.7, 1.9 + n)) for n, shape in enumerate(shapes)]
    checked(layers)
    assert not torch.equal(layers[0].guess, layers[1].guess)


def test_ranks_of_both_kinds_may_differ() -> None:
    weight, U, V, _, _, R, C = rounding(40, 64, 5)
    checked([layer_of([weight, U, V, torch.randn(40, 3), torch.randn(3, 64), R, C], 1000)])


def moved(guess: torch.Tensor) -> torch.Tensor:
    guess[0] += 0.5
    return guess


def wide(guess: torch.Tensor) -> torch.Tensor:
    guess[1] *= 100.0
    return guess


def test_routes_within_one_group(little_room: None) -> None:
    changes: dict[str, Callable] = {
        "hit": lambda guess: guess, "sample": lambda guess: no_guess(), "missed": moved, "overflowed": wide,
    }  # fmt: skip
    layers, k = [], 6144
    for change in changes.values():
        tensors = problem(32, 384, 2)
        layers.append(layer_of(tensors, k, change(guess_at(exact_scores(tensors), k, 0.01))))
    table = MaskTable(layers)
    others = [alone(layer) for layer in layers]
    prune_masks(table)
    (group,) = table.groups
    assert [select.route(state) for state in group.state] == ["guess", "sample", "radix", "radix"]
    assert not group.bins.any()
    for layer, other in zip(layers, others, strict=True):
        assert_same(layer, other)
        check_exact(layer)


@pytest.mark.parametrize("programs", [1, 5])
def test_ties_of_thousands(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More equal scores than there is room for candidates: the search ends among indices."""
    monkeypatch.setattr(sweep, "programs_wanted", lambda device: programs)
    monkeypatch.setattr(select, "capacity_of", lambda numel: 300)
    layers = []
    for values, num_pruned in ((1, 1), (1, 1100), (2, 2209), (3, 2210), (40, 1100)):
        tensors = problem(17, 130, 1)
        for factor in tensors[1:]:
            factor.zero_()
        tensors[0] = torch.randint(1, values + 1, (17, 130)).float() / 64
        layers.append(layer_of(tensors, num_pruned, torch.tensor([1e9, 0.1, 0.5, 0.01])))
    table = checked(layers, calls=2 if programs > 1 else 1)  # what a call leaves must not be in the way of the next
    assert not table.groups[0].bins.any()
    for layer in layers:
        check_exact(layer)


def test_the_range_of_a_search_is_that_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that agree in many of their first bits, for 11 bits a pass must end where 8 do: the next guess tells."""
    monkeypatch.setattr(select, "capacity_of", lambda numel: 150)
    layers = []
    for bits in (6, 10, 13, 16, 20, 23):
        tensors = problem(16, 64, 1)
        for factor in tensors[1:]:
            factor.zero_()
        tensors[0] = (1.0 + torch.randint(0, 1 << bits, (16, 64)).double() * 2.0**-23).float()
        layers.append(layer_of(tensors, 500, torch.tensor([1e9, 0.1, 0.5, 0.01])))
    tensors = rounding(16, 64, 1)
    layers += [layer_of(tensors, k, torch.tensor([1e9, 0.1, 0.5, 0.01])) for k in (5, 500, 1000)]
    table = checked(layers)
    assert {select.route(state) for group in table.groups for state in group.state} == {"radix"}
    widths = {int(state[select.UPPER.value] - state[select.LOWER.value]) + 1 for state in table.groups[0].state}
    assert {1 << 8, 1 << 16, 1 << 24} <= widths


def test_nan_sorts_last(little_room: None) -> None:
    layers = []
    for share, num_pruned, guess in (
        (0.1, 4500, no_guess()), (0.9, 9247, torch.tensor([torch.nan, 1.0, 0.5, 0.01])),
        (1.0, 1, torch.tensor([0.1, torch.inf, 0.5, 0.01])),
    ):  # fmt: skip
        tensors = problem(32, 289, 1)
        tensors[0] = tensors[0].float().masked_fill(torch.rand(32, 289) < share, torch.nan)
        layers.append(layer_of(tensors, num_pruned, guess))
    checked(layers)


def test_nothing_to_prune_and_nothing_at_all() -> None:
    empty = [layer_of(problem(*shape, 2), 0) for shape in ((0, 5), (5, 0))]
    none = layer_of(problem(96, 384, 2), 0, torch.tensor([0.1, 1.0, 0.5, 0.01]), masked=torch.float32)
    guess = none.guess.clone()
    table = MaskTable([*empty, none])
    prune_masks(table)
    prune_masks(MaskTable(empty))
    prune_masks(MaskTable([]))
    check_exact(none)
    assert torch.equal(none.guess, guess)
    assert packing.unpack_mask(none.mask, 384).all()


def test_a_table_knows_when_a_tensor_has_moved() -> None:
    layers = [layer_of(problem(7, 33, 2), 100, masked=torch.float32) for _ in range(2)]
    table = MaskTable(layers)
    assert table.matches(layers)
    assert table.matches([layers[0], layers[1]._replace(weight=layers[1].weight.view(7, 33))])
    first = layers[0]
    for changed in (
        first._replace(weight=first.weight.clone()), first._replace(masked=None),
        first._replace(factors=first.factors._replace(R=first.factors.R.clone())),
        first._replace(scales=first.scales._replace(beta=2.0)), first._replace(guess=first.guess.clone()),
    ):  # fmt: skip
        assert not table.matches([changed, layers[1]])
    assert not table.matches(layers[:1])
    assert not table.matches(layers[::-1])


def test_what_a_table_refuses() -> None:
    layer = layer_of(problem(7, 33, 2), 100, masked=torch.float32)
    bf16 = layer.factors.map(lambda factor: factor.bfloat16())
    assert layer.masked is not None
    for changed, error, message in (
        (layer._replace(factors=layer.factors._replace(U=bf16.U)), TypeError, "layer 0.*one dtype"),
        (layer._replace(factors=Factors(*(f.double() for f in layer.factors))), TypeError, "got float64"),
        (layer._replace(factors=layer.factors._replace(V=layer.factors.V.T.contiguous().T)), ValueError, "contiguous"),
        (layer._replace(masked=layer.masked.double()), TypeError, "masked must be"),
        (layer._replace(mask=layer.mask.long()), ValueError, "mask must be"),
        (layer._replace(guess=layer.guess[:3]), ValueError, "guess must be"),
    ):
        with pytest.raises(error, match=message):
            MaskTable([changed])


def test_a_kind_has_its_heavy_layers_first() -> None:
    layers = [layer_of(problem(rows, 32, 2), 3) for rows in (16, 64, 32)]
    (group,) = MaskTable(layers).groups
    assert group.rows[:, group_row.N_I.value].tolist() == [64, 32, 16]
    assert group.rows[:, group_row.MASK.value].tolist() == [layers[n].mask.data_ptr() for n in (1, 2, 0)]
