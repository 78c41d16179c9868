"""Arguments for every op: what PyTorch's own checks of an op are run with, on a CPU and on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from oracle import make_problem
from torch import Tensor

from pst_kernels import functional, ops


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(name of the op, arguments), every op at least once."""
    weight, factors = make_problem(12, 40, weight_dtype=dtype, factor_dtype=torch.float32)
    weight, factors = weight.to(device), [factor.to(device) for factor in factors]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(weight)

    def count(value: int) -> Tensor:
        return torch.tensor(value, device=device)

    packed, scales = functional.prune_mask(weight, *factors, 200), (1.0, 0.5, 2.0)
    x, gy, bias = normal(6, 40), normal(6, 12), torch.randn(12).to(device)
    new = functools.partial(functional.new_guess, weight.device)
    yield "scores", (weight, *factors, *scales)
    yield "kth_value", (torch.randn(50, device=device), 20)
    weights = (weight, *factors, *scales)
    blocks = ops.prune_mask(*weights, count(1), new(), "block:16")
    for pattern, pruned, mask in (("unstructured", count(200), packed), ("block:16", count(1), blocks)):
        yield "prune_mask", (*weights, pruned, new(), pattern)
        yield "refresh_mask", (*weights, pruned, mask.clone(), new(), 1, pattern)
    unstructured, of_blocks = ((weight, *factors, mask, *scales) for mask in (packed, blocks))
    yield "masked_weight", (*unstructured, dtype)
    moments = torch.rand(52, device=device)
    yield "refresh_weighed_mask", (*weights, count(200), packed.clone(), new(), 1, "unstructured", moments)
    stack = weight.repeat(2, 1, 1), *(factor.repeat(2, *[1] * factor.dim()) for factor in factors)
    masks = packed.repeat(2, 1, 1)
    yield "refresh_mask", (*stack, *scales, count(200), masks.clone(), new().repeat(2, 1), 1, "unstructured")
    yield "masked_weight", (stack[0].mT.contiguous().mT, *stack[1:], masks, *scales, dtype)
    yield "stack_gradients", (torch.randn_like(stack[0]), *stack, masks, *scales, 0, True)
    yield "linear_forward", (x, *unstructured, bias)
    yield "linear_forward", (x, *unstructured, None)
    for needs_input, needs_factors in ((True, True), (False, True), (True, False)):
        yield "linear_backward", (gy, x, *unstructured, True, needs_input, needs_factors)
        yield "weighed_backward", (gy, x, *unstructured, True, needs_input, needs_factors, moments)
    for through, *needs in ((True, True, True), (False, True, True), (True, False, True), (True, True, False)):
        yield "rested_backward", (gy, x, *unstructured, through, *needs)
    yield "block_forward", (x, *of_blocks, bias, 16)
    for interval in (1, 2):  # the scores learn, or not
        yield "block_backward", (gy, x, *of_blocks, 16, interval, True, True, True)
    kept, rows, columns = normal(2, 16, 16), torch.tensor([0, 2]).to(device), torch.tensor([0, 2]).to(device)
    yield "kept_blocks_forward", (x, kept, bias.to(dtype), rows, columns, 12)
    yield "kept_blocks_backward", (gy, kept, rows, columns, 40)
    offsets, pointers = torch.tensor([0, 39, 5], dtype=torch.uint8), torch.tensor([0, 2] + 11 * [3]).int()
    lists = normal(3), offsets.to(device), pointers.to(device)
    yield "sparse_forward", (x, *lists, bias, 12)
    yield "sparse_backward", (gy, x, *lists, 40, True, True)
