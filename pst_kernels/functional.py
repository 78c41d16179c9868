"""The method as functions of tensors. `pst_linear` is differentiable; the others compute masks and look inside.

Shapes throughout: weight (out, in), U (out, r1), V (r1, in), A (out, r2), B (r2, in), R (out,), C (in,).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import ops
from .masks import due
from .masks.packing import packed_width, unpack_mask
from .operands import Factors, MaskedWeight, Needs, Scales, compute_dtype, zeros_at_once
from .ops import autocast_enabled, without_autocast

__all__ = ["kth_value", "prune_mask", "pst_linear", "scores", "unpack_mask"]


def scores(
    weight: Tensor, U: Tensor, V: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor,
    *, beta: float = 1.0, alpha1: float = 1.0, alpha2: float = 1.0,
) -> Tensor:  # fmt: skip
    """Importance S = |W + beta U V| + alpha1 A B + alpha2 (R + C), fp32 (out, in). For inspection: an
    unstructured mask is made without storing it, but for a small weight on a CPU.
    """
    factors = Factors(U, V, A, B, R, C)
    factors.check(weight)
    return ops.scores(weight, *factors, float(beta), float(alpha1), float(alpha2))


def kth_value(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exact k-th smallest of a tensor (k from 1) under the (score, flat index) order.

    Returns (value, flat index), both 0-d, the index int64. NaN counts as the largest. Raises ValueError for k outside
    [1, scores.numel()], TypeError for a dtype that is not fp32 (cast first: fp16 and bf16 fit exactly).
    """
    if scores.dtype != torch.float32:
        raise TypeError(f"scores must be float32, got {scores.dtype}; use scores.float()")
    _check_whole("k", k)
    if not 1 <= k <= scores.numel():
        raise ValueError(f"k must be in [1, {scores.numel()}] for {scores.numel()} scores, got {k}")
    return ops.kth_value(scores.detach().contiguous(), k)


def new_guess(device: torch.device | None = None) -> Tensor:
    """The state of a selection that has no past: fp32 (4,) of NaN."""
    return torch.full((4,), math.nan, device=device)


def prune_mask(
    weight: Tensor, U: Tensor, V: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor, num_pruned: int | Tensor,
    *, beta: float = 1.0, alpha1: float = 1.0, alpha2: float = 1.0,
) -> Tensor:  # fmt: skip
    """The packed mask, int32 (out, ceil(in / 32)), that prunes exactly the `num_pruned` smallest scores.

    Equal scores: the lower flat index is pruned first. The scores are not stored. `num_pruned` is an int or a 0-d int64
    tensor, which stays on its device. Raises ValueError for an int outside [0, weight.numel()] and for wrong shapes.
    """
    factors = Factors(U, V, A, B, R, C)
    factors.check(weight)
    if isinstance(num_pruned, Tensor):
        if num_pruned.dtype != torch.int64 or num_pruned.dim() != 0:
            raise TypeError(
                f"num_pruned must be an int or a 0-d int64 tensor, got {num_pruned.dtype} of shape"
                f" {tuple(num_pruned.shape)}; use torch.tensor(n)"
            )
        if num_pruned.device != weight.device:
            raise ValueError(f"num_pruned is on {num_pruned.device} but weight is on {weight.device}; move it")
        if num_pruned.device.type == "cpu":  # on a GPU, looking would wait for it
            num_pruned = int(num_pruned)
    if not isinstance(num_pruned, Tensor):
        _check_whole("num_pruned", num_pruned)
        if not 0 <= num_pruned <= weight.numel():
            raise ValueError(f"num_pruned must be in [0, {weight.numel()}] for this weight, got {num_pruned}")
        num_pruned = torch.full((), num_pruned, dtype=torch.int64, device=weight.device)
    scales = Scales(float(beta), float(alpha1), float(alpha2))
    return ops.prune_mask(weight, *factors, *scales, num_pruned, new_guess(weight.device), "unstructured")


