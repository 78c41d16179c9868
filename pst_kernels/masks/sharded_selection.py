"""Exact selection over scores that lie on several processes, each holding a shard of one matrix.

What the processes exchange are counts. A bracket from the last step, or a histogram of the scores' leading bits, summed
over the group, tells where the k-th smallest lies. Each process gathers its own scores in there, and a radix selection
finds the k-th: a summed histogram of RADIX_BITS bits of all candidates, then of the next bits of those in its bin.
Scores that are equal in all bits are told apart in the same way by their flat index in the whole matrix, so that the
answer depends on the scores alone, not on the number of processes nor on how the matrix is cut.

Order: (score, flat index in the whole matrix), NaN last, -0.0 equal to 0.0, as in cpu/select.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .guess import Bracket, Selection

ShardScores = Callable[[], Iterator[tuple[slice, Tensor]]]  # yields (rows of the shard, their fp32 scores), in order

KEY_BITS, COARSE_BITS, RADIX_BITS = 32, 16, 11  # 2^11 counts of 8 bytes are 16 KB to sum over the group
SIGN, LAST = 1 << 31, (1 << 32) - 1


class ShardPosition(NamedTuple):
    """Where a shard lies in the whole matrix."""

    first_row: int
    first_column: int
    rows: int  # of the whole
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class ShardCandidates(NamedTuple):
    """This process's scores inside a bracket."""

    keys: Tensor  # int64, see `ordered`
    whole: Tensor  # int64, flat index in the whole matrix
    local: Tensor  # int64, flat index in the shard


def ordered(scores: Tensor) -> Tensor:
    """int64 in [0, 2^32) that compare as fp32 scores do."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # -0.0 + 0.0 is 0.0
    keys = torch.where(bits < 0, ~bits, bits + SIGN)
    return keys.masked_fill_(scores.isnan(), LAST)


def score_of(key: int) -> float:
    bits = key - SIGN if key >= SIGN else ~key
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def select(
    scores: ShardScores, position: ShardPosition, k: int, bracket: Bracket | None, kept: Tensor,
    group: dist.ProcessGroup,
) -> Selection:  # fmt: skip
    """The k-th smallest score of the whole matrix, k from 1.

    Every process of `group` must call it with the same k and bracket. `kept`, bool of the shard's shape, becomes False
    for just those of the k smallest that lie in it.
    """
    edges = None if bracket is None else tuple(ordered(torch.tensor([bracket.lower, bracket.upper])).tolist())
    found, below, inside = _gather(scores, position, edges, kept, group) if edges else (None, 0, 0)
    if found is None or edges is None or not below < k <= below + inside:
        edges = _coarse_edges(scores, k, kept.device, group)
        found, below, inside = _gather(scores, position, edges, kept, group)
    key, index = _kth(found, k - below, position.numel, group)
    pruned = (found.keys < key) | ((found.keys == key) & (found.whole <= index))
    kept.view(-1)[found.local[pruned]] = False
    width = score_of(edges[1]) - score_of(edges[0])
    return Selection(score_of(key), index, width * position.numel / inside)


def _sum(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(counts, group=group)
    return counts


def _gather(
    scores: ShardScores, position: ShardPosition, edges: tuple[int, ...], kept: Tensor, group: dist.ProcessGroup
) -> tuple[ShardCandidates, int, int]:
    """This process's candidates between two keys, ends included, and how many lie below and inside in the whole group.

    `kept` becomes False for all below.
    """
    lower, upper = edges
    counts = torch.zeros(2, dtype=torch.int64, device=kept.device)
    parts = []
    for rows, block in scores():
        keys = ordered(block)
        above = torch.ge(keys, lower, out=kept[rows])
        inside = above & (keys <= upper)
        counts[0] += keys.numel() - above.sum()
        row, column = inside.nonzero(as_tuple=True)
        row += rows.start
        index = (row + position.first_row) * position.columns + column + position.first_column
        parts.append(ShardCandidates(keys[inside], index, row * kept.shape[1] + column))
        counts[1] += len(index)
    below, inside_all = _sum(counts, group).tolist()
    return ShardCandidates(*map(torch.cat, zip(*parts, strict=True))), below, inside_all


def _coarse_edges(scores: ShardScores, k: int, device: torch.device, group: dist.ProcessGroup) -> tuple[int, int]:
    """First and last key of those that share their leading 16 bits with the k-th."""
    counts = torch.zeros(1 << COARSE_BITS, dtype=torch.int64, device=device)
    rest = KEY_BITS - COARSE_BITS
    for _, block in scores():
        counts += torch.bincount(ordered(block).flatten() >> rest, minlength=len(counts))
    first, _, _ = _bin_of(_sum(counts, group), k)
    return first << rest, (first << rest) + (1 << rest) - 1


def _bin_of(histogram: Tensor, k: int) -> tuple[int, int, int]:
    """The bin that the k-th lies in, its rank in there, and how many lie in there."""
    cumulative = histogram.cumsum(0)
    chosen = torch.searchsorted(cumulative, k)
    last, count = torch.stack([cumulative[chosen], histogram[chosen]]).tolist()
    return int(chosen), k - (last - count), count


def _kth(found: ShardCandidates, k: int, numel: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """(key, flat index) of the k-th of all processes' candidates."""
    key, _, index, k, ties = _radix_select(found.keys, found.whole, KEY_BITS, k, group)
    if k == ties:  # all that are equal to it are pruned
        return key, numel - 1
    return key, _radix_select(index, index, numel.bit_length(), k, group)[0]


def _radix_select(
    values: Tensor, others: Tensor, bits: int, k: int, group: dist.ProcessGroup
) -> tuple[int, Tensor, Tensor, int, int]:
    """The k-th of all processes' `values`, int64 of so many bits, and what is equal to it.

    That is this process's own of `values`, with what stands beside them in `others`, the k-th's rank among all that are
    equal in the group, and how many these are.
    """
    found = count = 0
    for shift in reversed(range(0, bits, RADIX_BITS)):
        bins = (values >> shift) & ((1 << RADIX_BITS) - 1)
        chosen, k, count = _bin_of(_sum(torch.bincount(bins, minlength=1 << RADIX_BITS), group), k)
        values, others = values[bins == chosen], others[bins == chosen]
        found |= chosen << shift
    return found, values, others, k, count
