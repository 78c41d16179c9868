"""One bit per weight: the packed form of a pruning mask.

A packed mask is int32 of shape (out, ceil(in / 32)). Column c of a row lives in word c // 32, at bit

    position = (c % 32) // 2 + 16 * (c % 2)

so that the bits of two neighbouring columns are 16 apart: `(word >> p) & 0x00010001` is a pair of flags that lines up
with a pair of 16-bit weights in one register, on a GPU and in a CPU's vector lanes alike. Padding bits are zero.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

WORD = 32  # columns a word holds
PAIRS = WORD // 2
PAIR_MASK = 0x00010001


def packed_width(in_features: int) -> int:
    """Words in one packed row of `in_features` columns."""
    return -(-in_features // WORD)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool (out, in) mask into int32 (out, ceil(in / 32)); True is a kept weight."""
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise TypeError(
            f"mask must be a 2-d bool tensor, got {mask.dtype} of shape {tuple(mask.shape)}; use `scores > threshold`"
        )
    columns = mask.shape[1]
    padding = packed_width(columns) * WORD - columns
    if padding:
        mask = torch.nn.functional.pad(mask, (0, padding))
    return _pack_numpy(mask) if mask.device.type == "cpu" else _pack_torch(mask)


def _pack_torch(mask: Tensor) -> Tensor:
    pairs = mask.view(mask.shape[0], mask.shape[1] // WORD, PAIRS, 2).to(torch.int32)
    shifts = _shifts(mask.device)
    words = (pairs[..., 0] << shifts) | (pairs[..., 1] << (shifts + 16))
    return words.sum(-1, dtype=torch.int32)  # distinct bits, so the sum is their union


def _pack_numpy(padded: Tensor) -> Tensor:
    """The bits in the order of the columns first, then each 16 of them split by a table.

    np.take with "clip", which no index needs, does without the checks of indexing.
    """
    in_order = np.packbits(padded.contiguous().numpy(), axis=1, bitorder="little").view("<u2")
    split = np.take(_even_then_odd(), in_order, mode="clip")
    halves = split.view("<u4")  # bytes: even and odd of columns 0 to 15, even and odd of 16 to 31
    words = halves & 0xFF0000FF
    words |= (halves & 0x0000FF00) << 8
    words |= (halves & 0x00FF0000) >> 8
    return torch.from_numpy(words.view(np.int32))


@functools.cache
def _even_then_odd() -> np.ndarray:
    """For each 16 bits: the 8 even ones in the low byte, the 8 odd ones in the high byte."""
    bits = np.unpackbits(np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")
    split = np.concatenate([bits[:, 0::2], bits[:, 1::2]], axis=1)
    return np.packbits(split, axis=1, bitorder="little").view("<u2")[:, 0]


_cpu_shifts = torch.arange(PAIRS, dtype=torch.int32, device="cpu")


def _shifts(device: torch.device) -> Tensor:
    if device.type == "cpu":  # made once: making it costs time beside unpacking a small mask
        return _cpu_shifts
    return torch.arange(PAIRS, dtype=torch.int32, device=device)


def unpack_flags(packed: Tensor, out: Tensor | None = None) -> Tensor:
    """int16 (out, 32 * words) of 0 and 1, padding columns included: the cheap form that masking passes multiply by.

    `out` is an int32 (out, words, 16) buffer to use.
    """
    pairs = torch.bitwise_right_shift(packed.unsqueeze(-1), _shifts(packed.device), out=out).bitwise_and_(PAIR_MASK)
    return pairs.view(torch.int16).view(packed.shape[0], -1)


def unpack_mask(packed: Tensor, in_features: int) -> Tensor:
    """Unpack an int32 (out, ceil(in / 32)) mask into bool (out, in); True is a kept weight.

    Raises TypeError when `packed` is not a packed mask, ValueError when its width does not fit `in_features`.
    """
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise TypeError(
            f"packed must be a 2-d int32 tensor made by prune_mask, got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    if packed.shape[1] != packed_width(in_features):
        raise ValueError(
            f"in_features={in_features} needs {packed_width(in_features)} words a row, but packed has shape"
            f" {tuple(packed.shape)}; pass the in_features that the mask was made for"
        )
    return unpack_flags(packed)[:, :in_features].to(torch.bool)