def pst_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    U: Tensor, V: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor, mask: Tensor,
    *, beta: float = 1.0, alpha1: float = 1.0, alpha2: float = 1.0, through_magnitude: bool = True,
) -> Tensor:  # fmt: skip
    """y = x (M * (W + beta U V))^T + bias, with the straight-through gradient of PST for the six factors.

    x is (..., in) and y (..., out), in x's dtype, which is the autocast dtype under autocast and else must be the
    weight's. `mask` is packed, from `prune_mask`. The weight is frozen and gets no gradient; the factors may be of
    another floating dtype than the weight (fp32 over a bf16 weight, say) and their gradients are computed in fp32. Kept
    for backward: x, the packed mask and the factors.

    Source: Li et al., IJCAI 2022 (arXiv 2205.11005), equations 3 to 8; with `through_magnitude` the gradient also
    passes through |W'| in the score, as in the authors' release.

    Example:
        mask = prune_mask(W, U, V, A, B, R, C, int(W.numel() * 0.9))
        y = pst_linear(x, W, bias, U, V, A, B, R, C, mask)
    """
    scales = Scales(float(beta), float(alpha1), float(alpha2))
    operands = MaskedWeight(weight, Factors(U, V, A, B, R, C), mask, scales)
    check(x, operands, bias)
    return masked_linear(x, operands, bias, operand_dtype(x), Options(through_magnitude))


class Options(NamedTuple):
    """What a layer knows and wants beside the operands of its product."""

    through_magnitude: bool = True
    kept: bool = False  # whether M * W', if it is made already, stays as it is until the backward
    block_size: int | None = None  # of a mask that consists of blocks
    interval: int = 1  # steps from one mask of blocks to the next: on the last of them A, B, R and C learn too
    kernels: Any = None  # the room of plain tensors, or the layer's own; called past PyTorch's dispatch of ops
    weighed: bool = False  # whether that room alone, and no op, knows how the score weighs |W'|


class Made(NamedTuple):
    """M * W' as it is made before a product: dense (out, in), or lists of the kept weights (cpu/sparse_rows.py)."""

    masked: Tensor | None = None
    values: Tensor | None = None
    offsets: Tensor | None = None
    pointers: Tensor | None = None
    waiting: Tensor | None = None  # a parameter with no part in y yet: who waits for all gradients must see it pass


NOTHING_MADE = Made()


class Tallied(NamedTuple):
    """How the score weighs |W'| where ops alone are called, as in a compiled graph (layers/fisher.py)."""

    moments: Tensor | None = None  # fp32 (out + in,): the running sums of G^2
    tally: Tensor | None = None  # fp32 (out + in + 1,): its gradient is what a backward adds to them, and how many did


UNTALLIED = Tallied()


def masked_linear(
    x: Tensor, operands: MaskedWeight, bias: Tensor | None, dtype: torch.dtype, options: Options,
    made: Made | None = None, producer: Any = None, tallied: Tallied = UNTALLIED,
) -> Tensor:  # fmt: skip
    """`pst_linear` of operands that `check` let pass; `dtype` is `operand_dtype(x)`.

    `made` is M * W' in this dtype, if it is made already. With a mask of blocks A, B, R and C get their gradients,
    which need all of G, on the last of `options.interval` steps, and zeros on the others, as the watch of U's layer
    tells; U and V learn from kept blocks: Q = G * M * (1 + |W'|) with `through_magnitude`, else G * M. `producer` says
    how x can be made again (layers/recompute.py), so that it need not be kept.
    """
    weight, factors, mask, scales = operands
    made = NOTHING_MADE if made is None else made
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if dtype is not flat.dtype:
        flat = flat.to(dtype)
    given = flat, bias, weight, *factors, mask, *made, *tallied, scales, options, producer
    if not autocast_enabled(x.device.type):  # entering autocast costs as much as a small layer's forward
        if not torch.is_grad_enabled():
            y = _PSTLinear.forward(None, *given)
        elif options.kernels is not None:
            # What Function.apply does first is for the transforms of torch.func, which layers refuse.
            y = super(torch.autograd.Function, _PSTLinear).apply(*given)
        else:
            y = _PSTLinear.apply(*given)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = _PSTLinear.apply(*given)
    return y if x.dim() == 2 else in_dimensions_of(x, y)


def in_dimensions_of(x: Tensor, y: Tensor) -> Tensor:
    """y (T, out) as (..., out) for x (..., in): no view, which a caller must not write into under FSDP2, and nn.Linear
    returns none either.
    """
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])


