"""The ops of a layer that stores lists of kept weights: y = x W^T + bias, and the gradients of x and of the values.

On a CPU, in fp32 and bf16, they are products with the lists. Other devices and dtypes get the dense weight back first:
right, but slower than a dense layer. (On a GPU, triton/sparse_matmul.py multiplies in place of this for y and dx.)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from pst_kernels.notices import say_once

from ..operands import compute_dtype
from . import sparse_products
from .sparse_rows import SparseRows, compiled_passes


def forward(
    x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """y (T, out) = x (T, in) W^T + bias in x's dtype; values and bias in any floating dtype."""
    passes = compiled_passes(x, values)
    if passes is not None:
        y = sparse_products.multiply_ready(passes, x, values, offsets, pointers, bias)
        if y is not None:
            return y
    lists = SparseRows(values, offsets, pointers, out_features, x.shape[1])
    if passes is not None:
        return sparse_products.multiply_by(passes, x, lists, bias)
    _say_if_slow(x, values)
    return linear(x, lists.to_dense().to(x.dtype), None if bias is None else bias.to(x.dtype))


def backward(
    gy: Tensor, x: Tensor, values: Tensor, offsets: Tensor, pointers: Tensor, in_features: int, needs_input: bool,
    needs_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx = gy W (T, in) in gy's dtype, and the values' gradient (kept,), fp32 or float64; empty where not needed.

    Of x only dtype and device are looked at where only dx is needed.
    """
    lists = SparseRows(values, offsets, pointers, gy.shape[1], in_features)
    dx, of_values = gy.new_empty(0), values.new_empty(0, dtype=compute_dtype(values.dtype))
    if compiled_passes(gy, x, values) is not None:
        if needs_input:
            # made anew each time: a twentieth of the product, and no second copy of the weight to hold and keep equal
            dx = sparse_products.multiply(gy, lists.transpose())
        return dx, sparse_products.sampled(gy, x, lists) if needs_values else of_values
    if needs_input:
        _say_if_slow(gy, values)
        dx = gy @ lists.to_dense().to(gy.dtype)
    if needs_values:
        say_once(
            f"the kept weights of a SparseLinear take their gradient from a dense one for {gy.dtype} on"
            f" {gy.device.type}: as slow as a dense layer's, and as large while it is made"
        )
        of_values = (gy.T @ x)[lists.places()].to(of_values.dtype)
    return dx, of_values


def _say_if_slow(x: Tensor, values: Tensor) -> None:
    if x.device.type != "cpu" or x.dtype not in sparse_products.DTYPES or values.dtype not in sparse_products.DTYPES:
        say_once(
            f"a SparseLinear multiplies {x.dtype} on {x.device.type} as a dense layer, slower than one: its products"
            " are for float32 and bfloat16 on a CPU, and by Triton for these and float16 on a GPU"
        )
