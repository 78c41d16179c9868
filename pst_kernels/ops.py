"""The ops as PyTorch sees them: schemas, fakes and registration of every op, and the room that runs each.

Every op takes a weight (out, in) of any strides in fp32, fp16, bf16 or float64, factors in any floating dtype (see
operands.py), contiguous x (T, in) and gy (T, out), and a packed mask (see masks/packing.py). `guess` is fp32 (4,):
where the last threshold lay, NaN at first; the ops may update it. cpu/ and triton/ export functions of the ops' names,
which take the operands as named tuples where a schema is flat.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, env
from .cpu import kept_blocks, kept_weights, stacks
from .masks import due
from .masks.packing import packed_width
from .masks.patterns import parse
from .masks.refresh import MaskState, Weights, refresh
from .notices import say_once
from .operands import Factors, MaskedWeight, Needs, Scales, compute_dtype, factor_shapes
from .weighing import WeighedRoom

NAMESPACE = "pst_kernels"
NAMES: list[str] = []  # of every op, filled by _define
_library = torch.library.Library(NAMESPACE, "DEF")


def kernels_for(device_type: str) -> ModuleType:
    """The room whose functions run the ops on a device: cpu/, which takes any device, or triton/."""
    backend, reason = env.backend_for(device_type)
    if backend == "triton":
        from . import triton

        return triton
    if device_type == "cuda" and env.backend() == "auto":
        say_once(f"pst_kernels runs in plain PyTorch on the GPU, slowly: {reason}")
    return cpu


def goes_direct(tensor: Tensor) -> bool:
    """Whether a room may be called with plain tensors past PyTorch's dispatch: nobody watches or replaces what goes
    through it, and the tensor is what it seems. Dispatch costs as much as a launch.
    """
    return (
        type(tensor) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd.profiler._is_profiler_enabled  # which shows the ops by name
    )


_PLAIN = (Tensor, torch.nn.Parameter)


class _Group(NamedTuple):
    """Neighbouring arguments of a schema that are one operand in Python."""

    schema: str
    make: Callable[..., Any]

    @property
    def size(self) -> int:
        return self.schema.count(",") + 1


_TENSORS = ", ".join(f"Tensor {name}" for name in Factors._fields)
_NUMBERS = ", ".join(f"float {name}" for name in Scales._fields)
FACTORS, SCALES = _Group(_TENSORS, Factors), _Group(_NUMBERS, Scales)
MASKED_WEIGHT = _Group(f"Tensor weight, {_TENSORS}, Tensor mask, {_NUMBERS}", MaskedWeight.of)
NEEDS = _Group("bool needs_input, bool needs_factors", Needs)
MASK_STATE = _Group("Tensor num_pruned, Tensor(a!) mask, Tensor(b!) guess, SymInt interval, str pattern", MaskState)


def autocast_enabled(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # which refuses to answer for meta


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else contextlib.nullcontext()


# What such an op does differs from call to call by what the host knows: a captured graph must leave it out, as
# torch.compile's does from PyTorch 2.9 on.
HOST_DECIDES = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


def _define(
    name: str, arguments: Sequence[str | _Group], returns: str, fake: Any, run: Any = None, tags: tuple[Any, ...] = ()
) -> None:  # fmt: skip
    """Register an op for every device. Its fake and its room's function take groups as one argument each.

    `run(kernels, ...)` stands in for the function of the op's name in the room.
    """
    slots: list[tuple[Callable[..., Any] | None, int, int]] = []  # (what makes the operand, first, end)
    for argument in arguments:
        first = slots[-1][2] if slots else 0
        size, make = (argument.size, argument.make) if isinstance(argument, _Group) else (1, None)
        slots.append((make, first, first + size))

    def operands(flat: tuple[Any, ...]) -> list[Any]:
        return [flat[first] if make is None else make(*flat[first:end]) for make, first, end in slots]

    @torch.no_grad()
    def dispatch(*flat: Any) -> Any:
        device_type = flat[0].device.type
        kernels = kernels_for(device_type)
        with without_autocast(device_type):  # dtypes are chosen by the schemas' own rule
            return getattr(kernels, name)(*operands(flat)) if run is None else run(kernels, *operands(flat))

    NAMES.append(name)
    schema = ", ".join(argument.schema if isinstance(argument, _Group) else argument for argument in arguments)
    _library.define(f"{name}({schema}) -> {returns}", tags=tags)
    _library.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *flat: fake(*operands(flat)), lib=_library)


def _fake_backward(gy: Tensor, x: Tensor, operands: MaskedWeight, *rest: Any) -> tuple[Tensor, ...]:
    weight, factors, (*_, needs) = operands.weight, operands.factors, rest
    ranks = factors.weight_rank, factors.score_rank
    shapes = factor_shapes((weight.shape[0], weight.shape[1]), *ranks) if needs.factors else [(0,)] * 6
    dtype = compute_dtype(weight.dtype)
    return x.new_empty(x.shape if needs.input else 0), *(weight.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_weighed_backward(gy, x, operands, through_magnitude, needs, moments):
    sums = moments.new_empty(sum(operands.weight.shape) + 1 if needs.factors else 0, dtype=torch.float32)
    return *_fake_backward(gy, x, operands, through_magnitude, needs), sums


def _fake_rested_backward(gy, x, operands, _, needs):
    weight = operands.weight
    shapes = ((n.shape if needs.factors else (0,)) for n in operands.factors[:2])
    dtype = compute_dtype(weight.dtype)
    return x.new_empty(x.shape if needs.input else 0), *(weight.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_sparse_backward(gy, x, values, offsets, pointers, in_features, needs_input, needs_values):
    dx = gy.new_empty((gy.shape[0], in_features) if needs_input else 0)
    return dx, values.new_empty(values.shape if needs_values else 0, dtype=compute_dtype(values.dtype))


def _block_backward(kernels, gy, x, operands, size, interval, through_magnitude, needs):
    """Whether the scores learn is a counter's word, asked here: a graph carries no tensor of the host's for it."""
    learns = due.watch_of(operands.factors.U).is_last_before_refresh(interval)
    return kernels.block_backward(gy, x, operands, size, learns, through_magnitude, needs)


def _stack_gradients(gradient, operands, interval, through_magnitude):
    """With no interval the scores learn on every step."""
    learns = not interval or due.watch_of(operands.factors.U).is_last_before_refresh(interval)
    return stacks.factor_gradients(gradient, operands, learns, interval != 0, through_magnitude)


def sparse_product(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    """The op sparse_forward past PyTorch's dispatch, for a caller who has turned autocast off."""
    if x.is_cpu and env.backend() != "triton":  # the way that counts: the next line takes twice as long
        return kept_weights.forward(x, values, *rest)
    return _sparse_forward(kernels_for(x.device.type), x, values, *rest)