def bias_gradient(gy: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over tokens, made in fp32 at least, in the bias's dtype."""
    return gy.sum(0, dtype=compute_dtype(gy.dtype)).to(dtype)


def check(x: Tensor, operands: MaskedWeight, bias: Tensor | None) -> None:
    """Raise ValueError or TypeError that names what does not fit."""
    weight, factors, mask, _ = operands
    factors.check(weight)
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype} but weight is {weight.dtype}; cast x with x.to({weight.dtype})")
    if x.dim() == 0:
        raise ValueError(f"x must be (..., {weight.shape[1]}) for weight {tuple(weight.shape)}, got a 0-d tensor")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} features in its last dimension, but weight {tuple(weight.shape)} takes"
            f" {weight.shape[1]}"
        )
    if mask.shape != (weight.shape[0], packed_width(weight.shape[1])) or mask.dtype != torch.int32:
        raise ValueError(
            f"mask must be packed, int32 of shape {(weight.shape[0], packed_width(weight.shape[1]))} for weight"
            f" {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}; make it with functional.prune_mask"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires grad, but PST keeps it frozen; call weight.requires_grad_(False)")
    for name, tensor in (("weight", weight), ("mask", mask), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move the layer or the input")
    if x.dtype != weight.dtype and not autocasts(x):
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}; cast x with x.to({weight.dtype}), or use torch.autocast"
        )


class _PSTLinear(torch.autograd.Function):
    """Forward and the hand-written straight-through backward; x is (T, in). Where no gradient is wanted, forward is
    called as it is, without a context.
    """

    # not setup_context(), for which torch binds the arguments by inspection at every call
    @staticmethod
    def forward(
        ctx: Any, x, bias, weight, U, V, A, B, R, C, mask, masked, values, offsets, pointers, waiting,
        moments, tally, scales, options, producer,
    ) -> Tensor:  # fmt: skip
        split, found = (None, None), None
        if values is not None:
            y = ops.sparse_forward(x, values, offsets, pointers, bias, weight.shape[0])
        elif masked is not None:
            y = linear(x, masked, bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype))
        elif options.kernels is not None and ops.goes_direct(x):
            x, operands = x.contiguous(), MaskedWeight(weight, Factors(U, V, A, B, R, C), mask, scales)
            if options.block_size is None:
                found = options.kernels.split_for(x, operands)
                y = options.kernels.linear_forward(x, operands, bias, found)
            else:
                found = options.kernels.block_split(x, operands)
                y = options.kernels.block_forward(x, operands, bias, options.block_size, found)
        elif options.block_size is not None:
            y = ops.block_forward(x.contiguous(), weight, U, V, A, B, R, C, mask, *scales, bias, options.block_size)
        else:
            y = ops.linear_forward(x.contiguous(), weight, U, V, A, B, R, C, mask, *scales, bias)
        split = split if found is None else found
        if ctx is not None:
            ctx.scales, ctx.options, ctx.bias_dtype = scales, options, None if bias is None else bias.dtype
            ctx.make, taken = (None, (x,)) if producer is None else producer
            made = masked if options.kept else None, values, offsets, pointers, moments
            ctx.save_for_backward(weight, U, V, A, B, R, C, mask, *made, *split, *taken)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        # read once: hooks on saved tensors may unpack each only once
        saved = ctx.saved_tensors
        weight, *factors, mask, masked, values, offsets, pointers, moments, left, right = saved[:15]
        options, taken, sums = ctx.options, saved[15:], None
        needs_input, needs_bias, _, *needs_factors = ctx.needs_input_grad[:9]
        learns = any(needs_factors)
        # contiguous(): the gradient of a sum has stride 0, that of a cat or a transpose has gaps
        with without_autocast(gy.device.type):
            x = taken[0] if ctx.make is None else ctx.make(*taken).to(gy.dtype).reshape(-1, weight.shape[1])
            gy_, x = gy.contiguous(), x.contiguous()
            flat = weight, *factors, mask, *ctx.scales
            split = None if left is None else (left, right)
            if options.block_size is not None and options.kernels is not None and ops.goes_direct(gy):
                operands = MaskedWeight(weight, Factors(*factors), mask, ctx.scales)
                dx, *found = _of_blocks(gy_, x, operands, options, Needs(needs_input, learns), split)
            elif options.block_size is not None:
                dx, *found = ops.block_backward(
                    gy_, x, *flat, options.block_size, options.interval, options.through_magnitude, needs_input, learns
                )  # fmt: skip
            else:
                needs = Needs(needs_input and masked is None and values is None, learns)
                if options.kernels is not None and (options.weighed or ops.goes_direct(gy)):
                    operands = MaskedWeight(weight, Factors(*factors), mask, ctx.scales)
                    dx, *found = options.kernels.linear_backward(
                        gy_, x, operands, options.through_magnitude, needs, split
                    )  # fmt: skip
                elif moments is not None and learns:
                    dx, *found, sums = ops.weighed_backward(gy_, x, *flat, options.through_magnitude, *needs, moments)
                else:
                    dx, *found = ops.linear_backward(gy_, x, *flat, options.through_magnitude, *needs)
                if masked is not None and needs_input:
                    dx = gy_ @ masked
                elif values is not None and needs_input:
                    dx, _ = ops.sparse_backward(gy_, x, values, offsets, pointers, weight.shape[1], True, False)
        dbias = bias_gradient(gy, ctx.bias_dtype) if needs_bias else None
        gradients = [
            None if not need else gradient if gradient.dtype is factor.dtype else gradient.to(factor.dtype)
            for gradient, factor, need in zip(found, factors, needs_factors, strict=True)
        ]
        return dx if needs_input else None, dbias, None, *gradients, *[None] * 7, sums, *[None] * 3


