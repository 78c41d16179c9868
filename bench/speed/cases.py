"""What is measured: shapes, token counts, dtypes and modes, and which of them a machine can do.

`full` is the grid behind `python -m bench`, `quick` the part of it that takes two minutes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """One linear layer of a known model."""

    name: str
    out: int
    columns: int

    @property
    def numel(self) -> int:
        return self.out * self.columns

    def __str__(self) -> str:
        return f"{self.columns} -> {self.out}"


SHAPES = (
    Shape("BERT-base attention", 768, 768),
    Shape("BERT-base up", 3072, 768),
    Shape("BERT-base down", 768, 3072),
    Shape("GPT-2 medium attention", 3072, 1024),
    Shape("GPT-2 medium up", 4096, 1024),
    Shape("GPT-2 medium down", 1024, 4096),
    Shape("Llama-8B query", 4096, 4096),
    Shape("Llama-8B key", 1024, 4096),
    Shape("Llama-8B up", 14336, 4096),
    Shape("Llama-8B down", 4096, 14336),
)
BY_NAME = {shape.name: shape for shape in SHAPES}
MINILM = Shape("MiniLM-L6 batch 16 x 128", 384, 384)
TOKENS = (16, 64, 256, 1024, 2048, 4096, 16384)
DTYPES = (torch.float32, torch.bfloat16)

# threshold: the k-th of as many scores; mask: scores and threshold to packed bits, after a small change of the factors
# forward, backward: alone, with a fresh mask; step: mask, forward, backward and AdamW; model: the same of a whole model
MODES = ("threshold", "mask", "forward", "backward", "step", "model")


@dataclass(frozen=True)
class Case:
    mode: str
    shape: Shape
    tokens: int  # 0 where no tokens are involved
    dtype: torch.dtype

    def __str__(self) -> str:
        tokens = f", T = {self.tokens}" if self.tokens else ""
        return f"{self.mode}, {self.shape.name} {self.shape}{tokens}, {short(self.dtype)}"


@dataclass(frozen=True)
class Machine:
    """What bounds the cases: bytes that are free, and a GEMM's speed in FLOP/s by dtype."""

    free_bytes: int
    gemm: dict[torch.dtype, float]
    longest_step: float  # seconds that one dense step may take


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def quick(device: str = "cpu") -> list[Case]:
    """The shapes of the targets in the README's first table; step mode for each, every mode for one of them.

    On a GPU first what it is bought for: bf16, and a layer of a large model.
    """
    return list(dict.fromkeys([*(_quick_on_a_gpu() if device == "cuda" else []), *_quick()]))


def _quick_on_a_gpu() -> list[Case]:
    bf16, (up, query, wide) = torch.bfloat16, (BY_NAME[n] for n in ("BERT-base up", "Llama-8B query", "Llama-8B up"))
    return [
        Case("step", query, 4096, bf16),
        Case("step", up, 1024, bf16),
        Case("mask", query, 0, bf16),
        Case("forward", query, 1024, bf16),
        Case("backward", query, 1024, bf16),
        Case("forward", query, 16, bf16),
        Case("step", wide, 4096, bf16),
        Case("step", query, 16384, bf16),
    ]


def _quick() -> list[Case]:
    up, down, attention, gpt2 = (
        BY_NAME[n] for n in ("BERT-base up", "BERT-base down", "BERT-base attention", "GPT-2 medium up")
    )
    return [
        Case("threshold", BY_NAME["Llama-8B query"], 0, torch.float32),
        Case("mask", up, 0, torch.float32),
        Case("forward", up, 1024, torch.float32),
        Case("backward", up, 1024, torch.float32),
        Case("step", up, 1024, torch.float32),
        Case("step", down, 1024, torch.float32),
        Case("step", gpt2, 2048, torch.float32),
        Case("step", attention, 256, torch.float32),
        Case("step", up, 1024, torch.bfloat16),
        Case("model", MINILM, 2048, torch.float32),
    ]


def full() -> Iterator[Case]:
    for name in ("BERT-base up", "GPT-2 medium up", "Llama-8B query"):
        yield Case("threshold", BY_NAME[name], 0, torch.float32)
    for shape in SHAPES:
        for dtype in DTYPES:
            yield Case("mask", shape, 0, dtype)
            for tokens in TOKENS:
                if tokens in (16, 1024, 16384):
                    yield Case("forward", shape, tokens, dtype)
                    yield Case("backward", shape, tokens, dtype)
                yield Case("step", shape, tokens, dtype)
    yield Case("model", MINILM, 2048, torch.float32)


def lacking(case: Case) -> str | None:
    """What is not installed and a case needs, or None."""
    if case.mode == "model" and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def too_much(case: Case, machine: Machine) -> str | None:
    """Why this machine should not run a case, or None if it can."""
    numel, size = case.shape.numel, case.dtype.itemsize
    # W with gradient and two moments, a few copies in the released algorithm with a 64-bit index each, and activations
    needed = numel * (4 * size + 40) + 6 * case.tokens * (case.shape.out + case.shape.columns) * size
    if needed > machine.free_bytes:
        return f"needs about {needed / 1e9:.1f} GB, {machine.free_bytes / 1e9:.1f} are free"
    seconds = 6.0 * numel * case.tokens / machine.gemm[case.dtype]
    if case.mode != "model" and seconds > machine.longest_step:
        return f"a dense step would take about {seconds:.0f} s, the limit is {machine.longest_step:g}"
    return None
