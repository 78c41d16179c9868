"""Where a GPU test runs: on a CUDA device, or, so that the test itself is tried where there is none, on a stand-in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.gpu.graphs import WARM_UP, captured

CUDA = "cuda"
TORCH = "torch"  # a stand-in: CPU tensors and the ops in PyTorch
EMULATED = "emulated"  # a stand-in: CPU tensors and the compiled kernels in the PTX emulator


class Place:
    def __init__(self, kind: str):
        self.kind = kind
        self.device = CUDA if kind == CUDA else "cpu"
        self.triton = kind != TORCH  # whether the ops run as Triton's kernels

    def to(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.to(self.device) for tensor in tensors]

    @contextlib.contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Inside, whatever makes the host wait for the device raises; on a stand-in nothing does."""
        if self.kind != CUDA:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def twice(self, call: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """What `call` returns, after it did so twice, bit for bit, and neither time waited for the device.

        Once in the emulator, which takes its time and whose own tests try every order of programs.
        """
        with self.without_waiting():
            found = list(call())
        if self.kind != EMULATED:
            with self.without_waiting():
                again = list(call())
            if not same_bits(found, again):
                raise AssertionError("two runs of the same call differ in their bits")
        return found

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        """Run `step` WARM_UP times, then capture it as a CUDA graph, which runs nothing; returns the graph's replay.

        A stand-in has no graphs: there the replay is the step.
        """
        if self.kind != CUDA:
            for _ in range(WARM_UP):
                step()
            return step
        return captured(step)


def same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """NaN equals NaN of the same bits, 0.0 does not equal -0.0."""
    pairs = list(zip(some, others, strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs) and all(
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in pairs
    )
