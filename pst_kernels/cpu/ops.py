"""The ops for CPUs, and for any device that has no Triton.

On CPUs the passes over W are compiled (compiled/). Where those do not serve, they are PyTorch's and NumPy's operators
on a block of rows at a time, small enough to stay in cache, and used up there (row_blocks.py). For the library's GEMM
the masked weight is written into a scratch buffer. W' and S are computed in fp32 (in float64 for a float64 weight); a
mask is decided by fp32 scores. Small weights go their own way (small.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..env import cpu as requested
from ..masks.guess import SAMPLE, Bracket, Guess, sample_bracket
from ..masks.packing import pack_mask
from ..operands import Factors, MaskedWeight, Needs, Scales, Weighing, compute_dtype
from . import block_matmul, scratch, small
from .compiled import module, passes_for
from .row_blocks import GEMM_ROWS, ScoreRows, UpdatedRows, multiply_into, row_blocks
from .select import ChunkedScores, select

CHUNK = 1 << 18  # scores that `kth_value` looks at together: they may as well stay in a core's own cache
# integers as wide as a dtype, to write zeros with: NumPy has no bf16
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def widened(columns: Tensor) -> Tensor:
    """(n, r) with r padded by zeros to a multiple of 16: the library multiplies by 16 columns faster than by 8 or 9."""
    return pad(columns, (0, -columns.shape[1] % 16))


def is_small(weight: Tensor) -> bool:
    """Whether a few operators serve best; not where the variable asks for one of the other ways."""
    return small.serves(weight) and requested() == "auto"


def scores(weight: Tensor, factors: Factors, scales: Scales) -> Tensor:
    if is_small(weight):
        return small.scores(weight, factors, scales)
    if (passes := passes_for(weight)) is not None:
        return passes.scores(weight, factors, scales)
    by_rows = ScoreRows(weight, factors, scales)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows in by_rows.rows.blocks():
        updated = by_rows.rows.updated(rows)
        out[rows] = by_rows.of(updated, rows, out=updated)
    return out


def kth_value(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    flat = scores.reshape(-1)
    if scores.device.type != "cpu":
        values, index = torch.sort(flat, stable=True)
        return values[k - 1], index[k - 1]
    flat = flat.contiguous()
    array, many = flat.numpy(), flat.numel() > 4 * SAMPLE
    passes: Any = module("flat_scores", "looks for the k-th score with NumPy") if many else None

    def chunks() -> Iterator[tuple[int, np.ndarray]]:
        return ((start, array[start : start + CHUNK]) for start in range(0, array.size, CHUNK))

    def brackets() -> Iterator[Bracket | None]:
        if many:
            # as many as make finding them and searching what is inside the bracket cost alike
            sample = np.random.default_rng(0).integers(array.size, size=max(SAMPLE, array.size // 256))
            yield sample_bracket(array[sample], k / array.size)

    look = None if passes is None else lambda bracket: passes.gather(flat, bracket, scratch.get)
    chosen = select(ChunkedScores(chunks, look=look), array.size, k, brackets())
    return torch.tensor(chosen.value, dtype=scores.dtype), torch.tensor(chosen.index)


def prune_mask(
    weight: Tensor, factors: Factors, scales: Scales, num_pruned: Tensor, guess: Tensor, masked: Tensor | None = None
) -> Tensor:
    """The packed mask; on a CPU also M * W' into `masked` (out, in), in the dtype that it has, from the same pass."""
    k, numel = int(num_pruned), weight.numel()
    if k == 0:
        everything = pack_mask(torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        if masked is not None:
            _masked_into(masked, MaskedWeight(weight, factors, everything, scales))
        return everything
    if weight.device.type != "cpu":
        everything = scores(weight, factors, scales).view(-1)
        kept = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        kept.view(-1)[torch.sort(everything, stable=True).indices[:k]] = False
        return pack_mask(kept)
    if is_small(weight):
        return small.prune_mask(weight, factors, scales, k, masked)
    last = Guess.load(guess)

    def brackets() -> Iterator[Bracket | None]:
        yield last.bracket(k / numel)
        if numel > 4 * SAMPLE:
            yield sample_bracket(ScoreRows(weight, factors, scales).sample(SAMPLE), k / numel)

    passes = passes_for(weight, None if masked is None else masked.dtype)
    if passes is not None:
        compiled = passes.CompiledScores(weight, factors, scales, masked, scratch.get)
        last.update(guess, select(compiled, numel, k, brackets()), k / numel)
        return compiled.packed
    by_rows = ScoreRows(weight, factors, scales)
    kept = scratch.get("kept", weight.shape, torch.bool, weight.device)
    zeroed = None if masked is None else masked.view(_INTEGER[masked.element_size()]).view(-1).numpy()
    search = ChunkedScores(lambda: by_rows.blocks(kept, masked), kept.view(-1).numpy(), zeroed)
    last.update(guess, select(search, numel, k, brackets()), k / numel)
    return pack_mask(kept)


def forward_scratch(tokens: int, dtype: torch.dtype, weight: Tensor, rank: int) -> Tensor | None:
    """Where `prune_mask` may put M * W' for the forward that follows; None where it cannot."""
    if weight.device.type != "cpu" or (passes_for(weight) is not None and passes_for(weight, dtype) is None):
        return None
    return _masked_buffer(weight, dtype)


def _masked_buffer(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return scratch.get("masked", weight.shape, dtype, weight.device)


def _masked_into(out: Tensor, operands: MaskedWeight) -> Tensor:
    weight, factors, mask, scales = operands
    if is_small(weight):
        return small.masked_into(out, operands)
    passes = passes_for(weight, out.dtype)
    if passes is not None:
        return passes.masked_into(out, operands)
    return UpdatedRows(weight, factors, scales).masked_into(out, mask)


def masked_weight(operands: MaskedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(operands.weight.shape, dtype=dtype, device=operands.weight.device)
    return _masked_into(out, operands)


def split_for(x: Tensor, operands: MaskedWeight) -> None:
    """What both products of a step take beside M * W': nothing."""


def linear_forward(x: Tensor, operands: MaskedWeight, bias: Tensor | None, split: None = None) -> Tensor:
    masked = _masked_into(_masked_buffer(operands.weight, x.dtype), operands)
    return linear(x, masked, None if bias is None else bias.to(x.dtype))


def linear_backward(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs: Needs, split: None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx and the six factor gradients from one pass over G = gy^T x, of which a group of rows exists at a time.

    With D = G * W' and Q = G * (M + |W'|), every factor gradient is a low-rank reduction of D or Q.
    """
    weight = operands.weight
    masked = _masked_buffer(weight, gy.dtype) if needs.input else None
    if not needs.factors:
        dx = gy.new_empty(0) if masked is None else gy @ _masked_into(masked, operands)
        return dx, *operands.factors.map(lambda factor: factor.new_empty(0, dtype=compute_dtype(weight.dtype)))
    if is_small(weight):
        dx = gy.new_empty(0) if masked is None else gy @ small.masked_into(masked, operands)
        return dx, *small.factor_gradients(gy, x, operands, through_magnitude)
    gradients = _gradients(gy, x, operands, through_magnitude, masked)
    return gy @ masked if masked is not None else gy.new_empty(0), *gradients


def weighed_backward(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, needs_input: bool, weighing: Weighing
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_backward` where the score weighs |W'|: Q = G * (M + p |W'| q)."""
    masked = _masked_buffer(operands.weight, gy.dtype) if needs_input else None
    gradients = _gradients(gy, x, operands, through_magnitude, masked, weighing)
    return gy @ masked if masked is not None else gy.new_empty(0), *gradients


def block_backward(
    gy: Tensor, x: Tensor, operands: MaskedWeight, size: int, learn_scores: bool, through_magnitude: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dU and dV from kept blocks of G; the scores' gradients from all of G, or zeros."""
    dx, dU, dV = block_matmul.kept_block_gradients(gy, x, operands, size, through_magnitude, needs)
    if needs.factors and learn_scores:
        return dx, dU, dV, *linear_backward(gy, x, operands, through_magnitude, Needs(False, True))[3:]
    dA, dB, dR, dC = (
        factor.new_zeros(factor.shape if needs.factors else (0,), dtype=compute_dtype(operands.weight.dtype))
        for factor in operands.factors[2:]
    )
    return dx, dU, dV, dA, dB, dR, dC


def _gradients(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, masked: Tensor | None,
    weighing: Weighing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """By the compiled passes where they take these tensors, in PyTorch elsewhere; `masked` gets M * W'."""
    passes = passes_for(operands.weight, gy.dtype)
    if passes is None:
        return _factor_gradients(gy, x, operands, through_magnitude, masked, weighing)
    return passes.factor_gradients(gy, x, operands, through_magnitude, masked, GEMM_ROWS, scratch.get, weighing)


def _factor_gradients(
    gy: Tensor, x: Tensor, operands: MaskedWeight, through_magnitude: bool, masked: Tensor | None,
    weighing: Weighing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The six factor gradients; `masked` gets M * W'."""
    weight, factors, mask, (beta, alpha1, alpha2) = operands
    by_rows = UpdatedRows(weight, factors, operands.scales)
    U, V, A, B = by_rows.U, by_rows.V, factors.A.to(by_rows.dtype), factors.B.to(by_rows.dtype)
    # A column of ones beside B gives dR with dA, one beside A gives dC with dB.
    AR, BC = pad(A, (0, 1), value=1.0), pad(B, (0, 0, 0, 1), value=1.0)
    right_of_D, right_of_Q = widened(BC.T), widened(V.T)
    dAR, dU = A.new_empty(len(A), right_of_D.shape[1]), U.new_empty(len(U), right_of_Q.shape[1])
    dBC, dV = torch.zeros_like(BC), torch.zeros_like(V)
    product = by_rows.buffer("product")
    group_rows = -(-min(GEMM_ROWS, by_rows.out) // by_rows.step) * by_rows.step
    group_of_G = scratch.get("gradient", (group_rows, by_rows.columns), gy.dtype, gy.device)
    for group in row_blocks(0, by_rows.out, group_rows):
        gradient = torch.mm(gy[:, group].T, x, out=group_of_G[: group.stop - group.start])
        for rows in by_rows.blocks(group.start, group.stop):
            updated, flags = by_rows.updated(rows), by_rows.flags(mask, rows)
            if masked is not None:
                multiply_into(masked[rows], updated, flags, work=product)
            G = gradient[rows.start - group.start : rows.stop - group.start].to(by_rows.dtype)
            D = torch.mul(G, updated, out=product[: len(G)])
            torch.mm(D, right_of_D, out=dAR[rows])
            dBC.addmm_(AR[rows].T, D)
            magnitude = updated.abs_()
            if weighing is not None:
                magnitude.mul_(weighing.p[rows]).mul_(weighing.q)
                squares = torch.square(G, out=D)
                weighing.of_rows[rows] = squares.sum(1)
                weighing.of_columns.add_(squares.sum(0))
            Q = torch.mul(G, flags.add_(magnitude) if through_magnitude else flags, out=D)
            torch.mm(Q, right_of_Q, out=dU[rows])
            dV.addmm_(U[rows].T, Q)
    rank = len(B)
    dA, dR, dB, dC = dAR[:, :rank] * alpha1, dAR[:, rank] * alpha2, dBC[:rank] * alpha1, dBC[rank] * alpha2
    return dU[:, : len(V)] * beta, dV.mul_(beta), dA, dB, dR, dC
