"""SparseLinear: a linear layer that stores the kept weights of an unstructured mask and multiplies by them alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..cpu.sparse_rows import SparseRows
from ..functional import bias_gradient, operand_dtype, without_autocast
from ..masks.chunks import CHUNK, chunks_of
from ..operands import FLOATING
from .checks import is_conv1d
from .stored import StoredParts


class SparseLinear(StoredParts):
    """y = x W^T + bias with a W (out, in) of which only the kept weights are stored, wherever they lie.

    Parameter `weight` (kept,): the kept weights in chunks of 128 columns, in a chunk row by row, in a row by column;
    buffers `offsets`, uint8 (kept,), a weight's column in its chunk, and `pointers`, int32 (chunks * out + 1,): row i's
    part of chunk c is pointers[c * out + i] to pointers[c * out + i + 1]. The order is the same on every device. It
    holds 5 bytes a kept fp32 weight (3 in bf16) and 4 a row and chunk; once it has multiplied a single token on a CPU,
    or anything on a GPU, a bit a weight besides, which no state dict has. A state dict may bring any number of kept
    weights. On a CPU, in fp32 and bf16, the products skip what is not kept, so that a NaN or an infinity of x reaches
    only outputs that keep a weight for it. On a GPU with Triton, in fp32, fp16 and bf16, products of up to 64 tokens
    read the bits and the kept weights alone. Elsewhere each product makes the dense weight first.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        trainable: whether the kept weights train. Their gradient is computed at the kept weights alone.

    A new layer keeps nothing: load a state dict, or make it with `from_linear` or `from_dense`.

    Example:
        layer = SparseLinear.from_linear(pruned_linear)
    """

    PARTS = ("weight", "offsets", "pointers")
    weight: nn.Parameter
    offsets: Tensor
    pointers: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None,
        trainable: bool = False,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=trainable)
        self.register_buffer("offsets", torch.zeros(0, dtype=torch.uint8, device=device))
        runs = chunks_of(in_features) * out_features
        self.register_buffer("pointers", torch.zeros(runs + 1, dtype=torch.int32, device=device))
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_linear(cls, linear: nn.Module, trainable: bool = False) -> SparseLinear:
        """What is not zero of the weight of an `nn.Linear` or a transformers `Conv1D`, and the same bias Parameter."""
        if isinstance(linear, nn.Linear):
            weight = linear.weight
        elif is_conv1d(linear):
            weight = linear.weight.T  # type: ignore[assignment]
        else:
            raise TypeError(
                f"linear must be an nn.Linear or a transformers Conv1D, got {type(linear).__name__}; from_dense takes a"
                " weight (out, in)"
            )
        bias: Any = linear.bias
        return cls.from_dense(weight, bias, trainable=trainable).train(linear.training)

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: nn.Parameter | None, kept: Tensor | None = None, trainable: bool = False
    ) -> SparseLinear:
        """Of a dense weight (out, in), of any strides: what is not zero, or what `kept` says, bool (out, in).

        The bias is held, not copied.
        """
        if weight.dim() != 2 or weight.dtype not in FLOATING:
            raise TypeError(
                f"weight must be 2-d (out, in) of float32, float16, bfloat16 or float64, got {weight.dtype} of shape"
                f" {tuple(weight.shape)}"
            )
        if kept is not None and (kept.dtype != torch.bool or kept.shape != weight.shape):
            raise ValueError(
                f"kept must be bool of shape {tuple(weight.shape)}, as weight, got {kept.dtype} of shape"
                f" {tuple(kept.shape)}"
            )
        out, columns = weight.shape
        layer = cls(columns, out, bias=False, device=weight.device, dtype=weight.dtype, trainable=trainable)
        layer._take(*SparseRows.from_dense(weight, kept)[:3])
        layer.bias = bias
        return layer

    @property
    def lists(self) -> SparseRows:
        """What the products of cpu/sparse_products.py take: the layer's own tensors."""
        return SparseRows(self.weight.detach(), self.offsets, self.pointers, self.out_features, self.in_features)

    @property
    def sparsity(self) -> float:
        """Fraction of the weight that is not stored."""
        return 1.0 - self.weight.numel() / (self.out_features * self.in_features)

    def to_dense(self) -> Tensor:
        """The weight as (out, in)."""
        return self.lists.to_dense()

    def to_csr(self) -> Tensor:
        """The weight as a `torch.sparse_csr_tensor` (out, in)."""
        row, column = self.lists.places()
        order = torch.argsort(row, stable=True)
        counts = torch.bincount(row, minlength=self.out_features)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shape = (self.out_features, self.in_features)
        values = self.weight.detach()[order]
        return torch.sparse_csr_tensor(crow, column[order], values, shape, check_invariants=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out), in x's dtype, or in autocast's under autocast."""
        parameters: Any = self._parameters  # each lookup as an attribute costs a microsecond
        buffers: Any = self._buffers
        values, bias, shape = parameters["weight"], parameters["bias"], x.shape
        self._check(x, values)
        if len(shape) != 2:
            x = x.reshape(-1, self.in_features)
        if x.dtype is not (dtype := operand_dtype(x)):
            x = x.to(dtype)
        operands = (x, values, buffers["offsets"], buffers["pointers"], bias, self.out_features)
        product = ops.sparse_product if self._goes_direct(x) else _Product.apply
        with without_autocast(x.device.type):
            y = product(*operands)
        return y if len(shape) == 2 else y.view(*shape[:-1], self.out_features)

    def _take(self, values: Tensor, offsets: Tensor, pointers: Tensor) -> None:
        self.weight = nn.Parameter(values, requires_grad=self.weight.requires_grad)
        self.offsets, self.pointers = offsets, pointers

    def _wrong(self, values: Tensor, offsets: Tensor, pointers: Tensor) -> str | None:
        """What keeps these from being the lists of this layer: a product reads wherever they point."""
        runs = chunks_of(self.in_features) * self.out_features
        if values.dim() != 1 or offsets.shape != values.shape or pointers.shape != (runs + 1,):
            return (
                f"weight {tuple(values.shape)}, offsets {tuple(offsets.shape)} and pointers {tuple(pointers.shape)},"
                f" not (kept,), (kept,) and ({runs + 1},)"
            )
        if offsets.dtype != torch.uint8 or pointers.dtype != torch.int32:
            return f"offsets of {offsets.dtype} and pointers of {pointers.dtype}, not uint8 and int32"
        if pointers[0] != 0 or pointers[-1] != len(values) or bool((pointers.diff() < 0).any()):
            return "pointers that do not rise from 0 to the number of kept weights"
        run = torch.repeat_interleave(pointers.diff().to(torch.int64))
        column = torch.div(run, self.out_features, rounding_mode="floor") * CHUNK + offsets
        if bool((offsets >= CHUNK).any()) or bool((column >= self.in_features).any()):
            return f"offsets beyond a chunk of {CHUNK} columns or beyond in_features={self.in_features}"
        if bool(((run * CHUNK + offsets).diff() <= 0).any()):
            return "offsets that do not rise within each row of a chunk"
        return None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" kept={self.weight.numel()} of {self.out_features * self.in_features}"
        )


class _Product(torch.autograd.Function):
    """The product, differentiable in x, the values and the bias."""

    @staticmethod
    def forward(ctx: Any, x, values, offsets, pointers, bias, out_features: int) -> Tensor:
        ctx.in_features, ctx.bias_dtype = x.shape[1], None if bias is None else bias.dtype
        # the values' gradient needs x, that of x does not
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, offsets, pointers)
        return ops.sparse_forward(x, values, offsets, pointers, bias, out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, offsets, pointers = ctx.saved_tensors
        needs_input, needs_values, _, _, needs_bias, _ = ctx.needs_input_grad
        dx, of_values = None, None
        with without_autocast(gy.device.type):
            if needs_input or needs_values:
                gy = gy.contiguous()  # the gradient of a sum has stride 0
                dx, of_values = ops.sparse_backward(
                    gy, gy if x is None else x, values, offsets, pointers, ctx.in_features, needs_input, needs_values
                )
            dbias = bias_gradient(gy, ctx.bias_dtype) if needs_bias else None
        of_values = of_values.to(values.dtype) if needs_values and of_values is not None else None
        return dx if needs_input else None, of_values, None, None, dbias, None
