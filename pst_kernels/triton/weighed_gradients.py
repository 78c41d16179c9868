"""The gradients where the score weighs |W'| by p and q (layers/fisher.py), by kernels that know no weighing.

They get p W q, p U and V q in the place of W, U and V, and G / (p q) in that of G. Then what they gate by is
M + p |W'| q, what A, B, R and C learn from is G * W' as ever, and dU and dV lack a factor of p and of q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import MaskedWeight, Weighing, scaled
from .gradients import gradients_of_stored
from .matmul import input_gradient
from .score import checked_operands

# A weighing below this is taken for it here, where G is divided by it: a row's or a column's whose gradient has been a
# thousandth of the mean. Its score hangs on |W'| as little either way.
LEAST = 2.0**-10


def weighed_backward(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs_input: bool, weighing: Weighing
) -> tuple[Tensor, ...]:
    """`linear_backward` with Q = G * (M + p |W'| q). G is stored whatever the tokens: its squares are summed up too."""
    operands = checked_operands(operands)
    dx = input_gradient(gy, operands) if needs_input else gy.new_empty(0)
    G = gy.T @ x
    torch.square(torch.linalg.vector_norm(G, dim=1, dtype=torch.float32), out=weighing.of_rows)
    weighing.of_columns.add_(torch.linalg.vector_norm(G, dim=0, dtype=torch.float32).square_())
    p, q = weighing.p.clamp_min(LEAST), weighing.q.clamp_min(LEAST)
    weight, factors = scaled(operands.weight, operands.factors, p, q)
    # fp16 could not hold every quotient
    quotient = (G / p).div_(q).to(torch.float32 if x.dtype is torch.float32 else torch.bfloat16)
    found = gradients_of_stored(quotient, operands._replace(weight=weight, factors=factors), through_magnitude)
    return dx, *found._replace(U=found.U * p, V=found.V * q)
