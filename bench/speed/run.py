"""From cases to rows: check every provider, count its bytes, time all of them interleaved, write down what came out."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tables import rows as results
from . import measure, modes
from .cases import Case, Machine, Shape, short
from .check import OK, check_layer, check_module, check_steps
from .compare import BaseVersion
from .modes import Task
from .providers import DENSE, RELEASED, Provider, all_providers
from .sparse_providers import sparse_providers

REFERENCES = {"threshold": modes.KTHVALUE, "mask": RELEASED}  # what a ratio is over; dense in every other mode
LONGEST_SORT = 4.0  # seconds; released PST sorts every forward


@dataclass
class Options:
    device: str = "cpu"
    seconds: float = 8.0  # for one case
    min_rounds: int = 3
    max_rounds: int = 50
    warmup: int = 1
    adamw: str = "fused"
    only: Sequence[str] = ()  # names of providers beside dense; if empty, all but those of sparse_providers.py,
    everyone: bool = False  # or, with this, those too
    base: BaseVersion | None = None
    say: Callable[[str], None] = print
    providers: list[Provider] = field(default_factory=list)

    def __post_init__(self) -> None:
        usual = self.providers or all_providers(self.device)
        known_ones = usual if self.providers else [*usual, *sparse_providers()]
        chosen = known_ones if self.everyone or self.only else usual
        wanted = [p for p in chosen if not self.only or p.name in self.only or p.name == DENSE]
        if unknown := set(self.only) - {p.name for p in known_ones}:
            known = ", ".join(provider.name for provider in known_ones)
            raise ValueError(f"--providers {', '.join(unknown)}: not known; there are {known}")
        self.providers = wanted


@dataclass
class Contestant:
    """A row in the making."""

    name: str
    check: str
    timer: measure.Timer
    task: Task | None  # None for one that runs in another process


def run_case(case: Case, options: Options) -> list[results.Row]:
    """All rows of a case. A provider whose check fails, or whose reference's did, gets no ratio."""
    contestants, held = [], {}
    for contestant in _contestants(case, options):
        with _left_out_if_it_fails(contestant.name, case, options):
            held[contestant.name] = _bytes(contestant.task, options.device)  # a run, which also warms up
            contestants.append(contestant)
    checks = {c.name: c.check for c in contestants}
    reference = REFERENCES.get(case.mode, DENSE)
    timers = {c.name: c.timer for c in contestants}
    timings = measure.interleaved(
        timers, options.seconds, reference=reference, min_rounds=options.min_rounds, max_rounds=options.max_rounds,
        warmup=options.warmup,
    )  # fmt: skip
    rows = []
    for contestant in contestants:
        timing = timings[contestant.name]
        allowed = contestant.check == OK and checks.get(reference) == OK
        ratio = timing.ratio_to(timings[reference]) if allowed else None
        rows.append(
            _row(case, options, contestant, timing.quantiles, timing.rounds, ratio, reference, held[contestant.name])
        )
        if contestant.check != OK:
            options.say(f"{contestant.name} is wrong in {case}: {contestant.check}; no ratio is given")
    return rows


def _contestants(case: Case, options: Options) -> Iterator[Contestant]:
    if case.mode == "threshold":
        for name, task in modes.threshold_tasks(case, options.device).items():
            check = modes.check_threshold(name, case, task, options.device)
            yield Contestant(name, check, measure.timer(task.run, task.prepare, options.device), task)
    else:
        for provider in options.providers:
            sort = provider.sort_seconds_per_weight * case.shape.numel
            if options.device == "cpu" and sort > LONGEST_SORT:
                options.say(f"{provider.name} is left out of {case}: its sort alone takes about {sort:.0f} s")
                continue
            one = None
            with _left_out_if_it_fails(provider.name, case, options):
                one = task_of(provider, case, options)
            if one is not None:
                check = checked(provider, case, options.device, options.adamw)
                timer = measure.timer(one.run, one.prepare, options.device, one.steps)
                yield Contestant(provider.name, check, timer, one)
    if options.base is not None:
        yield from (Contestant(name, check, timer, None) for name, check, timer in options.base.timers(case, options))


