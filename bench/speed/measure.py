"""How things are measured: interleaved runs in one process, quantiles, ratios of the same round, and bytes.

A noisy machine slows whole stretches of time. So a round runs every contestant once, in rotating order, and a ratio is
the median over rounds of this contestant's time over the reference's in the same round.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import math
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Timer = Callable[[], float]  # does one run and returns its seconds


@dataclass(frozen=True)
class Quantiles:
    p20: float
    median: float
    p80: float


@dataclass(frozen=True)
class Timing:
    """Seconds of every round a contestant took part in, NaN for the others."""

    seconds: list[float]

    @property
    def rounds(self) -> int:
        return sum(not math.isnan(s) for s in self.seconds)

    @property
    def quantiles(self) -> Quantiles:
        return quantiles(self.seconds)

    def ratio_to(self, reference: Timing) -> Quantiles:
        return quantiles([a / b for a, b in zip(self.seconds, reference.seconds, strict=True)])


def quantiles(values: Iterable[float]) -> Quantiles:
    """p20, median and p80 by linear interpolation; NaN values are left out."""
    known = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if not len(known):
        return Quantiles(math.nan, math.nan, math.nan)
    return Quantiles(*known.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def interleaved(
    timers: dict[str, Timer], seconds: float,
    *, reference: str = "", min_rounds: int = 3, max_rounds: int = 50, warmup: int = 1,
) -> dict[str, Timing]:  # fmt: skip
    """Run every timer once a round until `seconds` have passed, at least `min_rounds` and at most `max_rounds` rounds.

    A contestant that used up twice its share of the time (a sort of 16 million scores, say) rests while the others go
    on. All take part in the first round, and `reference` in every one.
    """
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            timers[name]()
    share, start = 2.0 * max(seconds, 1.0) / max(1, len(names)), time.perf_counter()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for r in range(max_rounds):
            if r >= min_rounds and time.perf_counter() - start > seconds:
                break
            for name in names[r % len(names) :] + names[: r % len(names)]:
                used = sum(s for s in times[name] if not math.isnan(s))
                rests = r > 0 and used > share and name != reference
                times[name].append(math.nan if rests else timers[name]())
            gc.collect()
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(values) for name, values in times.items()}


def timer(run: Callable[[], Any], prepare: Callable[[], Any] | None, device: str, steps: int = 1) -> Timer:
    """Time `run`, after an untimed `prepare`; on a GPU by CUDA events, with the caches emptied as triton.testing does.

    Where the host takes longer to launch a run than the device to do it, the time is the host's. Of a run that takes
    several steps, the time is that of one.
    """
    if steps > 1:
        whole = timer(run, prepare, device)
        return lambda: whole() / steps
    if device == "cuda":
        return _gpu_timer(run, prepare)

    def once() -> float:
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return once


def _gpu_timer(run: Callable[[], Any], prepare: Callable[[], Any] | None) -> Timer:
    import triton

    driver = triton.runtime.driver.active
    cache = _cache_to_empty()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        if prepare is not None:
            prepare()
        driver.clear_cache(cache)
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return once


@functools.cache
def _cache_to_empty() -> Any:
    """One for all contestants: it is hundreds of megabytes."""
    import triton

    return triton.runtime.driver.active.get_empty_cache_for_benchmark()


def kept_bytes(forward: Callable[[], Any], known: Sequence[Tensor]) -> int:
    """Bytes of memory that autograd keeps from forward to backward, each storage once, beyond those of `known`.

    Under the hooks that see them our layers keep an input that they would make again otherwise; the peak has it right.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del kept
    return sum(storages.values())


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most bytes held at one time by what `run` allocates: tensors, and on a CPU NumPy's arrays.

    On a CPU the two peaks are added, an upper bound, and `run` gets a thread of its own, so that buffers which a thread
    keeps from call to call are counted too. Scratch memory inside the GEMM library is not seen.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _start_profiler_library()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_cpu_peak, run).result()


@functools.cache
def _start_profiler_library() -> None:
    """It complains when its first use is not in the main thread."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        pass


def _cpu_peak(run: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    events = [e for e in (results.events() if results is not None else []) if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most + arrays


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
