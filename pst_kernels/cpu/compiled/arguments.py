"""The arguments of a compiled pass: a record of numbers and addresses, and the tensors behind the addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pst_kernels.operands import Factors, Scales

from . import threads
from .kernels import ARGUMENTS
from .row_loops import GROUP, RANKS

TASK = 1 << 16  # weights of a task: enough to be worth the taking, few enough to keep all threads busy


def padded(factor: Tensor, dim: int, scale: float = 1.0, rank: int = 0) -> Tensor:
    """A factor in fp32, contiguous, times `scale`, its rank `dim` filled up with zeros to `rank`, or to a multiple of
    RANKS.
    """
    factor = factor.to(torch.float32)
    if scale != 1.0:
        factor = factor * scale
    missing = rank - factor.shape[dim] if rank else -factor.shape[dim] % RANKS
    if missing:
        factor = pad(factor, (0, missing) if dim == 1 else (0, 0, 0, missing))
    return factor.contiguous()


class Arguments:
    """What every pass needs for W'; what else one needs is set before it runs. Keeps the tensors alive."""

    def __init__(self, weight: Tensor, factors: Factors, scales: Scales):
        self.record = np.zeros(1, ARGUMENTS)
        self.tensors: list[Tensor] = []
        self.factors, self.scales = factors, scales
        self.rows, self.columns = weight.shape
        U, V = padded(factors.U, 1, scales.beta), padded(factors.V, 0)
        self.weight_rank = len(V)  # as the passes see it
        self.set(weight=weight, U=U, V=V, out=self.rows, columns=self.columns, weight_rank=self.weight_rank)

    def set(self, **values: Any) -> None:
        """Numbers, and tensors, of which the record gets the address and the type where that may be bf16."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.tensors.append(value)
                self.record[name] = value.data_ptr()
                if name in ("weight", "masked", "gradient"):
                    self.record[f"{name}_is_bf16"] = value.dtype == torch.bfloat16
            else:
                self.record[name] = value

    def set_scores(self) -> None:
        """What the scores need: alpha1 A, B, alpha2 R and alpha2 C."""
        self.set_score_product()
        R, C = ((t.to(torch.float32) * self.scales.alpha2).contiguous() for t in (self.factors.R, self.factors.C))
        self.set(R=R, C=C)

    def set_score_product(self) -> int:
        """alpha1 A and B; returns their rank as the passes see it."""
        A, B = padded(self.factors.A, 1, self.scales.alpha1), padded(self.factors.B, 0)
        self.set(A=A, B=B, score_rank=len(B))
        return len(B)

    def run(self, compiled: Any, rows_per_task: int, first: int = 0, last: int | None = None) -> None:
        """A pass over rows first to last, `rows_per_task` of them a task."""
        last = self.rows if last is None else last
        tasks = -(-(last - first) // rows_per_task)
        self.set(next=0, tasks=tasks, rows_per_task=rows_per_task, first=first, last=last)
        threads.run(compiled, self.record, tasks)


def rows_per_task(rows: int, columns: int) -> int:
    """Rows of a task of a pass that sums nothing up."""
    return min(rows, max(1, TASK // columns))


def rows_per_reduction_task(rows: int, tasks: int) -> int:
    """Rows of a task such that there are at most so many tasks: each has sums of its own to be added up."""
    return -(-rows // (tasks * GROUP)) * GROUP
