"""What this machine can do at best: a GEMM's speed by dtype and the memory's bandwidth, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils import benchmark


@dataclass(frozen=True)
class Ceilings:
    gemm: dict[torch.dtype, float]  # FLOP/s
    bandwidth: float  # bytes/s

    def __str__(self) -> str:
        speeds = ", ".join(f"GEMM {str(d).removeprefix('torch.')} {f / 1e9:.0f} GFLOP/s" for d, f in self.gemm.items())
        return f"{speeds}, memory {self.bandwidth / 1e9:.1f} GB/s"


def measured(device: str, dtypes: tuple[torch.dtype, ...], seconds: float = 0.5) -> Ceilings:
    """The best of several runs each: of square GEMMs, and of c = a + b over arrays that no cache holds."""
    side = 1536 if device == "cpu" else 8192
    gemm = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        gemm[dtype] = 2.0 * side**3 / _best("torch.mm(a, b)", {"a": a, "b": b}, seconds)
    count = 1 << 25
    arrays = {name: torch.ones(count, device=device) for name in "abc"}
    return Ceilings(gemm, 12.0 * count / _best("torch.add(a, b, out=c)", arrays, seconds))


def _best(statement: str, names: dict[str, torch.Tensor], seconds: float) -> float:
    timer = benchmark.Timer(statement, globals={"torch": torch, **names}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=seconds).times)
