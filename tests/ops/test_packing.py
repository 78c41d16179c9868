"""Packed masks: the documented place of every bit, and the round trip."""

import pytest
import torch

from pst_kernels import functional
from pst_kernels.masks.packing import _pack_torch, pack_mask, packed_width, unpack_mask

COLUMNS = [1, 2, 31, 32, 33, 64, 100, 384]


@pytest.mark.parametrize("columns", COLUMNS)
def test_round_trip(columns):
    mask = torch.rand(5, columns) < 0.4
    packed = pack_mask(mask)
    assert packed.shape == (5, packed_width(columns))
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_mask(packed, columns), mask)
    assert torch.equal(functional.unpack_mask(packed, columns), mask)


@pytest.mark.parametrize("column", range(40))
def test_place_of_each_bit(column):
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, column] = True
    expected = [0, 0]
    expected[column // 32] = 1 << ((column % 32) // 2 + 16 * (column % 2))
    assert [word % 2**32 for word in pack_mask(mask)[0].tolist()] == expected


@pytest.mark.parametrize("columns", COLUMNS)
def test_padding_bits_are_zero(columns):
    words = pack_mask(torch.ones(3, columns, dtype=torch.bool))
    bits = sum((words >> i) & 1 for i in range(32)).sum()
    assert bits == 3 * columns


@pytest.mark.parametrize("columns", [32, 64, 384])
def test_both_ways_of_packing_agree(columns):
    mask = torch.rand(7, columns) < 0.5
    assert torch.equal(_pack_torch(mask), pack_mask(mask))


def test_transposed_masks_pack():
    mask = torch.rand(64, 9) < 0.5
    assert torch.equal(unpack_mask(pack_mask(mask.T), 64), mask.T)


def test_errors():
    with pytest.raises(TypeError, match=r"mask must be a 2-d bool tensor, got torch.float32"):
        pack_mask(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"packed must be a 2-d int32 tensor made by prune_mask, got torch.int64"):
        unpack_mask(torch.zeros(2, 2, dtype=torch.int64), 64)
    with pytest.raises(ValueError, match=r"in_features=65 needs 3 words a row, but packed has shape \(2, 2\)"):
        unpack_mask(torch.zeros(2, 2, dtype=torch.int32), 65)
