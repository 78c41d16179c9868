"""The product on a step in which the scores rest: U, V and the kept weights learn from G = gy^T x where it is kept.

Between two gradients of the scores (`score_interval`) Q = G * M * (1 + |W'|), or G * M without `through_magnitude`, and
A, B, R and C get zeros, so that nothing that waits for every gradient waits in vain. From the freeze on Q = G * M: no
score has a say any more, and A, B, R and C get no gradient.

    dU = beta Q V^T        dV = beta U^T Q        d(kept weights) = G where kept
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .. import ops
from ..cpu import low_rank
from ..cpu.sparse_rows import SparseRows
from ..functional import Made, bias_gradient, in_dimensions_of, without_autocast
from ..operands import Factors, MaskedWeight, Needs, compute_dtype, zeros_at_once
from .fixed import add_at


class Rest(NamedTuple):
    """How a layer learns while its scores rest."""

    frozen: bool
    through_magnitude: bool  # of steps before the freeze
    kept: bool  # whether M * W', if it is made already, stays as it is until the backward
    kernels: Any = None  # the room of plain tensors, called past PyTorch's dispatch of ops


class Added(NamedTuple):
    """Trained kept weights (kept,), and their flat places in (out, in)."""

    weights: Tensor | None = None
    places: Tensor | None = None


def rested_linear(
    x: Tensor, operands: MaskedWeight, bias: Tensor | None, made: Made, rest: Rest, added: Added, producer: Any = None
) -> Tensor:  # fmt: skip
    """y = x (M * W')^T + bias of operands that `functional.check` let pass; x is in the product's dtype.

    With trained kept weights, `made` holds M * W' with these added to it.
    """
    weight, factors, mask, scales = operands
    flat = x.reshape(-1, x.shape[-1])
    with without_autocast(x.device.type):
        y = _RestedLinear.apply(flat, bias, weight, *factors, mask, *made, *added, (scales, rest), producer)
    return y if x.dim() == 2 else in_dimensions_of(x, y)


class _RestedLinear(torch.autograd.Function):
    """x is (T, in)."""

    @staticmethod
    def forward(
        ctx: Any, x, bias, weight, U, V, A, B, R, C, mask, masked, values, offsets, pointers, waiting,
        added, places, constants, producer,
    ) -> Tensor:  # fmt: skip
        scales, rest = constants
        ctx.constants, ctx.bias_dtype = constants, None if bias is None else bias.dtype
        ctx.make, taken = (None, (x,)) if producer is None else producer
        stays, split = masked if rest.kept else None, (None, None)
        if values is not None:
            y = ops.sparse_forward(x, values, offsets, pointers, bias, weight.shape[0])
        elif masked is not None:
            y = linear(x, masked, None if bias is None else bias.to(x.dtype))
        elif rest.kernels is not None and ops.goes_direct(x):
            operands, of_rows = MaskedWeight(weight, Factors(U, V, A, B, R, C), mask, scales), x.contiguous()
            found = rest.kernels.split_for(of_rows, operands)
            y = rest.kernels.linear_forward(of_rows, operands, bias, found)
            split = split if found is None else found
        else:
            y = ops.linear_forward(x.contiguous(), weight, U, V, A, B, R, C, mask, *scales, bias)
        made = stays, values, offsets, pointers
        ctx.save_for_backward(weight, U, V, A, B, R, C, mask, *made, added, places, *split, *taken)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: hooks on saved tensors may unpack each only once
        flat, made, added, split, taken = saved[:8], Made(*saved[8:12]), Added(*saved[12:14]), saved[14:16], saved[16:]
        scales, rest = ctx.constants
        operands = MaskedWeight.of(*flat, *scales)
        needs_input, needs_bias, _, *needs_factors = ctx.needs_input_grad[:9]
        learns = any(needs_factors[:2]) or ctx.needs_input_grad[15]
        with without_autocast(gy.device.type):
            x = taken[0] if ctx.make is None else ctx.make(*taken).to(gy.dtype).reshape(-1, flat[0].shape[1])
            gradient = _Gradient(gy.contiguous(), x.contiguous(), operands, rest, (needs_input, learns))
            if made.values is not None:
                dx, dU, dV, d_added = gradient.by_lists(*made[1:4])  # type: ignore[arg-type]
            elif added.weights is not None:
                dx, dU, dV, d_added = gradient.with_kept_weights(made.masked, added)
            else:
                dx, dU, dV = gradient.dense(made.masked, None if split[0] is None else split)
                d_added = dU  # of none
        of_added = None
        dbias = bias_gradient(gy, ctx.bias_dtype) if needs_bias else None
        zeros = [None] * 4 if rest.frozen else zeros_at_once(operands.factors[2:])
        pairs = zip((dU, dV, *zeros), operands.factors, needs_factors, strict=True)
        of_factors = [None if d is None or not need else d.to(factor.dtype) for d, factor, need in pairs]
        if added.weights is not None and ctx.needs_input_grad[15]:
            of_added = d_added.to(added.weights.dtype)
        return dx if needs_input else None, dbias, None, *of_factors, *[None] * 6, of_added, *[None] * 3


class _Gradient(NamedTuple):
    """The ways to dx, dU, dV and the kept weights' gradient; those that are not needed are empty."""

    gy: Tensor
    x: Tensor
    operands: MaskedWeight
    rest: Rest
    needs: tuple[bool, bool]  # dx, and the others

    @property
    def through(self) -> bool:
        return self.rest.through_magnitude and not self.rest.frozen

    def by_lists(self, values: Tensor, offsets: Tensor, pointers: Tensor) -> tuple[Tensor, ...]:
        weight, (U, V, *_), _, scales = self.operands
        out, columns = weight.shape
        dx, G = ops.sparse_backward(self.gy, self.x, values, offsets, pointers, columns, *self.needs)
        if not self.needs[1]:
            return dx, G, G, G
        Q = torch.addcmul(G, G, values.abs().to(G.dtype)) if self.through else G
        dU, dV = low_rank.factor_gradients(SparseRows(Q, offsets, pointers, out, columns), U, V, scales.beta)
        return dx, dU, dV, G

    def with_kept_weights(self, masked: Tensor | None, added: Added) -> tuple[Tensor, ...]:
        """By dense products, for G's kept places are read one by one."""
        weight, (U, V, *_), _, scales = self.operands
        needs_input, learns = self.needs
        dx = self.gy.new_empty(0)
        if needs_input:
            masked = masked_with(self.operands, added, self.gy.dtype) if masked is None else masked
            dx = self.gy @ masked
        if not learns:
            return dx, dx, dx, dx
        G = (self.gy.t() @ self.x).view(-1)[added.places].to(compute_dtype(weight.dtype))
        Q = G.new_zeros(weight.shape)
        add_at(Q, added.places, G)  # type: ignore[arg-type]
        U, V = U.to(G.dtype), V.to(G.dtype)
        return dx, (Q @ V.t()) * scales.beta, (U.t() @ Q) * scales.beta, G

    def dense(self, masked: Tensor | None, split: Any) -> tuple[Tensor, ...]:
        needs_input, learns = self.needs
        by_op, kernels = needs_input and masked is None, self.rest.kernels
        if kernels is not None and ops.goes_direct(self.gy):
            needs = Needs(by_op, learns)
            dx, dU, dV = kernels.rested_backward(self.gy, self.x, self.operands, self.through, needs, split)
        else:
            dx, dU, dV = ops.rested_backward(self.gy, self.x, *self.operands.flat, self.through, by_op, learns)
        return dx if by_op or masked is None or not needs_input else self.gy @ masked, dU, dV


def masked_with(operands: MaskedWeight, added: Added, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """M * W' (out, in) with the trained kept weights added, rounded once; in `out` where it is given."""
    if added.weights is None:
        if out is None:
            return ops.masked_weight(*operands.flat, dtype)
        return ops.kernels_for(out.device.type).masked_weight(operands, dtype, out)
    masked = ops.masked_weight(*operands.flat, compute_dtype(operands.weight.dtype))
    add_at(masked, added.places, added.weights.detach())  # type: ignore[arg-type]
    return masked.to(dtype) if out is None else out.copy_(masked)
