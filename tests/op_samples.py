"""Arguments for every op: what PyTorch's own checks of an op are run with, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from oracle import make_problem

from pst_kernels import functional, ops
from pst_kernels.masks import due as refresh


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(name of the op, arguments), every op at least once."""
    weight, factors = make_problem(12, 40, weight_dtype=dtype, factor_dtype=torch.float32)
    weight, factors = weight.to(device), [factor.to(device) for factor in factors]
    U, V, A, B, _R, _C = factors
    packed = functional.prune_mask(weight, *factors, 200)
    num_pruned, one = torch.tensor(200, device=device), torch.tensor(1, device=device)
    scales, bias = (1.0, 0.5, 2.0), torch.randn(12, device=device)
    x, gy = torch.randn(6, 40).to(weight), torch.randn(6, 12).to(weight)
    yield "scores", (weight, *factors, *scales)
    yield "kth_value", (torch.randn(50, device=device), 20)
    yield "prune_mask", (weight, *factors, num_pruned, functional.new_guess(weight.device), *scales)
    seen = refresh.never_seen(8)
    yield (
        "refresh_mask",
        (weight, *factors, num_pruned, packed.clone(), functional.new_guess(weight.device), seen, 1, *scales),
    )
    yield "pattern_mask", (weight, *factors, one, "block:16", *scales)
    blocks = ops.pattern_mask(weight, *factors, one, "block:16", *scales)
    yield "refresh_pattern_mask", (weight, *factors, one, blocks, seen, 1, "block:16", *scales)
    yield "is_last_before_refresh", (refresh.never_seen(8), 16)
    yield "masked_weight", (weight, U, V, packed, 1.0, dtype)
    yield "linear_forward", (x, weight, U, V, bias, packed, 1.0)
    yield "linear_forward", (x, weight, U, V, None, packed, 1.0)
    for needs_input, needs_factors in ((True, True), (False, True), (True, False)):
        yield "linear_backward", (gy, x, weight, U, V, A, B, packed, *scales, True, needs_input, needs_factors)
    yield "block_forward", (x, weight, U, V, bias, blocks, 1.0, 16)
    for learn in (True, False):
        yield "block_backward", (gy, x, weight, U, V, A, B, blocks, torch.tensor(learn), *scales, True, 16, True, True)
