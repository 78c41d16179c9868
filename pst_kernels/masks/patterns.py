"""Structures of a mask: what is pruned together, how much of it at a sparsity, and which.

"unstructured"  every weight for itself
"block:B"       B x B blocks (B = 16, 32, 64, 128); a block's score is the mean of its weights' scores
"N:M"           in the end at most N of M neighbouring weights of a row (along the inputs) are kept, such as "2:4"

Blocks start at row 0 and column 0, and so do groups of M; the last ones may be smaller. Everywhere the lower score goes
first, among equal ones the lower index: of the weight, of the block in row-major order, of the weight in its group.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..operands import Factors, Scales
from .packing import pack_mask

Shape = tuple[int, int]  # (out, in) of a weight
Count = int | Tensor  # a 0-d tensor on the scores' device is not looked at: looking would wait for a GPU

BLOCK_SIZES = (16, 32, 64, 128)
COMPARED = 16  # groups up to this size may be ranked by comparing pairs, larger ones are sorted


def num_pruned_at(numel: int, sparsity: float) -> int:
    """How many of `numel` weights are pruned at a sparsity: rounded down, as in the paper's release."""
    return int(numel * sparsity)


@dataclass(frozen=True)
class Unstructured:
    """Every weight for itself. The other patterns differ from it as their methods say."""

    mask_interval = 1  # default number of optimizer steps from one mask to the next
    block_size: ClassVar[int | None] = None  # of blocks that products skip, but for the scores' gradients
    with_masked_weight: ClassVar[bool] = True  # whether the pass that makes the mask can make M * W' too
    across_processes: ClassVar[bool] = True  # whether the mask of a sharded weight can be made

    def prune(
        self, kernels: Any, weight: Tensor, factors: Factors, scales: Scales, num_pruned: Tensor, guess: Tensor,
        masked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The packed mask, made by the functions of a room; `masked` (out, in) gets M * W' from the same pass."""
        return kernels.prune_mask(weight, factors, scales, num_pruned, guess, masked)

    @property
    def sparsity(self) -> float | None:
        """The one sparsity that the pattern means, None where any will do."""
        return None

    def num_pruned_at(self, shape: Shape, sparsity: float) -> int:
        """What `pst_num_pruned` holds at a sparsity: how many weights are pruned."""
        return num_pruned_at(math.prod(shape), sparsity)

    def weights_pruned(self, shape: Shape, num_pruned: int) -> int | None:
        """How many weights that is; None when it depends on the mask."""
        return num_pruned

    def weights_kept_at(self, shape: Shape, sparsity: float) -> int:
        """How many weights are kept at a sparsity. Raises ValueError where that depends on the mask."""
        pruned = self.weights_pruned(shape, self.num_pruned_at(shape, sparsity))
        if pruned is None:
            raise ValueError(f"how many weights {self} keeps of a weight {shape} depends on the mask")
        return math.prod(shape) - pruned

    def keep(self, scores: Tensor, num_pruned: Count) -> Tensor:
        """The mask of fp32 scores (out, in): bool (out, in), False for what is pruned."""
        return _without_smallest(scores.flatten(), num_pruned).view(scores.shape)

    def fits(self, kept: Tensor, num_pruned: int) -> bool:
        """Whether a bool mask (out, in) has this structure and this count."""
        return int((~kept).sum()) == num_pruned


class Structured(Unstructured):
    """What decides by all scores of the weight, which are stored for it."""

    with_masked_weight = False
    across_processes = False

    def prune(
        self, kernels: Any, weight: Tensor, factors: Factors, scales: Scales, num_pruned: Tensor, guess: Tensor,
        masked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        # on a CPU the count is looked at, which chooses the quicker way; on a GPU that would wait for it
        count = int(num_pruned) if num_pruned.device.type == "cpu" else num_pruned
        if isinstance(count, int) and count == 0:
            return pack_mask(torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        return pack_mask(self.keep(kernels.scores(weight, factors, scales), count))


@dataclass(frozen=True)
class Blocks(Structured):
    """Whole blocks. `pst_num_pruned` counts blocks: int(number of blocks * sparsity)."""

    size: int
    mask_interval = 16

    @property
    def block_size(self) -> int | None:  # type: ignore[override]
        return self.size

    def grid(self, shape: Shape) -> Shape:
        """Rows and columns of blocks."""
        return -(-shape[0] // self.size), -(-shape[1] // self.size)

    def num_pruned_at(self, shape: Shape, sparsity: float) -> int:
        return num_pruned_at(math.prod(self.grid(shape)), sparsity)

    def weights_pruned(self, shape: Shape, num_pruned: int) -> int | None:
        ragged = shape[0] % self.size or shape[1] % self.size
        return None if ragged else num_pruned * self.size**2

    def scores(self, scores: Tensor) -> Tensor:
        """float64 score of each block: the mean over the weights that it has."""
        (out, columns), (rows, width) = scores.shape, self.grid((scores.shape[0], scores.shape[1]))
        if out % self.size or columns % self.size:
            scores = pad(scores, (0, width * self.size - columns, 0, rows * self.size - out))
        # float64: the order of the additions decides less often which block is pruned
        sums = scores.view(rows, self.size, width, self.size).sum(3, dtype=torch.float64).sum(1)
        starts = (torch.arange(0, n, self.size, device=scores.device) for n in (out, columns))
        heights, widths = ((n - start).clamp(max=self.size) for n, start in zip((out, columns), starts, strict=True))
        return sums / heights[:, None] / widths

    def keep(self, scores: Tensor, num_pruned: Count) -> Tensor:
        means = self.scores(scores)
        return self._spread(_without_smallest(means.flatten(), num_pruned).view(means.shape), scores.shape)

    def fits(self, kept: Tensor, num_pruned: int) -> bool:
        flags = kept[:: self.size, :: self.size]
        return int((~flags).sum()) == num_pruned and torch.equal(self._spread(flags, kept.shape), kept)

    def _spread(self, flags: Tensor, shape: torch.Size) -> Tensor:
        rows = flags.repeat_interleave(self.size, 0)[: shape[0]]
        return rows.repeat_interleave(self.size, 1)[:, : shape[1]]


@dataclass(frozen=True)
class Groups(Structured):
    """N of M. A sparsity between 0 and 1 - N/M prunes int(M * sparsity) of a group of M: a schedule rises in stages.

    A last group of fewer than M weights keeps as many as the others, if it has them: as if zeros filled it up.
    """

    kept: int
    group: int

    @property
    def sparsity(self) -> float | None:
        return 1.0 - self.kept / self.group

    def num_pruned_at(self, shape: Shape, sparsity: float) -> int:
        # 1 - N/M is rounded: M times it may lie just below M - N
        return self._count(shape, int(self.group * sparsity + 1e-9))

    def keep(self, scores: Tensor, num_pruned: Count) -> Tensor:
        out, columns = scores.shape
        of_group, whole = self._of_group((out, columns), num_pruned), columns // self.group * self.group
        of_last = self._of_last(columns - whole, of_group)
        return torch.cat(
            [
                _without_smallest_of(scores[:, :whole].reshape(-1, self.group), of_group).reshape(out, whole),
                _without_smallest_of(scores[:, whole:], of_last),
            ],
            1,
        )

    def fits(self, kept: Tensor, num_pruned: int) -> bool:
        shape = (kept.shape[0], kept.shape[1])
        if num_pruned not in [self._count(shape, k) for k in range(self.group)]:
            return False
        whole = shape[1] // self.group * self.group
        of_group = self._of_group(shape, num_pruned)
        of_last = self._of_last(shape[1] - whole, of_group)
        groups = (~kept[:, :whole]).reshape(-1, self.group).sum(1)
        return bool((groups == of_group).all()) and bool(((~kept[:, whole:]).sum(1) == of_last).all())

    def _of_last(self, last: int, of_group: Any) -> Any:
        """How many are pruned of a last group of `last` weights, which may be 0."""
        more = of_group - (self.group - last)
        return more.clamp(min=0) if isinstance(more, Tensor) else max(0, more)

    def _count(self, shape: Shape, of_group: Any) -> Any:
        whole, last = divmod(shape[1], self.group)
        return shape[0] * (whole * of_group + (self._of_last(last, of_group) if last else 0))

    def _of_group(self, shape: Shape, num_pruned: Count) -> Any:
        """How many of a group that is: a number for a number, a tensor for a tensor, which is trusted."""
        if isinstance(num_pruned, Tensor):
            counts = self._count(shape, torch.arange(self.group, device=num_pruned.device))
            return (counts == num_pruned).to(torch.int32).argmax()
        for of_group in range(self.group):
            if self._count(shape, of_group) == num_pruned:
                return of_group
        raise ValueError(
            f"num_pruned={num_pruned} is not the same number of weights in every group of {self.group} of a weight"
            f" {shape}; make it with num_pruned_at"
        )


Pattern = Unstructured  # the others derive from it


@functools.cache
def parse(text: str) -> Pattern:
    """The pattern of a name. Raises ValueError that lists the names."""
    if text == "unstructured":
        return Unstructured()
    if isinstance(text, str):
        block, ratio = re.fullmatch(r"block:(\d+)", text), re.fullmatch(r"(\d+):(\d+)", text)
        if block and int(block[1]) in BLOCK_SIZES:
            return Blocks(int(block[1]))
        if ratio and 1 <= int(ratio[1]) < int(ratio[2]):
            return Groups(int(ratio[1]), int(ratio[2]))
    names = ", ".join(repr(f"block:{size}") for size in BLOCK_SIZES)
    raise ValueError(
        f"pattern={text!r} is not known; use one of 'unstructured', {names}, or 'N:M' with 1 <= N < M, such as '2:4',"
        " to keep N of every M neighbouring inputs"
    )


def _without_smallest(scores: Tensor, count: Count) -> Tensor:
    return _without_smallest_by_sorting(scores[None], count)[0]


def _without_smallest_of(scores: Tensor, count: Count) -> Tensor:
    """bool (groups, size): False for the `count` smallest of each row."""
    size = scores.shape[1]
    if isinstance(count, Tensor):
        return _without_smallest_by_sorting(scores, count)
    if count == 0 or not scores.numel():
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if size > COMPARED or bool(scores.isnan().any()):
        return _without_smallest_by_sorting(scores, count)
    # A column of all rows is compared with another at once, which is quicker than to sort rows of four.
    columns = scores.t().contiguous()
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=scores.device)
    for later in range(1, size):
        for earlier in range(later):
            first = columns[earlier] <= columns[later]
            rank[later] += first
            rank[earlier] += ~first
    return (rank >= count).t()


def _without_smallest_by_sorting(scores: Tensor, count: Count) -> Tensor:
    order = torch.sort(scores, dim=1, stable=True).indices
    kept = torch.arange(scores.shape[1], device=scores.device) >= count
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, kept.expand_as(order))
