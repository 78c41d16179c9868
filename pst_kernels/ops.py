"""The ops: schemas, shapes and dtypes, and which backend runs them. The only file that knows backends.

Every op takes a weight (out, in) of any strides in fp32, fp16, bf16 or float64, factors U (out, r1), V (r1, in),
A (out, r2), B (r2, in), R (out,), C (in,) in any floating dtype, contiguous x (T, in) and gy (T, out), and a packed
mask (int32, see packing.py). `guess` is fp32 (4,): where the last threshold lay, NaN at first; the ops may update it.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import env
from .cpu import block_matmul as blocks
from .cpu import ops as fallback
from .cpu.row_blocks import compute_dtype
from .masks import due as refresh
from .masks import patterns
from .masks.packing import pack_mask, packed_width

logger = logging.getLogger("pst_kernels")
NAMESPACE = "pst_kernels"
_WEIGHT = "Tensor weight, Tensor U, Tensor V"
_FACTORS = _WEIGHT + ", Tensor A, Tensor B, Tensor R, Tensor C"
_SCALES = "float beta, float alpha1, float alpha2"
NAMES: list[str] = []  # of every op, filled by _define
_library = torch.library.Library(NAMESPACE, "DEF")


def backend_for(device_type: str) -> tuple[str, str]:
    """The backend for tensors on a device, and why. Raises ImportError when an explicit request cannot be met."""
    requested = env.backend()
    if requested == "torch":
        return "torch", "PST_KERNELS_BACKEND=torch"
    if requested == "triton":
        if not env.has_triton():
            raise ImportError(
                "PST_KERNELS_BACKEND=triton, but triton is not installed; install it or unset the variable"
            )
        return "triton", "PST_KERNELS_BACKEND=triton"
    if device_type != "cuda":
        return "torch", f"no kernels for {device_type} tensors"
    if not env.has_triton():
        return "torch", "triton is not installed"
    return "triton", "CUDA tensors and triton is installed"


def _implementation(device_type: str) -> ModuleType:
    backend, reason = backend_for(device_type)
    if backend == "triton":
        from . import triton as kernels

        return kernels
    if device_type == "cuda" and env.backend() == "auto":
        _say_once(f"pst_kernels runs in plain PyTorch on the GPU, slowly: {reason}")
    return fallback


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _define(name: str, arguments: str, returns: str, fake: Any, run: Any = None, device_of: int = 0) -> None:
    """Register an op for every device; `run` replaces the dispatch to a backend."""

    @torch.no_grad()
    def dispatch(*args: Any) -> Any:
        return getattr(_implementation(args[device_of].device.type), name)(*args)

    NAMES.append(name)
    _library.define(f"{name}({arguments}) -> {returns}")
    _library.impl(name, run or dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _accumulate(weight: Tensor, *shapes: tuple) -> tuple[Tensor, ...]:
    dtype = compute_dtype(weight.dtype)
    return tuple(weight.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_mask(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((weight.shape[0], packed_width(weight.shape[1])), dtype=torch.int32)


def _fake_backward(gy, x, weight, U, V, A, B, mask, beta, alpha1, alpha2, through, needs_input, needs_factors):
    dx = x.new_empty(x.shape if needs_input else 0)
    if not needs_factors:
        return dx, *_accumulate(weight, *[(0,)] * 6)
    return dx, *_accumulate(weight, U.shape, V.shape, A.shape, B.shape, weight.shape[:1], weight.shape[1:])


@torch.no_grad()
def refresh_with_weight(
    x: Tensor, dtype: torch.dtype,
    weight, U, V, A, B, R, C, num_pruned, mask, guess, seen, interval, beta, alpha1, alpha2,
) -> Tensor | None:  # fmt: skip
    """`refresh_mask` in front of a forward of x: where the mask is due, M * W' comes from the same pass.

    Returns it in `dtype`, in a scratch buffer that the next layer overwrites; None where the mask was not due, where
    the forward has no use for it, and where only the op can do it: under a compiler and for tensors of other kinds.
    """
    factors = (weight, U, V, A, B, R, C)
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, torch.nn.Parameter) or not x.is_floating_point():
        refresh_mask(*factors, num_pruned, mask, guess, seen, interval, beta, alpha1, alpha2)
        return None
    if not refresh.is_due(seen, num_pruned, factors, interval):
        return None
    if any(t.device != weight.device for t in (x, *factors)):
        refresh.mark_stale(seen)  # the forward is about to say which tensor has to be moved
        return None
    kernels = _implementation(weight.device.type)
    tokens = x.numel() // max(1, x.shape[-1]) if x.dim() else 0
    masked = kernels.forward_scratch(tokens, dtype, weight, V.shape[0])
    mask.copy_(kernels.prune_mask(*factors, num_pruned, guess, beta, alpha1, alpha2, masked))
    return masked


@torch.no_grad()
def _refresh_mask(weight, U, V, A, B, R, C, num_pruned, mask, guess, seen, interval, beta, alpha1, alpha2) -> None:
    factors = (weight, U, V, A, B, R, C)
    if refresh.is_due(seen, num_pruned, factors, interval):
        mask.copy_(prune_mask(*factors, num_pruned, guess, beta, alpha1, alpha2))


def _pattern_mask(weight, U, V, A, B, R, C, num_pruned, pattern, beta, alpha1, alpha2) -> Tensor:
    count = int(num_pruned) if num_pruned.device.type == "cpu" else num_pruned
    if isinstance(count, int) and count == 0:
        return pack_mask(torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
    return pack_mask(patterns.parse(pattern).keep(scores(weight, U, V, A, B, R, C, beta, alpha1, alpha2), count))


@torch.no_grad()
def _refresh_pattern_mask(
    weight, U, V, A, B, R, C, num_pruned, mask, seen, interval, pattern, beta, alpha1, alpha2
) -> None:  # fmt: skip
    factors = (weight, U, V, A, B, R, C)
    if refresh.is_due(seen, num_pruned, factors, interval):
        mask.copy_(_pattern_mask(*factors, num_pruned, pattern, beta, alpha1, alpha2))


@torch.no_grad()
def _block_forward(x, weight, U, V, bias, mask, beta, size) -> Tensor:
    kernels = _implementation(x.device.type)
    forward = blocks.linear_forward if kernels is fallback else kernels.block_forward
    return forward(x, weight, U, V, bias, mask, beta, size)


@torch.no_grad()
def _block_backward(
    gy, x, weight, U, V, A, B, mask, learn, beta, alpha1, alpha2, through_magnitude, size, needs_input, needs_factors
):  # fmt: skip
    kernels = _implementation(gy.device.type)
    backward = blocks.linear_backward if kernels is fallback else kernels.block_backward
    by_blocks = backward(gy, x, weight, U, V, mask, beta, through_magnitude, size, needs_input, needs_factors)
    if needs_factors and bool(learn):
        scales = (beta, alpha1, alpha2)
        whole = linear_backward(gy, x, weight, U, V, A, B, mask, *scales, through_magnitude, False, True)
        return *by_blocks, *whole[3:]
    shapes = (A.shape, B.shape, weight.shape[:1], weight.shape[1:]) if needs_factors else [(0,)] * 4
    return *by_blocks, *(weight.new_zeros(shape, dtype=compute_dtype(weight.dtype)) for shape in shapes)


def _fake_block_backward(
    gy, x, weight, U, V, A, B, mask, learn, beta, alpha1, alpha2, through, size, needs_input, needs_factors
):  # fmt: skip
    return _fake_backward(gy, x, weight, U, V, A, B, mask, beta, alpha1, alpha2, through, needs_input, needs_factors)


_define(
    "scores", f"{_FACTORS}, {_SCALES}", "Tensor", lambda weight, *_: weight.new_empty(weight.shape, dtype=torch.float32)
)
_define(
    "kth_value", "Tensor scores, SymInt k", "(Tensor, Tensor)",
    lambda scores, k: (scores.new_empty(()), scores.new_empty((), dtype=torch.int64)),
)  # fmt: skip
_define("prune_mask", f"{_FACTORS}, Tensor num_pruned, Tensor(a!) guess, {_SCALES}", "Tensor", _fake_mask)
_define(
    "refresh_mask",
    f"{_FACTORS}, Tensor num_pruned, Tensor(a!) mask, Tensor(b!) guess, Tensor(c!) seen, SymInt interval, {_SCALES}",
    "()", lambda *_: None, run=_refresh_mask,
)  # fmt: skip
_define(
    "masked_weight", f"{_WEIGHT}, Tensor mask, float beta, ScalarType dtype", "Tensor",
    lambda weight, U, V, mask, beta, dtype: weight.new_empty(weight.shape, dtype=dtype),
)  # fmt: skip
_define(
    "linear_forward", f"Tensor x, {_WEIGHT}, Tensor? bias, Tensor mask, float beta", "Tensor",
    lambda x, weight, U, V, bias, mask, beta: x.new_empty((x.shape[0], weight.shape[0])),
)  # fmt: skip
_define(
    "linear_backward",
    f"Tensor gy, Tensor x, {_WEIGHT}, Tensor A, Tensor B, Tensor mask, {_SCALES}, bool through_magnitude,"
    " bool needs_input, bool needs_factors",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_backward,
)  # fmt: skip
_define(
    "pattern_mask", f"{_FACTORS}, Tensor num_pruned, str pattern, {_SCALES}", "Tensor", _fake_mask, run=_pattern_mask
)
_define(
    "refresh_pattern_mask",
    f"{_FACTORS}, Tensor num_pruned, Tensor(a!) mask, Tensor(b!) seen, SymInt interval, str pattern, {_SCALES}",
    "()", lambda *_: None, run=_refresh_pattern_mask,
)  # fmt: skip
_define(
    "is_last_before_refresh", "Tensor seen, SymInt interval", "Tensor",
    lambda seen, interval: seen.new_empty((), dtype=torch.bool),
    run=lambda seen, interval: torch.tensor(refresh.is_last_before_refresh(seen, interval), device="cpu"),
)  # fmt: skip
_define(
    "block_forward", f"Tensor x, {_WEIGHT}, Tensor? bias, Tensor mask, float beta, int size", "Tensor",
    lambda x, weight, U, V, bias, mask, beta, size: x.new_empty((x.shape[0], weight.shape[0])), run=_block_forward,
)  # fmt: skip
_define(
    "block_backward",
    f"Tensor gy, Tensor x, {_WEIGHT}, Tensor A, Tensor B, Tensor mask, Tensor learn, {_SCALES}, bool through_magnitude,"
    " int size, bool needs_input, bool needs_factors",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_block_backward, run=_block_backward,
)  # fmt: skip

_ops = getattr(torch.ops, NAMESPACE)
scores = _ops.scores.default
kth_value = _ops.kth_value.default
prune_mask = _ops.prune_mask.default
refresh_mask = _ops.refresh_mask.default
masked_weight = _ops.masked_weight.default
linear_forward = _ops.linear_forward.default
linear_backward = _ops.linear_backward.default
pattern_mask = _ops.pattern_mask.default
refresh_pattern_mask = _ops.refresh_pattern_mask.default
is_last_before_refresh = _ops.is_last_before_refresh.default
block_forward = _ops.block_forward.default
block_backward = _ops.block_backward.default
