"""The methods of the grid by name, and the few settings that each is tuned over.

Every baseline is tuned over equally many settings, but one of a fixed rate; each range holds what its paper or common
use gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from pst_kernels import Distillation

from .. import baselines
from .methods import (
    NORMS,
    WORDS,
    Method,
    Plan,
    Setting,
    dense,
    lora,
    preset,
    pst,
    trains_all,
    variant,
    wanda_lora,
    with_dropout,
)

WEIGHT_RATES = tuple({"weights": rate} for rate in (5e-5, 2e-4, 8e-4))
FACTOR_RATES = tuple({"factors": rate} for rate in (5e-4, 2e-3, 8e-3))
PST_RATES = tuple({"factors": rate, "scores": rate} for rate in (1.25e-4, 5e-4, 2e-3))
PENALISED = tuple({"weights": 2e-4, "scores": 1e-1, "penalty": penalty} for penalty in (125.0, 400.0, 1600.0))

PST, DENSE = "PST", "dense"
BASELINES = (
    Method(DENSE, dense, WEIGHT_RATES, sparse=False),
    Method("LoRA", lora, FACTOR_RATES, sparse=False),
    Method("magnitude", trains_all(baselines.Magnitude), WEIGHT_RATES),
    # where validation chose the highest rate, at which another seed may diverge
    Method("magnitude, at 2e-4", trains_all(baselines.Magnitude), WEIGHT_RATES[1:2]),
    Method("movement", trains_all(baselines.Movement), tuple(setting | {"scores": 1e-2} for setting in WEIGHT_RATES)),
    Method("soft movement", trains_all(baselines.SoftMovement), PENALISED),
    Method("L0", trains_all(baselines.HardConcrete), PENALISED),
    Method("Wanda + LoRA", wanda_lora, FACTOR_RATES),
    Method("PST as released", pst(head=False), PST_RATES),
    Method(PST, pst(), PST_RATES),
)

ABLATIONS = (
    *(
        Method(f"PST, score of {' and '.join(parts)}", variant(parts), like=PST)
        for parts in (("W",), ("AB",), ("RC",), ("W", "AB"), ("W", "RC"), ("AB", "RC"))
    ),
    *(Method(f"PST, rank {rank}", pst(weight_rank=rank, score_rank=rank), like=PST) for rank in (1, 2, 4, 16, 32)),
    Method("PST, not through |W'|", pst(through_magnitude=False), like=PST),
    Method("PST, head frozen", pst(head=False), like=PST),
    Method("PST, LayerNorm and biases trained", pst(also=NORMS, train_bias=True), like=PST),
    Method("PST, mask every 4 steps", pst(mask_interval=4), like=PST),
    Method("PST, mask every 16 steps", pst(mask_interval=16), like=PST),
    Method("PST, alpha 0.25", pst(alpha1=0.25, alpha2=0.25), like=PST),
    Method("PST, alpha 4", pst(alpha1=4.0, alpha2=4.0), like=PST),
    Method("PST, input norms as in Wanda", variant(wanda=True), like=PST),
)

# Blocks learn their scores on the last step before a mask: 4, not the default 16, as 120 steps would make 8 masks.
BLOCK_INTERVAL = 4
PATTERNS = (
    *(
        Method(
            f"PST, block:{size}",
            pst(pattern=f"block:{size}", mask_interval=BLOCK_INTERVAL),
            like=PST,
        )
        for size in (16, 32)
    ),
    Method("PST, 2:4", pst(pattern="2:4"), like=PST, only=0.5),
)


def _rates(*pairs: tuple[float, float]) -> tuple[Setting, ...]:
    return tuple({"factors": factors, "scores": scores} for factors, scores in pairs)


def _candidate(name: str, convert: Any, grid: tuple[Setting, ...], **more: Any) -> Method:
    return Method(f"candidate: {name}", convert, grid, **more, candidate=True)


LOGITS = Distillation(temperature=2.0, hardness=0.5)
LOGITS_AND_STATES = Distillation(temperature=2.0, hardness=0.5, hidden_weight=1.0)
FREE: dict[str, Any] = {"also": NORMS, "train_bias": True}
# U moves as well as V: a rate 16 times as large makes the same step of W'
SMALL: dict[str, Any] = {"beta": 1 / 16}
ONE_RATE = tuple(dict.fromkeys(("factors", "scores", "weights", "head"), rate) for rate in (1e-3, 2e-3, 4e-3))
FOUND = _candidate("norms, small beta", pst(**FREE, **SMALL), _rates((5e-4, 5e-4), (2e-3, 5e-4), (8e-3, 5e-4)))
FOUND_AND_LOGITS = replace(FOUND, name=f"{FOUND.name}, logits", distillation=LOGITS)
LOGITS_AND_MORE_STATES = Distillation(temperature=2.0, hardness=0.5, hidden_weight=10.0)
FOUND_AND_STATES = replace(
    FOUND, name=f"{FOUND.name}, logits and states", distillation=LOGITS_AND_MORE_STATES, grid=FOUND.grid[::-1]
)
DECODER: dict[str, Any] = {**FREE, **SMALL, "decoder": True}
SLOW_DECODER = ({"factors": 8e-3, "scores": 5e-4, "weights": 2e-4},)
SCREENED = (
    _candidate("decoder, logits", pst(**DECODER), _rates((8e-3, 5e-4)), distillation=LOGITS),
    _candidate("decoder, logits and states", pst(**DECODER), _rates((8e-3, 5e-4)), distillation=LOGITS_AND_MORE_STATES),
    _candidate("decoder, slow", pst(**DECODER), SLOW_DECODER),
    _candidate("decoder", pst(**DECODER), _rates((8e-3, 5e-4), (8e-3, 3e-5), (2e-3, 3e-5), (3.2e-2, 3e-5))),
    _candidate("decoder, early", pst(**DECODER, warmup=0.0, cooldown=0.6), _rates((8e-3, 3e-5))),
    _candidate("decoder, rank 32", pst(**DECODER, weight_rank=32), _rates((8e-3, 3e-5))),
    _candidate("low score rate", pst(**FREE, **SMALL), _rates((8e-3, 3e-5))),
    _candidate("low score rate, early", pst(**FREE, **SMALL, warmup=0.0, cooldown=0.6), _rates((8e-3, 3e-5))),
)
# Of the presets: when the mask is fixed, and what trains from there on. One rate, from which all others follow.
LRS = tuple({"lr": rate} for rate in (5e-5, 1.5e-4, 4.5e-4))
LR = LRS[1:2]
KEPT_RATES = tuple(LR[0] | {"kept": rate} for rate in (2e-4, 3.5e-4, 7.5e-4))
RESTED: dict[str, Any] = {"score_interval": 4}
RESTED_HALF: dict[str, Any] = {**RESTED, "freeze": 0.5, "cooldown": 0.5}
FIXED_EARLY: dict[str, Any] = {"freeze": 0.7, "cooldown": 0.7, "warmup": 0.0}


FROZEN_WORDS: dict[str, Any] = {"embedding_rank": 0}


def _accurate(decoder: bool = False, also: tuple[str, ...] = (), **settings: Any) -> Any:
    """The preset as it was before its word embeddings learned."""
    return preset("accurate", decoder, also, **FROZEN_WORDS, **settings)


def _fast(decoder: bool = False, **settings: Any) -> Any:
    return preset("fast", decoder, **FROZEN_WORDS, **settings)


def _plain(**settings: Any) -> Any:
    """The preset as it was: with plain magnitudes, and the mask fixed later."""
    return _fixed_later(magnitude="plain", **settings)


def _fixed_later(decoder: bool = False, **settings: Any) -> Any:
    """The preset as it was for a while: the mask fixed the earlier the fewer weights go."""

    def convert(model: Any, plan: Plan) -> None:
        share = round(min(0.7, max(0.3, 1.2 - plan.sparsity)), 3)
        given = {"freeze": share, "cooldown": share, "warmup": 0.1} | settings
        _step_by_step(decoder, **given)(model, plan)

    return convert


def _step_by_step(decoder: bool = False, **settings: Any) -> Any:
    """The preset as it was up to 50 %, where all that goes does so before the first step now."""

    def convert(model: Any, plan: Plan) -> None:
        given = {"initial_sparsity": 0.0, "warmup": 0.1 if plan.sparsity <= HALF else 0.0} | settings
        _accurate(decoder, **given)(model, plan)

    return convert


HALF, LATER, STEP_BY_STEP = 0.5, "mask fixed later", "step by step"
FISHER = _candidate("accurate, Fisher", _step_by_step(magnitude="fisher"), LRS)
FISHER_LATER = _candidate(f"accurate, Fisher, {LATER}", _fixed_later(magnitude="fisher"), LRS)
PLAIN = _candidate("accurate, frozen at 70 %", _plain(freeze=0.3, cooldown=0.3, warmup=0.1), LRS)
FIXED_AT_A_FIFTH: dict[str, Any] = {"freeze": 0.8, "cooldown": 0.8, "warmup": 0.0, "magnitude": "fisher"}
FASTER = (
    FISHER_LATER,
    _candidate("accurate, Fisher, scores rest", _step_by_step(magnitude="fisher", score_interval=2), LR),
    _candidate("accurate, Fisher, fixed after a fifth", _step_by_step(**FIXED_AT_A_FIFTH), LR),
    _candidate(
        "accurate, Fisher, fixed after a fifth, scores rest",
        _step_by_step(**FIXED_AT_A_FIFTH, score_interval=2),
        LR,
    ),
)
AT_ONCE: dict[str, Any] = {"initial_sparsity": HALF, "warmup": 0.0}
HALVED = (
    _candidate("accurate, half at once", _accurate(**AT_ONCE), LRS[:2]),
    _candidate("accurate, half at once, scores rest", _accurate(**AT_ONCE, score_interval=2), LRS[:2]),
    _candidate("accurate, half at once, scores rest thrice", _accurate(**AT_ONCE, score_interval=4), LRS[:2]),
)
TAUGHT: dict[str, Any] = {"distillation": LOGITS_AND_MORE_STATES}
WITHOUT_DROPOUT = (
    _candidate("magnitude, distilled", trains_all(baselines.Magnitude), WEIGHT_RATES[1:2], **TAUGHT),
    _candidate("fast", _fast(), LR),
    _candidate("accurate, distilled", _accurate(), LR, **TAUGHT),
    _candidate(f"accurate, {STEP_BY_STEP}, distilled", _step_by_step(), LR, **TAUGHT),
)
WITH_DROPOUT = tuple(
    replace(one, name=f"{one.name}, with dropout", convert=with_dropout(one.convert))
    for one in (_candidate("dense", dense, WEIGHT_RATES[:2], sparse=False), *WITHOUT_DROPOUT)
)
TAUGHT_TOO = (
    _candidate("fast, distilled", _fast(), LR, **TAUGHT),
    _candidate("accurate, half at once, distilled", _accurate(**AT_ONCE), LR, **TAUGHT),
    _candidate(f"accurate, {LATER}, plain magnitudes, distilled", _plain(), LR, **TAUGHT),  # as in very short jobs
    _candidate("accurate, distilled, rate of kept weights", _accurate(), (LR[0] | {"kept": 2.5e-4},), **TAUGHT),
)
FASTER_WORDS = _candidate(
    "magnitude, words trained faster, distilled",
    trains_all(baselines.Magnitude),
    tuple(rates | {"embeddings": 3e-3} for rates in WEIGHT_RATES[1:]),
    **TAUGHT,
)
# Beside "accurate, distilled": what else might bring it ahead of magnitude pruning, which trains all there is.
AHEAD = (
    _candidate(
        "accurate, words trained, distilled",
        _accurate(also=(WORDS,)),
        tuple(LR[0] | {"embeddings": rate} for rate in (1.5e-4, 7.5e-4)),
        **TAUGHT,
    ),
    _candidate(
        "accurate, words trained faster, distilled",
        _accurate(also=(WORDS,)),
        tuple(LR[0] | {"embeddings": rate} for rate in (1.5e-3, 3e-3)),
        **TAUGHT,
    ),
    *(
        _candidate(
            f"accurate, words of rank {rank}, distilled",
            preset("accurate", embedding_rank=rank),
            tuple(LR[0] | {"embeddings": rate} for rate in rates),
            **TAUGHT,
        )
        for rank, rates in ((8, (1e-2,)), (16, (3e-3, 1e-2)), (32, (3e-3, 1e-2)))
    ),
    # what magnitude pruning and dense fine-tuning gain by such a rate
    FASTER_WORDS,
    _candidate("dense, words trained faster", dense, (WEIGHT_RATES[1] | {"embeddings": 3e-3},), sparse=False),
    _candidate("accurate, higher rate, distilled", _accurate(), ({"lr": 2.5e-4},), **TAUGHT),
    _candidate("accurate, slower head, distilled", _accurate(), (LR[0] | {"others": 5e-4},), **TAUGHT),
    _candidate("accurate, small update, distilled", _accurate(), (LR[0] | {"update": 3e-4},), **TAUGHT),
    _candidate("accurate, rank 32, distilled", _accurate(weight_rank=32), LR, **TAUGHT),
)
FREEZES = (
    PLAIN,
    _candidate("accurate, frozen at 50 %", _plain(freeze=0.5, cooldown=0.5, warmup=0.0), LR),
    _candidate("accurate, frozen at 30 %", _plain(**FIXED_EARLY), LR),
    _candidate("accurate, frozen at 10 %", _plain(freeze=0.9, cooldown=0.9, warmup=0.0), LR),
    _candidate("accurate, rate of kept weights", _plain(), KEPT_RATES),
    _candidate("fast, half at once", _plain(**RESTED_HALF, initial_sparsity=0.5), LR),
    _candidate("fast, 70 % at once", _plain(**RESTED_HALF, initial_sparsity=0.7), LR, only=0.9),
    _candidate("fast, nothing at once", _plain(**RESTED_HALF), LR),
    _candidate("fast, mask fixed as in accurate", _plain(**RESTED), LR),
    _candidate("fast, half at once, frozen at 30 %", _plain(**FIXED_EARLY, initial_sparsity=0.5), LRS, only=0.9),
    _candidate("fast, 70 % at once, frozen at 30 %", _plain(**FIXED_EARLY, initial_sparsity=0.7), LRS, only=0.9),
    _candidate("accurate, as it is", _plain(), LR),
    _candidate("accurate, one threshold", _plain(allocation="global"), LR),
    FISHER,
    _candidate("accurate, rank 32", _plain(weight_rank=32), LR),
    _candidate("accurate, rank 64", _plain(weight_rank=64), LR),
    _candidate("accurate, rank 32, Fisher", _fixed_later(weight_rank=32, magnitude="fisher"), LR),
    _candidate("accurate, Fisher, one threshold", _fixed_later(allocation="global", magnitude="fisher"), LRS),
    _candidate(
        "accurate, rank 32, Fisher, one threshold",
        _fixed_later(weight_rank=32, allocation="global", magnitude="fisher"),
        LR,
    ),
    _candidate("recipe, one rate", preset("recipe"), LR),
    _candidate("recipe, frozen at 70 %", preset("recipe", freeze=0.3), LR),
)
CANDIDATES = (
    FOUND,
    FOUND_AND_LOGITS,
    FOUND_AND_STATES,
    *SCREENED,
    *FASTER,
    *HALVED,
    *WITHOUT_DROPOUT,
    *WITH_DROPOUT,
    *TAUGHT_TOO,
    *AHEAD,
    *FREEZES,
    _candidate("one rate", pst(**FREE, **SMALL, alpha1=1 / 4, alpha2=1 / 4), ONE_RATE),
    _candidate("norms", pst(**FREE), _rates((3e-5, 5e-4), (1.25e-4, 5e-4), (5e-4, 5e-4))),
    _candidate("norms, logits", pst(**FREE), _rates((1.25e-4, 5e-4)), distillation=LOGITS),
    _candidate("norms, early", pst(**FREE, warmup=0.0, cooldown=0.5), _rates((1.25e-4, 5e-4))),
    _candidate("norms, logits and states", pst(**FREE), _rates((1.25e-4, 5e-4)), distillation=LOGITS_AND_STATES),
)


def _adopted(candidate: Method, name: str) -> Method:
    """The recipe that a candidate became: the same, at the rates that validation chose for it, but tested."""
    return replace(candidate, name=name, grid=(), like=candidate.name, candidate=False)


def _taught(name: str, make: Callable[..., Any], candidate: Method) -> Iterator[Method]:
    """A recipe that learns from the dense model, at the rates of a candidate; what makes it is told of a decoder."""
    like = candidate.name
    yield Method(f"{name}, distilled", make(), like=like, **TAUGHT)
    yield Method(f"{name}, distilled, decoder trained", make(decoder=True), like=like, **TAUGHT)


def _each_way(name: str, make: Callable[..., Any]) -> tuple[Method, ...]:
    """A preset by itself, and taught, at the rates of "accurate" with weighed magnitudes."""
    return Method(name, make(), like=FISHER.name), *_taught(name, make, FISHER)


RECIPES: tuple[Method, ...] = (
    _adopted(FOUND, "PST, our recipe"),
    _adopted(FOUND_AND_STATES, "PST, our recipe, distilled"),
    # as much beside the blocks as for the methods that train everything; topics have no decoder
    Method(
        "PST, our recipe, distilled, decoder trained",
        pst(**DECODER),
        like=FOUND_AND_STATES.name,
        distillation=LOGITS_AND_MORE_STATES,
    ),
    # what distillation alone does, at the rates chosen without it
    Method("magnitude, distilled", trains_all(baselines.Magnitude), like="magnitude", **TAUGHT),
    _adopted(FASTER_WORDS, "magnitude, words trained faster, distilled"),
    *_each_way("PST, fast", partial(preset, "fast")),
    *_each_way("PST, accurate", partial(preset, "accurate")),
)
# What the presets were: above 50 % with frozen word embeddings, at 50 % step by step, with weighed magnitudes there,
# then with the mask fixed later, plain magnitudes, and weights pruned before the first step.
RECIPES += (
    *_each_way("PST, fast, words frozen", _fast),
    *_each_way("PST, fast, half at once", partial(_fast, **AT_ONCE)),  # above 50 % too
    *_each_way("PST, accurate, words frozen", _accurate),
    *_each_way(f"PST, accurate, {STEP_BY_STEP}", _step_by_step),
    *_each_way("PST, accurate, weighed", partial(_step_by_step, magnitude="fisher")),
    Method(f"PST, accurate, {LATER}", _fixed_later(), like=FISHER_LATER.name),
    Method(f"PST, accurate, {LATER}, at 1.5e-4", _fixed_later(), LR),  # validation had chosen the highest
    *_taught(f"PST, accurate, {LATER}", _fixed_later, FISHER_LATER),
    Method("PST, accurate, plain magnitudes", _accurate(magnitude="plain"), like=PLAIN.name),
    Method(f"PST, accurate, {LATER}, plain magnitudes", _plain(), like=PLAIN.name),
    *_taught(f"PST, accurate, {LATER}, plain magnitudes", _plain, PLAIN),
    Method("PST, accurate, mask fixed after half", _plain(freeze=0.5, cooldown=0.5), like=PLAIN.name),
    Method("PST, fast, 70 % at once", _plain(**FIXED_EARLY, initial_sparsity=0.7), like=PLAIN.name),
)
METHODS = {method.name: method for method in (*BASELINES, *RECIPES, *ABLATIONS, *PATTERNS, *CANDIDATES)}


def tuned_as(method: Method) -> Method:
    """Whose settings it takes: its own, or those of the method that it is like."""
    return METHODS[method.like] if method.like else method
