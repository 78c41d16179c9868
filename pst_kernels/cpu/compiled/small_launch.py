"""What small.py and small_layer.py call of the compiled passes over small weights. All floating tensors are fp32."""

from __future__ import annotations

import array
from typing import Any

import torch
from torch import Tensor

from pst_kernels.masks.packing import packed_width
from pst_kernels.operands import Factors, Scales

from . import small_passes, threads


class Bound:
    """The passes of one weight, its factors and scales, all contiguous: what a frame says of these is looked up once.

    They may be written to, but must stay where they are, which `holds` tells.
    """

    def __init__(self, weight: Tensor, factors: Factors, scales: Scales) -> None:
        self.shape, self.factors = weight.shape, factors
        rows, columns = weight.shape
        self.width = packed_width(columns)
        self._scales = array.array("f", scales)
        self._held = weight, factors, self._scales  # alive
        self._fixed = (
            *(tensor.data_ptr() for tensor in (weight, *factors)), self._scales.buffer_info()[0], rows, columns,
            factors.weight_rank, factors.score_rank,
        )  # fmt: skip

    def holds(self, weight: Tensor, factors: Factors) -> bool:
        """Whether they are where they were: FSDP gathers a weight's tensors elsewhere for the backward."""
        return self._fixed[:7] == tuple(map(Tensor.data_ptr, (weight, *factors)))

    def _run(self, compiled: Any, *behind: int) -> None:
        """With the rest of a frame."""
        frame = array.array("q", (*self._fixed, *behind))
        threads.run_alone(compiled, frame.buffer_info()[0])

    def scores(self) -> Tensor:
        out = torch.empty(self.shape, dtype=torch.float32)
        self._run(small_passes.scores, out.data_ptr())
        return out

    def prune(self, count: int, masked: Tensor | None) -> Tensor:
        """The packed mask without the `count` smallest scores, from 1; `masked`, contiguous, gets M * W'."""
        packed = torch.empty((self.shape[0], self.width), dtype=torch.int32)
        self._run(small_passes.prune, packed.data_ptr(), 0 if masked is None else masked.data_ptr(), count)
        return packed

    def masked_into(self, out: Tensor, packed: Tensor) -> Tensor:
        """Fill `out`, contiguous, with M * W' from a contiguous mask."""
        self._run(small_passes.masked_weight, packed.data_ptr(), out.data_ptr())
        return out

    def factor_gradients(self, G: Tensor, packed: Tensor, through_magnitude: bool) -> list[Tensor]:
        """From all of G = gy^T x, with a contiguous mask."""
        found = list(map(torch.empty_like, self.factors))
        pointers = map(Tensor.data_ptr, found)
        self._run(small_passes.gradients, packed.data_ptr(), G.data_ptr(), int(through_magnitude), *pointers)
        return found
