"""Inputs that a layer need not keep for its backward, because what made them is kept anyway.

The input of a transformer's linear layers is often the result of a cheap function, such as GELU or LayerNorm, for whose
own backward autograd keeps what that function took. Its result is kept by nobody but the linear layer behind it, and it
is the largest thing kept: four times the model's width after GELU. So the layer keeps the function and what it took,
which costs no memory, and calls it again in its backward.

The node that made a tensor is told by its name, and what it took by its `_saved_` attributes (PyTorch's notes on
autograd mechanics, "Saved tensors"). Where anything is unusual, the input is kept as ever: hooks on saved tensors
(activation checkpointing, offloading) decide for themselves what is kept, and a compiler plans its own memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Producer(NamedTuple):
    """`make(*taken)` is the tensor again: the same bits, but for LayerNorm, whose last bit may differ.

    It raises RuntimeError if what the tensor is made of is gone.
    """

    make: Callable[..., Tensor]
    taken: tuple[Tensor, ...]


def producer_of(x: Tensor) -> Producer | None:
    """How x was made, if it can be made again from what autograd keeps; None if not."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.grad_fn is None:
        return None
    node: Any = x.grad_fn
    find = _PRODUCERS.get(node.name())
    # A write in place that autograd did not see has changed x since.
    if find is None or x._version != 0 or hooks_on_saved_tensors():
        return None
    try:
        found = find(node)
    except (AttributeError, RuntimeError):  # not there in this version of PyTorch, or changed or freed since
        return None
    usable = found is not None and all(type(t) in (Tensor, torch.nn.Parameter) for t in found.taken)
    return Producer(partial(_made_again, found.make), found.taken) if found is not None and usable else None


def _made_again(make: Callable[..., Tensor], *taken: Tensor) -> Tensor:
    if any(t.numel() and t.untyped_storage().nbytes() == 0 for t in taken):
        raise RuntimeError(
            "a layer's input cannot be made again for its backward: what made it was freed, as FSDP frees the weights"
            " of a LayerNorm that is wrapped apart from the layer; use PSTConfig(recompute_input=False)"
        )
    return make(*taken)


def hooks_on_saved_tensors() -> bool:
    """Whether somebody decides what autograd keeps, such as activation checkpointing."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def _gelu(node: Any) -> Producer:
    return Producer(partial(torch.nn.functional.gelu, approximate=node._saved_approximate), (node._saved_self,))


def _silu(node: Any) -> Producer:
    return Producer(torch.nn.functional.silu, (node._saved_self,))


def _product(node: Any) -> Producer | None:
    """Of two activations, as in a gated MLP. Each is kept only if the other has a gradient."""
    left, right = node._saved_self, node._saved_other
    both = all(isinstance(t, Tensor) and t.grad_fn is not None for t in (left, right))
    return Producer(torch.mul, (left, right)) if both else None


def _layer_norm(node: Any) -> Producer | None:
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    weight, bias = node._saved_weight, node._saved_bias
    if weight is None or bias is None or x.dtype != torch.float32:
        return None  # a 16-bit result is rounded, and would be rounded otherwise here
    return Producer(_normalised, (x, mean, rstd, weight, bias))


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias, torch.sub(x, mean).mul_(rstd), weight)


_PRODUCERS: dict[str, Callable[[Any], Producer | None]] = {
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MulBackward0": _product,
    "NativeLayerNormBackward0": _layer_norm,
}
