"""One layer, as a table of layers takes it: its tensors, how they lie in memory, and what is checked once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..masks.packing import packed_width
from ..operands import Factors, Scales
from .score import checked

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class LayerTensors(NamedTuple):
    """What a layer's mask is made of, and where it goes."""

    weight: Tensor  # (out, in), of any strides
    factors: Factors  # contiguous, of one dtype
    scales: Scales
    num_pruned: Tensor  # int64, 0-d
    guess: Tensor  # fp32 (4,)
    mask: Tensor  # int32, packed
    masked: Tensor | None  # contiguous (out, in), for M * W' in its dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that a kernel reads or writes."""
        given = (self.weight, *self.factors, self.num_pruned, self.guess, self.mask)
        return given if self.masked is None else (*given, self.masked)

    def detached(self) -> LayerTensors:
        """The same memory, which these keep alive whatever becomes of the tensors given."""
        return self._replace(
            weight=self.weight.detach(), factors=self.factors.map(Tensor.detach), guess=self.guess.detach(),
            num_pruned=self.num_pruned.detach(), mask=self.mask.detach(),
            masked=None if self.masked is None else self.masked.detach(),
        )  # fmt: skip

    @property
    def place(self) -> tuple[Any, ...]:
        """Changes when a table that holds the layer has to be made anew."""
        return self.scales, *((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self.tensors)

    @property
    def transposed(self) -> bool:
        rows, _ = self.weight.shape
        return self.weight.stride(0) == 1 and self.weight.stride(1) != 1 and rows > 1

    @property
    def along(self) -> tuple[int, int, int, int]:
        """n_i, n_j and the strides of both: see sweep.py."""
        (rows, columns), (stride_row, stride_column) = self.weight.shape, self.weight.stride()
        if self.transposed:
            return columns, rows, stride_column, stride_row
        return rows, columns, stride_row, stride_column

    @property
    def unit(self) -> bool:
        _, n_j, _, stride_j = self.along
        return stride_j == 1 or n_j == 1

    @property
    def aligned(self) -> bool:
        """Whether everything that is read or written along j begins and is spaced by multiples of 16."""
        n_i, n_j, stride_i, _ = self.along
        spaces = (n_j, stride_i, n_i) if self.transposed else (n_j, stride_i)
        return (
            self.unit
            and not any(space % 16 for space in spaces)
            and not any(t.data_ptr() % 16 for t in self.tensors[:7] + self.tensors[9:])
        )

    def check(self) -> None:
        """Raise ValueError or TypeError where the kernels would not read what is meant."""
        rows, columns = self.weight.shape
        self.factors.check(self.weight)
        checked(self.weight, self.factors)
        if len({factor.dtype for factor in self.factors}) > 1:
            raise TypeError(f"a table takes factors of one dtype, got {[f.dtype for f in self.factors]}")
        wanted = {
            "num_pruned": (self.num_pruned, torch.int64, ()),
            "guess": (self.guess, torch.float32, (4,)),
            "mask": (self.mask, torch.int32, (rows, packed_width(columns))),
        }
        if self.masked is not None:
            if self.masked.dtype not in TYPES:
                raise TypeError(f"masked must be float32, float16 or bfloat16, got {self.masked.dtype}")
            wanted["masked"] = (self.masked, self.masked.dtype, (rows, columns))
        for name, (tensor, dtype, shape) in wanted.items():
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ValueError(f"{name} must be {dtype} of shape {shape}, got {tensor.dtype}, {tuple(tensor.shape)}")
        for tensor in self.tensors[1:]:
            if not tensor.is_contiguous() or tensor.device != self.weight.device:
                raise ValueError("all tensors of a table but the weights must be contiguous, and all on one device")
