"""dx, dU and dV on a step in which the scores rest, where no lists of kept weights are there: from dense rows of G.

With Q = G * M * (1 + |W'|), or G * M without `through_magnitude`: dU = beta Q V^T, dV = beta U^T Q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import MaskedWeight, Needs
from .row_blocks import UpdatedRows, multiply_into


def rested_backward(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs: Needs, split: None = None
) -> tuple[Tensor, Tensor, Tensor]:
    by_rows = UpdatedRows(operands.weight, operands.factors, operands.scales)
    U, V = by_rows.U, by_rows.V
    dU, dV = (torch.zeros_like(factor) if needs.factors else factor.new_empty(0) for factor in (U, V))
    dx = torch.zeros_like(x, dtype=by_rows.dtype) if needs.input else gy.new_empty(0)
    product = by_rows.buffer("product")
    for rows in by_rows.blocks():
        updated, flags = by_rows.updated(rows), by_rows.flags(operands.mask, rows)
        masked = product[: len(updated)]
        multiply_into(masked, updated, flags, work=updated)
        if needs.input:
            dx += gy[:, rows] @ masked.to(gy.dtype)
        if needs.factors:
            gate = flags.add_(masked.abs_()) if through_magnitude else flags
            Q = torch.mm(gy[:, rows].T, x).to(by_rows.dtype).mul_(gate)
            torch.mm(Q, V.T, out=dU[rows])
            dV.addmm_(U[rows].T, Q)
    return dx.to(gy.dtype), dU.mul_(by_rows.beta), dV.mul_(by_rows.beta)
