"""When the lists of a mask's kept blocks are made: once for each mask, and for a layer's in the same memory every time.

A captured graph knows addresses alone. Whoever writes a layer's mask has the lists made anew where they are
(`keep_lists`), so that a graph may read them and need not make them: an eager write is followed by eager launches, and
one in a graph by launches in that graph. The lists of other masks are made in the graph that reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .block_lists import KeptBlocks, list_blocks, room_for_lists


class Held(NamedTuple):
    """The lists of a layer's mask, and what they were made of."""

    of: tuple[int, tuple[int, ...], int]  # the mask's address, the weight's shape, the size of the blocks
    version: int  # of the mask
    lists: KeptBlocks | None  # None: a graph writes the mask that knew no lists, and a replay moves no version


_held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of a layer's mask
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of another: where and of which version it was, and lists


def is_capturing(mask: Tensor) -> bool:
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()


def keep_lists(mask: Tensor, shape: torch.Size, size: int, written: bool = False) -> None:
    """Bring the lists of a layer's mask up to date; `written`: for who has just written it, maybe into a graph."""
    capturing = is_capturing(mask)
    if mask.is_inference() or (capturing and not written):  # the first has no version, the second runs nothing
        return
    of, held = (mask.data_ptr(), tuple(shape), size), _held.get(mask)
    if held is not None and held.of == of and (held.lists is None or held.version == mask._version):
        return
    lists = held.lists if held is not None and held.of == of else None
    if lists is None and capturing:  # memory of the graph's own, which nothing has filled before a replay
        _held[mask] = Held(of, mask._version, None)
        return
    with torch.inference_mode(False):  # they outlive this call
        lists = room_for_lists(shape, size, mask.device) if lists is None else lists
        _held[mask] = Held(of, mask._version, list_blocks(mask, shape, size, lists))


def renew_lists(mask: Tensor, shape: torch.Size, size: int) -> None:
    """`keep_lists` of a mask whose lists are kept already: a graph may read them next."""
    if mask in _held:
        keep_lists(mask, shape, size)


def lists_of(mask: Tensor, shape: torch.Size, size: int) -> KeptBlocks:
    """The kept blocks of a mask: kept with it, or made once on a stream for as long as nothing writes the mask."""
    if mask.is_inference():
        return list_blocks(mask, shape, size)
    held = _held.get(mask)
    if held is not None and held.of == (mask.data_ptr(), tuple(shape), size):
        if held.lists is None:
            return list_blocks(mask, shape, size)
        if held.version == mask._version:
            return held.lists
    if is_capturing(mask):  # a replay follows a mask that was written after the capture
        return list_blocks(mask, shape, size)
    if held is not None:
        keep_lists(mask, shape, size)
        return lists_of(mask, shape, size)
    now = mask.data_ptr(), mask._version
    state, lists = _made.get(mask, (None, {}))
    if state != now:
        state, lists = _made[mask] = now, {}
    stream = torch.cuda.current_stream(mask.device).cuda_stream if mask.is_cuda else 0
    key = tuple(shape), size, stream
    if key not in lists:
        with torch.inference_mode(False):
            lists[key] = list_blocks(mask, shape, size)
    return lists[key]