@contextlib.contextmanager
def _left_out_if_it_fails(name: str, case: Case, options: Options) -> Iterator[None]:
    """One that cannot run a case, for want of memory say, loses the others neither this case nor the next."""
    try:
        yield
    except Exception as error:
        options.say(f"{name} is left out of {case}: {type(error).__name__}: {error}")


def task_of(provider: Provider, case: Case, options: Options) -> Task | None:
    if case.mode == "model":
        return modes.model_task(provider, options.device, options.adamw) if provider.trains else None
    return modes.layer_task(provider, case, options.device, options.adamw)


def checked(provider: Provider, case: Case, device: str, adamw: str) -> str:
    """The correctness check of a provider for a case: "ok" or what is wrong."""
    steps = _check_steps(provider, device, adamw) if case.mode in ("step", "model") else OK
    if steps != OK:
        return steps
    if case.mode == "model":
        return _check_model(provider, device)
    return _check_layer(provider, case.shape, case.dtype, device)


@functools.cache
def _check_steps(provider: Provider, device: str, adamw: str) -> str:
    return check_steps(provider, lambda layer: modes.adamw(layer, adamw), device)


@functools.cache
def _check_layer(provider: Provider, shape: Shape, dtype: torch.dtype, device: str) -> str:
    return check_layer(provider, shape, dtype, device)


@functools.cache
def _check_model(provider: Provider, device: str) -> str:
    """One block of the model with its embeddings and head, dropout off, against float64."""

    def logits(model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens).logits

    try:
        with provider.active():
            model = provider.model(modes.minilm(device, layers=1, vocabulary=500)).eval()
            modes.settle_layers(model, provider)
            return check_module(provider, model, logits, torch.arange(96, device=device).view(4, 24))
    except Exception as error:  # a provider's failure is its result
        return f"raised {type(error).__name__}: {error}"


def _bytes(task: Task | None, device: str) -> dict[str, int | None]:
    if task is None:
        return dict.fromkeys(("kept_bytes", "peak_bytes", "parameter_bytes", "optimizer_bytes", "trainable"))
    if task.clear is not None:
        task.clear()
    if task.prepare is not None:
        task.prepare()
    peak = measure.peak_bytes(task.run, device)
    return {
        "kept_bytes": None if task.forward is None else measure.kept_bytes(task.forward, task.known()),
        "peak_bytes": peak,
        "parameter_bytes": task.parameter_bytes(),
        "optimizer_bytes": None if task.optimizer is None else measure.optimizer_bytes(task.optimizer),
        "trainable": task.trainable(),
    }


def _row(
    case: Case, options: Options, contestant: Contestant, time: measure.Quantiles, rounds: int,
    ratio: measure.Quantiles | None, reference: str, held: dict[str, int | None],
) -> results.Row:  # fmt: skip
    if ratio is not None and math.isnan(ratio.median):
        ratio = None
    return results.Row(
        provider=contestant.name, mode=case.mode, shape=case.shape.name,
        out_features=case.shape.out, in_features=case.shape.columns,
        tokens=case.tokens, dtype=short(case.dtype), device=options.device,
        median_ms=1e3 * time.median, p20_ms=1e3 * time.p20, p80_ms=1e3 * time.p80, rounds=rounds,
        ratio=None if ratio is None else ratio.median,
        ratio_p20=None if ratio is None else ratio.p20, ratio_p80=None if ratio is None else ratio.p80,
        ratio_to=reference, check=contestant.check, **held,
        adamw=options.adamw if case.mode in ("step", "model") else "",
        machine=results.machine(), threads=torch.get_num_threads(), versions=results.versions(),
        date=results.today(),
        commit=options.base.commit if contestant.task is None and options.base else results.commit(),
    )  # fmt: skip


def machine(device: str, gemm: dict[torch.dtype, float], longest_step: float) -> Machine:
    """Free memory of the device now, of which the benchmark may use four fifths."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = 1 << 62
        with contextlib.suppress(OSError):
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return Machine(int(0.8 * free), gemm, longest_step)
