"""BlockSparseLinear: a linear layer that stores the kept blocks of its weight and multiplies by them alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..cpu import kept_blocks
from ..cpu.kept_blocks import row_of_each, starts
from ..functional import bias_gradient, operand_dtype, without_autocast
from ..operands import FLOATING
from .stored import StoredParts


class BlockSparseLinear(StoredParts):
    """y = x W^T + bias with a W (out, in) of which only some B x B blocks are stored. For inference and frozen use:
    gradients reach x and the bias, the weight has none.

    Parameter `weight` (kept, B, B): the kept blocks in row-major order, each transposed to (in, out), filled up with
    zeros at W's edges; buffers `crow_indices` (rows of blocks + 1,) and `col_indices` (kept,), int64, as in torch's BSR
    layout. A state dict may bring any number of blocks. On a CPU the product visits the blocks one by one: up to 128
    tokens, in fp32 and bf16 and where block_size is a multiple of 8, in a compiled pass, else by a product of the
    library for each. On other devices it is torch's BSR product.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        block_size: B, any number from 1.

    A new layer has no blocks: load a state dict, or make it with `from_linear`, `from_dense` or `from_bsr`.

    Example:
        layer = BlockSparseLinear.from_linear(pruned_linear, block_size=64)
    """

    PARTS = ("weight", "crow_indices", "col_indices")
    weight: nn.Parameter
    crow_indices: Tensor
    col_indices: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, block_size: int, bias: bool = True, device: Any = None,
        dtype: Any = None,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("block_size", block_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        self.in_features, self.out_features, self.block_size = in_features, out_features, block_size
        empty = torch.empty((0, block_size, block_size), device=device, dtype=dtype)
        self.weight = nn.Parameter(empty, requires_grad=False)
        indices = {"dtype": torch.int64, "device": device}
        self.register_buffer("crow_indices", torch.zeros(self._grid()[0] + 1, **indices))
        self.register_buffer("col_indices", torch.zeros(0, **indices))
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int) -> BlockSparseLinear:
        """The blocks of a linear layer's weight that are not all zero, and the same bias Parameter."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"linear must be an nn.Linear, got {type(linear).__name__}; from_dense takes a weight (out, in)"
            )
        return cls.from_dense(linear.weight, linear.bias, block_size).train(linear.training)

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: nn.Parameter | None, block_size: int, kept: Tensor | None = None
    ) -> BlockSparseLinear:
        """The blocks of a dense weight (out, in): those that are not all zero, or those that `kept` says.

        `kept` is bool (rows of blocks, columns of blocks); what lies outside of it is dropped. The bias is held, not
        copied.
        """
        if weight.dim() != 2 or weight.dtype not in FLOATING:
            raise TypeError(
                f"weight must be 2-d (out, in) of float32, float16, bfloat16 or float64, got {weight.dtype} of shape"
                f" {tuple(weight.shape)}"
            )
        out, columns = weight.shape
        layer = cls(columns, out, block_size, bias=False, device=weight.device, dtype=weight.dtype)
        (rows, width), size = layer._grid(), block_size
        padded = nn.functional.pad(weight.detach(), (0, width * size - columns, 0, rows * size - out))
        blocks = padded.view(rows, size, width, size).permute(0, 2, 3, 1)  # (row, column, in, out)
        kept = (blocks != 0).flatten(2).any(2) if kept is None else kept  # NaN is not zero
        if kept.dtype != torch.bool or kept.shape != (rows, width):
            raise ValueError(
                f"kept must be bool of shape {(rows, width)} for weight {(out, columns)} and block_size={size}, got"
                f" {kept.dtype} of shape {tuple(kept.shape)}"
            )
        layer._take(blocks[kept].contiguous(), starts(kept.sum(1)), kept.nonzero()[:, 1].clone())
        layer.bias = bias
        return layer

    @classmethod
    def from_bsr(cls, weight: Tensor, bias: nn.Parameter | None = None) -> BlockSparseLinear:
        """Of a `torch.sparse_bsr_tensor` (out, in) with square blocks. Raises ValueError when it is no such tensor."""
        if weight.layout != torch.sparse_bsr or weight.dim() != 2 or weight.values().dim() != 3:
            raise ValueError(f"weight must be a 2-d torch.sparse_bsr tensor, got {weight.layout} {tuple(weight.shape)}")
        blocks, rows, columns = weight.values().detach(), weight.crow_indices(), weight.col_indices()
        if blocks.shape[1] != blocks.shape[2]:
            raise ValueError(f"weight has blocks of {tuple(blocks.shape[1:])}; convert it with square ones")
        layer = cls(weight.shape[1], weight.shape[0], blocks.shape[1], False, weight.device, weight.dtype)
        parts = blocks.transpose(1, 2).contiguous(), rows.to(torch.int64), columns.to(torch.int64)
        if wrong := layer._wrong(*parts):
            raise ValueError(f"weight is not a valid BSR tensor: {wrong}")
        layer._take(*parts)
        layer.bias = bias
        return layer

    @property
    def sparsity(self) -> float:
        """Fraction of the weight that is not stored."""
        rows, columns = self._inside()
        return 1.0 - int((rows * columns).sum()) / (self.out_features * self.in_features)

    def to_dense(self) -> Tensor:
        """The weight as (out, in)."""
        (rows, width), size = self._grid(), self.block_size
        blocks = self.weight.new_zeros((rows, width, size, size))
        blocks[row_of_each(self.crow_indices), self.col_indices] = self.weight.detach().transpose(1, 2)
        return blocks.transpose(1, 2).reshape(rows * size, width * size)[: self.out_features, : self.in_features]

    def to_bsr(self) -> Tensor:
        """The weight as a `torch.sparse_bsr_tensor` (out, in). Raises ValueError where the edges are not whole blocks,
        which torch's layout needs.
        """
        shape, size = (self.out_features, self.in_features), self.block_size
        if shape[0] % size or shape[1] % size:
            raise ValueError(
                f"a weight {shape} is not made of whole blocks of {size}, as torch's BSR layout needs; use to_dense()"
            )
        blocks = self.weight.detach().transpose(1, 2).contiguous()
        return torch.sparse_bsr_tensor(self.crow_indices, self.col_indices, blocks, shape, check_invariants=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out), in x's dtype, or in autocast's under autocast."""
        self._check(x, self.weight)
        dtype = operand_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        flat = x.reshape(-1, self.in_features).to(dtype).contiguous()
        operands = (flat, self.weight.to(dtype), bias, self.crow_indices, self.col_indices, self.out_features)
        product = kept_blocks.forward if self._goes_direct(x) else _Product.apply
        with without_autocast(x.device.type):
            y = product(*operands)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _check(self, x: Tensor, weight: Tensor) -> None:
        super()._check(x, weight)
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "weight requires grad, but a BlockSparseLinear does not train it; call weight.requires_grad_(False)"
            )

    def _grid(self) -> tuple[int, int]:
        return -(-self.out_features // self.block_size), -(-self.in_features // self.block_size)

    def _inside(self) -> tuple[Tensor, Tensor]:
        """int64 (kept,) each: how many rows and columns of every block lie inside the weight."""
        size = self.block_size
        return (
            (self.out_features - size * row_of_each(self.crow_indices)).clamp(max=size),
            (self.in_features - size * self.col_indices).clamp(max=size),
        )

    def _take(self, blocks: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.crow_indices, self.col_indices = rows, columns

    def _wrong(self, blocks: Tensor, rows: Tensor, columns: Tensor) -> str | None:
        """What keeps these from being the blocks of this layer."""
        (grid_rows, grid_columns), size = self._grid(), self.block_size
        if blocks.dim() != 3 or blocks.shape[1:] != (size, size):
            return f"blocks of shape {tuple(blocks.shape)}, not (kept, {size}, {size})"
        if rows.shape != (grid_rows + 1,) or columns.shape != blocks.shape[:1]:
            return (
                f"crow_indices {tuple(rows.shape)} and col_indices {tuple(columns.shape)}, not ({grid_rows + 1},) and"
                f" ({len(blocks)},)"
            )
        if rows[0] != 0 or rows[-1] != len(columns) or bool((rows.diff() < 0).any()):
            return "crow_indices that do not rise from 0 to the number of blocks"
        flat = row_of_each(rows) * grid_columns + columns
        if bool(((columns < 0) | (columns >= grid_columns)).any()) or bool((flat.diff() <= 0).any()):
            return f"col_indices that do not rise within each row, from 0 to below {grid_columns}"
        return None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size},"
            f" bias={self.bias is not None}, blocks={len(self.weight)} of {self._grid()[0] * self._grid()[1]}"
        )


class _Product(torch.autograd.Function):
    """y = x W^T + bias, differentiable in x and bias."""

    @staticmethod
    def forward(ctx: Any, x, blocks, bias, rows, columns, out_features) -> Tensor:
        ctx.save_for_backward(blocks, rows, columns)
        ctx.in_features = x.shape[1]
        return ops.kept_blocks_forward(x, blocks, bias, rows, columns, out_features)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        needs_input, _, needs_bias, *_ = ctx.needs_input_grad
        # contiguous(): the gradient of a sum has stride 0, and each product of a block would copy it
        kept = ctx.saved_tensors
        dx = ops.kept_blocks_backward(gy.contiguous(), *kept, ctx.in_features) if needs_input else None
        dbias = bias_gradient(gy, gy.dtype) if needs_bias else None
        return dx, None, dbias, None, None, None
