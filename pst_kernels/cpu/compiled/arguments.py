"""Tensors in the form that the compiled passes take, and the frames that hold their addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from . import threads as team
from .kernels import FRAME
from .row_loops import GROUP, RANKS

SHARE = 1 << 16  # weights of a share of rows: enough to be worth the taking, few enough to keep all threads busy


def padded(factor: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """A factor in fp32, contiguous, times `scale`, its rank `dim` filled up with zeros to a multiple of RANKS."""
    factor = factor.to(torch.float32)
    if scale != 1.0:
        factor = factor * scale
    missing = -factor.shape[dim] % RANKS
    if missing:
        factor = pad(factor, (0, missing) if dim == 1 else (0, 0, 0, missing))
    return factor.contiguous()


class Frame:
    """The arguments of a pass, and the tensors behind their addresses, which must live as long as it runs."""

    def __init__(self, weight: Tensor, U: Tensor, V: Tensor, beta: float):
        self.values = np.zeros(1, FRAME)
        self.tensors: list[Tensor] = []
        self.rows, self.columns = weight.shape
        self.U, self.V = padded(U, 1, beta), padded(V, 0)
        self.set(weight=weight, U=self.U, V=self.V, out=self.rows, columns=self.columns, update_rank=len(self.V))

    def set(self, **values: Any) -> None:
        """Numbers, and tensors, of which the frame gets the address and the type where that may be bf16."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.tensors.append(value)
                self.values[name] = value.data_ptr()
                if name in ("weight", "masked", "gradient"):
                    self.values[f"{name}_is_bf16"] = value.dtype == torch.bfloat16
            else:
                self.values[name] = value

    def set_scores(self, A: Tensor, B: Tensor, R: Tensor, C: Tensor, alpha1: float, alpha2: float) -> None:
        self.set_score_factors(A, B, alpha1)
        R, C = ((t.to(torch.float32) * alpha2).contiguous() for t in (R, C))
        self.set(R=R, C=C)

    def set_score_factors(self, A: Tensor, B: Tensor, alpha1: float) -> int:
        """alpha1 A and B; returns their rank as the passes see it."""
        A, B = padded(A, 1, alpha1), padded(B, 0)
        self.set(A=A, B=B, score_rank=len(B))
        return len(B)

    def run(self, compiled: Any, share_rows: int, first: int = 0, last: int | None = None) -> None:
        """A pass over rows first to last, cut into shares of `share_rows`."""
        last = self.rows if last is None else last
        shares = -(-(last - first) // share_rows)
        self.set(next=0, shares=shares, share_rows=share_rows, first=first, last=last)
        if torch.autograd.profiler._is_profiler_enabled:
            with torch.profiler.record_function(f"pst_kernels.cpu: {compiled.__name__}"):
                team.run(compiled, self.values, shares)
        else:
            team.run(compiled, self.values, shares)


def share_rows(rows: int, columns: int) -> int:
    """Rows of a share of a pass that sums nothing up."""
    return min(rows, max(1, SHARE // columns))


def share_rows_of_sums(rows: int, shares: int) -> int:
    """Rows of a share such that there are at most so many: each has sums of its own to be added up."""
    return -(-rows // (shares * GROUP)) * GROUP