def _of_blocks(
    gy: Tensor, x: Tensor, operands: MaskedWeight, options: Options, needs: Needs, split: Any
) -> tuple[Tensor, ...]:
    """`ops.block_backward` past PyTorch's dispatch: with the split of the forward, and zeros that are parts of one
    tensor, as what an op returns may not be.
    """
    factors, size, through = operands.factors, options.block_size, options.through_magnitude
    found = options.kernels.kept_block_gradients(gy, x, operands, size, through, needs, split)
    if not needs.factors:
        return *found, *factors[2:]  # which nobody asks for
    if due.watch_of(factors.U).is_last_before_refresh(options.interval):
        return *found, *options.kernels.linear_backward(gy, x, operands, through, Needs(False, True))[3:]
    return *found, *zeros_at_once(factors[2:])


def masked_stack(
    operands: MaskedWeight, through_magnitude: bool, kept: Tensor | None = None, interval: int = 0
) -> Tensor:
    """M * W' of a stack of weights (experts, out, in), with the same straight-through gradient for its factors.

    In the weight's dtype. `kept` is M * W', if it is made already and stays as it is until the backward. With an
    `interval`, U and V learn from kept weights alone, and the scores on the last step before a mask of that interval.
    """
    weight, factors, mask, scales = operands
    return _MaskedStack.apply(weight, *factors, mask, kept, (*scales, through_magnitude, interval))


class _MaskedStack(torch.autograd.Function):
    """What `_PSTLinear` does to the weight alone: its gradient G comes from the products of others."""

    @staticmethod
    def forward(ctx: Any, weight, U, V, A, B, R, C, mask, kept, constants) -> Tensor:
        ctx.save_for_backward(weight, U, V, A, B, R, C, mask)
        ctx.constants = constants
        *scales, _, _ = constants
        return ops.masked_weight(weight, U, V, A, B, R, C, mask, *scales, weight.dtype) if kept is None else kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        *scales, through_magnitude, interval = ctx.constants
        needs = ctx.needs_input_grad[1:7]
        found = ops.stack_gradients(G, *operands, *scales, interval, through_magnitude)
        of_factors = zip(found, operands[1:7], needs, strict=True)
        gradients = [gradient.to(factor.dtype) if need else None for gradient, factor, need in of_factors]
        return None, *gradients, *[None] * 3


def operand_dtype(x: Tensor) -> torch.dtype:
    """What the product is computed in: x's own dtype, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def autocasts(x: Tensor) -> bool:
    return x.dtype != torch.float64 and autocast_enabled(x.device.type)


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
