"""What the ops call of the compiled passes: scores, a search of them, M * W', and the factor gradients.

`scratch` is the function of the package above that gives buffers (scratch.get).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from pst_kernels.masks.guess import Bracket, Candidates
from pst_kernels.masks.packing import packed_width
from pst_kernels.operands import Factors, MaskedWeight, Scales, Weighing

from . import block_weights, candidates, kernels, small_launch
from .arguments import Arguments, rows_per_reduction_task, rows_per_task
from .candidates import Scratch

small, updated_blocks = small_launch, block_weights.updated_blocks

TASKS = 8  # of the rows of G that are there at once: each has its own sums over rows, as large as the factors


def scores(weight: Tensor, factors: Factors, scales: Scales) -> Tensor:
    arguments = Arguments(weight, factors, scales)
    arguments.set_scores()
    return _scores(arguments)


def _scores(arguments: Arguments) -> Tensor:
    shape = arguments.rows, arguments.columns
    out = torch.empty(shape, dtype=torch.float32)
    arguments.set(scores=out)
    arguments.run(kernels.scores, rows_per_task(*shape))
    return out


class CompiledScores:
    """The scores of a weight, to be searched; `packed` and M * W', if it is wanted, follow what is found.

    `masked` for M * W' is fp32 or bf16 (out, in).
    """

    def __init__(self, weight: Tensor, factors: Factors, scales: Scales, masked: Tensor | None, scratch: Scratch):
        self.shape = weight.shape
        self.packed = torch.empty((self.shape[0], packed_width(self.shape[1])), dtype=torch.int32)
        self.masked, self.scratch = masked, scratch
        self.arguments = Arguments(weight, factors, scales)
        self.arguments.set_scores()
        self.arguments.set(packed=self.packed)
        if masked is not None:
            self.arguments.set(masked=masked)
        self.rows_per_task = rows_per_task(*self.shape)

    def gather(self, bracket: Bracket) -> Candidates:
        tasks = -(-self.shape[0] // self.rows_per_task)
        run = functools.partial(self._look, bracket)
        return candidates.look(run, tasks, self.rows_per_task * self.shape[1], self.scratch)

    def _look(self, bracket: Bracket, room: candidates.Room) -> None:
        self.arguments.set(
            lower=bracket.lower, upper=bracket.upper, candidate_scores=room.scores, candidate_indices=room.indices,
            capacity=room.capacity, below=room.below.ctypes.data, found=room.found.ctypes.data,
        )  # fmt: skip
        self.arguments.run(kernels.prune, self.rows_per_task)

    def prune(self, found: Candidates, value: float, count: int) -> int:
        return kernels.drop_first(found.scores, found.index, np.float32(value), count, *self._results())

    def drop(self, index: np.ndarray) -> None:
        kernels.drop(index, *self._results())

    def _results(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """The packed mask, its columns, and M * W', flat, as fp32 and as bf16: what there is of them."""
        floats, halves = np.empty(0, np.float32), np.empty(0, np.uint16)
        if self.masked is not None and self.masked.dtype == torch.float32:
            floats = self.masked.view(-1).numpy()
        elif self.masked is not None:
            halves = self.masked.view(torch.uint16).view(-1).numpy()
        return self.packed.view(torch.uint32).numpy(), self.shape[1], floats, halves

    def all(self) -> np.ndarray:
        tasks = -(-self.shape[0] // self.rows_per_task)
        everything = Bracket(-np.inf, -np.inf)  # keeps every weight; how many are at -inf is of no interest
        self._look(everything, candidates.Room(tasks, 0, self.scratch))
        return _scores(self.arguments).view(-1).numpy()


def masked_into(out: Tensor, operands: MaskedWeight) -> Tensor:
    """Fill `out`, fp32 or bf16 (out, in), with M * W'."""
    weight, factors, mask, scales = operands
    arguments = Arguments(weight, factors, scales)
    arguments.set(packed=mask.contiguous(), masked=out)
    arguments.run(kernels.masked_weight, rows_per_task(*weight.shape))
    return out


def factor_gradients(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, masked: Tensor | None, most_rows: int,
    scratch: Scratch, weighing: Weighing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The six factor gradients from G = gy^T x, of which at most `most_rows` rows exist at a time.

    `masked` gets M * W'.
    """
    weight, factors, mask, scales = operands
    out, columns = weight.shape
    arguments = Arguments(weight, factors, scales)
    up, score = arguments.weight_rank, arguments.set_score_product()
    dU, dA, dR = torch.empty(out, up), torch.empty(out, score), torch.empty(out)
    group_rows = -(-out // -(-out // most_rows))
    task_rows = rows_per_reduction_task(group_rows, TASKS)
    tasks = -(-group_rows // task_rows)
    sums = up + score + 1 + (weighing is not None)
    partial = scratch("partial sums", (tasks, sums, columns), torch.float32, gy.device).zero_()
    gradient = scratch("gradient", (group_rows, columns), gy.dtype, gy.device)
    arguments.set(
        packed=mask.contiguous(), through_magnitude=int(through_magnitude), dU=dU, dA=dA, dR=dR, partial=partial,
        gradient=gradient,
    )  # fmt: skip
    if masked is not None:
        arguments.set(masked=masked)
    if weighing is not None:
        arguments.set(p=weighing.p.contiguous(), q=weighing.q.contiguous(), of_rows=weighing.of_rows)
    for first in range(0, out, group_rows):
        last = min(first + group_rows, out)
        torch.mm(gy[:, first:last].T, x, out=gradient[: last - first])
        arguments.run(kernels.gradients, task_rows, first, last)
    weight_rank, score_rank = factors.weight_rank, factors.score_rank
    dV, dB, dC = partial[:, :weight_rank].sum(0), partial[:, up : up + score_rank].sum(0), partial[:, up + score].sum(0)
    if weighing is not None:
        weighing.of_columns.add_(partial[:, -1].sum(0))
    beta, alpha1, alpha2 = scales
    return dU[:, :weight_rank] * beta, dV, dA[:, :score_rank] * alpha1, dB, dR.mul_(alpha2), dC.mul_(alpha2)
