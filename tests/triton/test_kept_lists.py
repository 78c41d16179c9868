"""The lists of a layer's kept blocks: made when its mask is written, in the same memory, for captured graphs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import pst_kernels as pst
from pst_kernels.masks.packing import pack_mask

pytest.importorskip("triton", reason="triton is not installed")

from silent_driver import silent

from pst_kernels.triton import block_lists, kept_lists

LISTING = "list_blocks_kernel", "order_lists_kernel"
OF_A_STEP = {  # of a layer between two masks
    "split_factors_kernel": 1, "block_matmul_kernel": 2, "block_gradients_kernel": 1, "add_block_partials_kernel": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch):
    """Turns on and off what says that a graph is captured. What is launched then runs here, as no capture lets it."""
    return lambda on: monkeypatch.setattr(kept_lists, "is_capturing", lambda mask: on)


def layer_of(**settings) -> pst.PSTLinear:
    torch.manual_seed(0)
    config = pst.PSTConfig(**{"pattern": "block:16", "sparsity": 0.5, "weight_rank": 3, "score_rank": 3} | settings)
    return pst.PSTLinear.from_linear(nn.Linear(80, 48), config)


def addresses(lists: block_lists.KeptBlocks) -> list[int]:
    return [tensor.data_ptr() for of in lists for tensor in of]


def held(layer: pst.PSTLinear) -> block_lists.KeptBlocks:
    return kept_lists._held[layer.pst_mask].lists


def named(lists: block_lists.KeptBlocks) -> list[list[list[int]]]:
    """The kept blocks by rows and by columns of blocks, without what lies past the counts, and the order."""
    return [
        [*(row[:count].tolist() for row, count in zip(of.indices, of.counts, strict=True)), of.order.tolist()]
        for of in lists
    ]


def by_definition(mask: Tensor) -> list[list[list[int]]]:
    flags = mask[::16, ::16]
    found = []
    for of in (flags, flags.T):
        counts = of.sum(1)
        order = sorted(range(len(of)), key=lambda i: -counts[i])
        found.append([*(row.nonzero().flatten().tolist() for row in of), order])
    return found


def move(layer: pst.PSTLinear) -> None:
    """So that another block is the least."""
    with torch.no_grad():
        layer.pst_C.copy_(10.0 * (torch.arange(80) // 16 % 3) * (1 if layer.pst_C[16] <= 0 else -1))


@pytest.mark.parametrize("mask_interval", [1, 1000])
def test_a_step_between_two_masks_lists_nothing(mask_interval: int) -> None:
    with silent(90) as launches:
        layer = layer_of(mask_interval=mask_interval)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
        x = torch.randn(6, 80, requires_grad=True)
        layer(x).sum().backward()
        assert [launches[name] for name in LISTING] == [1, 1]
        launches.clear()
        layer(x).sum().backward()
        assert {name: launches[name] for name in OF_A_STEP} == OF_A_STEP
        assert [launches[name] for name in LISTING] == [0, 0]
        optimizer.step()
        layer(x).sum().backward()
        assert [launches[name] for name in LISTING] == ([1, 1] if mask_interval == 1 else [0, 0])


def test_lists_follow_the_mask_in_their_memory(emulator, capture) -> None:
    """What was captured before a mask was written reads that mask's lists, wherever it was written."""
    with emulator.emulate(90) as session:
        layer = layer_of(mask_interval=1)
        layer.refresh_mask()
        lists, places = held(layer), addresses(held(layer))
        assert named(lists) == by_definition(layer.mask)
        capture(True)
        before = session.stats[LISTING[0]].launches
        assert kept_lists.lists_of(layer.pst_mask, layer.weight.shape, 16) is lists
        assert session.stats[LISTING[0]].launches == before
        for on in (False, True):  # by an eager step, and by one in the graph
            capture(on)
            mask = layer.mask
            move(layer)
            layer.refresh_mask()
            assert not torch.equal(layer.mask, mask)
            assert named(lists) == by_definition(layer.mask)
            assert addresses(held(layer)) == places
        capture(False)
        given, other = {n: t.clone() for n, t in layer.state_dict().items()}, layer_of(mask_interval=1)
        other.refresh_mask()
        lists = held(other)
        assert named(lists) != by_definition(layer.mask)
        other.load_state_dict(given)  # no forward sees it before the next replay
        assert named(lists) == by_definition(layer.mask)
        mask = layer.mask.roll(16, 0)
        other.pst_mask.copy_(pack_mask(mask))
        other(torch.randn(3, 80))
        assert named(lists) == by_definition(mask)
        assert torch.equal(other.mask, mask)


def test_a_mask_that_a_graph_writes_without_lists_has_none(emulator, capture) -> None:
    """A replay writes it, and moves no version: who reads it afterwards lists anew, in a graph and out of it."""
    with emulator.emulate(90) as session:
        layer = layer_of(mask_interval=1)
        capture(True)
        layer.refresh_mask()
        assert held(layer) is None
        capture(False)
        for launches in (1, 2):
            kept_lists.lists_of(layer.pst_mask, layer.weight.shape, 16)
            assert session.stats[LISTING[0]].launches == launches
        move(layer)
        layer.refresh_mask()
        assert held(layer) is None


def test_lists_are_made_in_the_graph_for_other_masks(emulator, capture) -> None:
    """A mask of no layer, and one that was written since its layer looked."""
    with emulator.emulate(90) as session:
        layer = layer_of(mask_interval=1000)
        layer.refresh_mask()
        plain, before = layer.pst_mask.clone(), session.stats[LISTING[0]].launches
        capture(True)
        for launches in (1, 2):
            lists = kept_lists.lists_of(plain, layer.weight.shape, 16)
            assert session.stats[LISTING[0]].launches == before + launches
        assert named(lists) == by_definition(layer.mask)
        with torch.no_grad():
            layer.pst_mask.zero_()
        kept_lists.keep_lists(layer.pst_mask, layer.weight.shape, 16)
        lists = kept_lists.lists_of(layer.pst_mask, layer.weight.shape, 16)
        assert session.stats[LISTING[0]].launches == before + 3
        assert lists is not held(layer)
        assert not any(bool(of.counts.any()) for of in lists)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_has_lists_of_its_own(emulator, way) -> None:
    with emulator.emulate(90):
        layer = layer_of(mask_interval=1)
        names = set(layer.state_dict())
        layer.refresh_mask()
        assert set(layer.state_dict()) == names
        other, lists = way(layer), named(held(layer))
        assert other.pst_mask not in kept_lists._held
        move(other)
        y = other(torch.ones(2, 80))
        assert named(held(other)) == by_definition(other.mask) != lists == named(held(layer))
        assert not set(addresses(held(other))) & set(addresses(held(layer)))
        expected = nn.functional.linear(torch.ones(2, 80), other.masked_weight(), other.bias)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_lists_go_with_their_mask(emulator) -> None:
    with emulator.emulate(90):
        layer = layer_of()
        layer.refresh_mask()
        before = len(kept_lists._held)
        del layer
        assert len(kept_lists._held) == before - 1