def _sparse_forward(kernels: ModuleType, x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    if kernels is cpu or not kernels.takes_sparse(x, values):
        return kept_weights.forward(x, values, *rest)
    return kernels.sparse_forward(x, values, *rest)


def _sparse_backward(kernels: ModuleType, gy: Tensor, x: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    offsets, pointers, in_features, needs_input, needs_values = rest
    if kernels is cpu or not kernels.takes_sparse(gy, values):
        return kept_weights.backward(gy, x, values, *rest)
    lists = values, offsets, pointers
    dx = kernels.sparse_input_gradient(gy, *lists, in_features) if needs_input else gy.new_empty(0)
    return dx, kept_weights.backward(gy, x, *lists, in_features, False, needs_values)[1]


def _refresh(kernels: Any, weights: Weights, state: MaskState) -> None:
    refresh(kernels, weights, state, due.watch_of(weights.factors.U))


_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # dx, and the gradients of the factors

_define(
    "scores", ["Tensor weight", FACTORS, SCALES], "Tensor",
    lambda weight, *_: weight.new_empty(weight.shape, dtype=torch.float32),
)  # fmt: skip
_define(
    "kth_value", ["Tensor scores", "SymInt k"], "(Tensor, Tensor)",
    lambda scores, k: (scores.new_empty(()), scores.new_empty((), dtype=torch.int64)),
)  # fmt: skip
_define(
    "prune_mask", ["Tensor weight", FACTORS, SCALES, "Tensor num_pruned", "Tensor(a!) guess", "str pattern"], "Tensor",
    lambda weight, *_: weight.new_empty((weight.shape[0], packed_width(weight.shape[1])), dtype=torch.int32),
    run=lambda kernels, *operands: parse(operands[-1]).prune(kernels, *operands[:-1]),
)  # fmt: skip
_define(
    "refresh_mask", ["Tensor weight", FACTORS, SCALES, MASK_STATE], "()", lambda *_: None,
    run=lambda kernels, weight, factors, scales, state: _refresh(kernels, Weights(weight, factors, scales), state),
)  # fmt: skip
_define(
    "refresh_weighed_mask", ["Tensor weight", FACTORS, SCALES, MASK_STATE, "Tensor moments"], "()", lambda *_: None,
    run=lambda kernels, weight, factors, scales, state, moments: _refresh(
        WeighedRoom(kernels, lambda: moments), Weights(weight, factors, scales), state
    ),
)  # fmt: skip
_define(
    "masked_weight", [MASKED_WEIGHT, "ScalarType dtype"], "Tensor",
    lambda operands, dtype: stacks.room(operands.weight, dtype),
    run=lambda kernels, operands, dtype: stacks.masked_weight(kernels, operands, dtype),
)  # fmt: skip
_define(
    "stack_gradients",
    ["Tensor gradient", MASKED_WEIGHT, "SymInt interval", "bool through_magnitude"],
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda _, operands, *__: tuple(
        operands.factors.map(lambda f: f.new_empty(f.shape, dtype=compute_dtype(operands.weight.dtype)))
    ),
    run=lambda _, *operands: _stack_gradients(*operands),
)  # fmt: skip
_define(
    "linear_forward", ["Tensor x", MASKED_WEIGHT, "Tensor? bias"], "Tensor",
    lambda x, operands, _: x.new_empty((x.shape[0], operands.weight.shape[0])),
)  # fmt: skip
_define(
    "linear_backward", ["Tensor gy", "Tensor x", MASKED_WEIGHT, "bool through_magnitude", NEEDS], _SEVEN, _fake_backward
)  # fmt: skip
_define(
    "weighed_backward", ["Tensor gy", "Tensor x", MASKED_WEIGHT, "bool through_magnitude", NEEDS, "Tensor moments"],
    f"{_SEVEN[:-1]}, Tensor)", _fake_weighed_backward,
    run=lambda kernels, *operands: WeighedRoom(kernels, lambda: operands[-1]).backward(*operands[:-1]),
)  # fmt: skip
_define(
    "rested_backward", ["Tensor gy", "Tensor x", MASKED_WEIGHT, "bool through_magnitude", NEEDS],
    "(Tensor, Tensor, Tensor)", _fake_rested_backward,
)  # fmt: skip
_define(
    "block_forward", ["Tensor x", MASKED_WEIGHT, "Tensor? bias", "int size"], "Tensor",
    lambda x, operands, *_: x.new_empty((x.shape[0], operands.weight.shape[0])),
)  # fmt: skip
_define(
    "block_backward",
    ["Tensor gy", "Tensor x", MASKED_WEIGHT, "int size", "SymInt interval", "bool through_magnitude", NEEDS],
    _SEVEN, _fake_backward, run=_block_backward, tags=HOST_DECIDES,
)  # fmt: skip
_define(
    "kept_blocks_forward",
    ["Tensor x", "Tensor blocks", "Tensor? bias", "Tensor rows", "Tensor columns", "SymInt out_features"], "Tensor",
    lambda x, _blocks, _bias, _rows, _columns, out_features: x.new_empty((x.shape[0], out_features)),
    run=lambda _, *operands: kept_blocks.forward(*operands),
)  # fmt: skip
_define(
    "kept_blocks_backward",
    ["Tensor gy", "Tensor blocks", "Tensor rows", "Tensor columns", "SymInt in_features"], "Tensor",
    lambda gy, _blocks, _rows, _columns, in_features: gy.new_empty((gy.shape[0], in_features)),
    run=lambda _, *operands: kept_blocks.backward(*operands),
)  # fmt: skip
_LISTS = ["Tensor values", "Tensor offsets", "Tensor pointers"]  # of SparseRows, see cpu/sparse_rows.py
_define(
    "sparse_forward", ["Tensor x", *_LISTS, "Tensor? bias", "SymInt out_features"], "Tensor",
    lambda x, *operands: x.new_empty((x.shape[0], operands[-1])),
    run=_sparse_forward,
)  # fmt: skip
_define(
    "sparse_backward",
    ["Tensor gy", "Tensor x", *_LISTS, "SymInt in_features", "bool needs_input", "bool needs_values"],
    "(Tensor, Tensor)", _fake_sparse_backward, run=_sparse_backward,
)  # fmt: skip

_ops = getattr(torch.ops, NAMESPACE)
scores = _ops.scores.default
kth_value = _ops.kth_value.default
prune_mask = _ops.prune_mask.default
refresh_mask = _ops.refresh_mask.default
refresh_weighed_mask = _ops.refresh_weighed_mask.default
masked_weight = _ops.masked_weight.default
stack_gradients = _ops.stack_gradients.default
linear_forward = _ops.linear_forward.default
linear_backward = _ops.linear_backward.default
weighed_backward = _ops.weighed_backward.default
rested_backward = _ops.rested_backward.default
block_forward = _ops.block_forward.default
block_backward = _ops.block_backward.default
kept_blocks_forward = _ops.kept_blocks_forward.default
kept_blocks_backward = _ops.kept_blocks_backward.default
sparse_forward = _ops.sparse_forward.default
sparse_backward = _ops.sparse_backward.default
