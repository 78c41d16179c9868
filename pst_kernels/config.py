"""PSTConfig: every setting of the method, validated when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import read_json, write_json
from .masks import patterns

CONFIG_NAME = "pst_config.json"
ALL_LINEAR = "all-linear"
CHOICES = {
    "masked_weight": ("auto", "keep", "remake"),
    "products": ("auto", "dense", "sparse"),
    "magnitude": ("plain", "fisher"),
    "allocation": ("uniform", "global"),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

_STUDIED = {"beta": 1 / 16, "train_bias": True, "train_kept": True, "magnitude": "fisher", "dropout": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"modules_to_save": ()},
    "recipe": {"beta": 1 / 16, "train_bias": True},
    "accurate": _STUDIED,
    "fast": _STUDIED,  # and more, by pattern
}

WEIGHED_ABOVE = 0.5  # up to this sparsity the magnitudes of the last two are plain
AT_ONCE = 0.5  # and up to this one they prune all that goes before the first step
WORDS_RANK = 32  # of the update of the word embeddings, above WEIGHED_ABOVE
FULL = "full"  # embedding_rank of word embeddings that train in full, as with "accurate" below
WITH_KEPT_WEIGHTS = 0.2  # of the steps are frozen where kept weights are trained, if nothing else is said


class _DefaultCount(int):
    """A default that can be told from the same number given: the pattern may know a better one."""


class _DefaultFraction(float):
    """The same for a fraction."""


class _DefaultText(str):
    """The same for a text."""


Targets = str | Sequence[str] | Callable[[nn.Module, str], bool]


@dataclass
class PSTConfig:
    """Settings of Parameter-efficient Sparse Training; the defaults are those of the paper's release.

    Args:
        sparsity: fraction of each converted matrix that is pruned in the end, in [0, 1); of its blocks for "block:B".
            "N:M" is 1 - N/M, the default there and the only value allowed.
        initial_sparsity: fraction at which a `SparsitySchedule` starts, in [0, sparsity].
        weight_rank: rank of the weight update, U (out, rank) and V (rank, in), at least 1.
        score_rank: rank of the learned importance, A (out, rank) and B (rank, in), at least 1.
        beta: factor of U V in the updated weight W' = W + beta U V. U starts at N(0, 1), so a step of Adam moves W' by
            about lr * beta * sqrt(weight_rank): at the default 1.0 take learning rates as for LoRA (3e-5 to 5e-4), at
            1 / sqrt(weight_rank) those of full fine-tuning.
        alpha1: factor of A B in the importance S = |W'| + alpha1 A B + alpha2 (R + C).
        alpha2: factor of R and C in it.
        through_magnitude: let the gradient pass through |W'| in the importance, as the release does.
        warmup: fraction of the steps at `initial_sparsity`.
        cooldown: fraction of the steps, at the end, at `sparsity`.
        target_modules: which linear layers to convert. "all-linear" means those inside repeated blocks (no embeddings,
            pooler or task head); any other string is a regular expression that must match the whole module name; a list
            holds name suffixes; a callable takes (module, name) and returns a bool.
        exclude_modules: layers to leave alone, as a regular expression, a list of suffixes or a callable.
        modules_to_save: name suffixes of modules to train in full and to save with the factors; None means the task
            head.
        train_bias: also train the biases of converted layers.
        adapter_dtype: dtype of the factors, whatever the base weight's; a torch dtype or its name.
        pattern: structure of the mask: "unstructured", "block:16", "block:32", "block:64" or "block:128" (whole blocks,
            which CPUs skip), or "N:M" such as "2:4" (at most N of every M neighbouring inputs are kept).
        masked_weight: "keep" M * W' from one change of the factors to the next (a number a weight more memory; each
            product is then one of the library), "remake" it for every product, or "auto" (layers/kept.py has the rule).
        products: how CPUs multiply by the masked weight in training: "sparse" with lists of the kept weights, "dense",
            or "auto", with lists where they are faster (cpu/lists.py has the rule). Other devices multiply densely;
            "sparse" is refused there. Compiled graphs (torch.compile) multiply densely.
        recompute_input: do not keep a layer's input for backward where it can be made again from what autograd keeps
            anyway: after GELU, SiLU, a product of two activations, or an fp32 LayerNorm. Costs one pass over it.
        mask_interval: optimizer steps from one mask to the next, at least 1; the default is 16 for blocks, else 1. With
            blocks A, B, R and C get a gradient only on the last step before the next mask, zeros on the others.
        score_interval: optimizer steps from one gradient of A, B, R and C to the next, at least 1; on the others they
            get zeros, and U and V learn from the kept weights alone, which costs a fraction where CPUs skip the zeros.
            Blocks have their own rule, see `mask_interval`.
        freeze: fraction of a schedule's steps, at the end, in which the mask is fixed, at most `cooldown`: A, B, R and
            C rest then (no gradient), and every product skips what is pruned. It stays fixed after the schedule's end.
        allocation: "uniform", the same sparsity in every layer, or "global", one threshold over the scores of all
            layers, which a schedule applies; each layer keeps at least a quarter of its uniform share. For
            pattern="unstructured"; with `train_kept` in one process, where `pst_kept` gets its size at the freeze.
        train_kept: also train the kept weights themselves from the freeze on, as the parameter `pst_kept` of each
            layer, a number a kept weight. `freeze` is then 0.2 unless given. Give it a learning rate of its own, that
            of dense fine-tuning.
        magnitude: "plain" |W'| in the importance, or "fisher": |W'| weighed by the root of its gradient's second moment
            (layers/fisher.py), of which rows and columns are summed up, out + in numbers a layer (one for each weight
            would be 4 bytes a weight). A mask then takes one copy of W at a time, and on a GPU backward makes G in
            plain PyTorch. For "unstructured" and "N:M", in one process, under DDP or `fully_shard`, not for experts.
        dropout: the highest probability of dropout, in [0, 1], that a module of the model holds while it is converted;
            None leaves all as they are. `merge_and_unload` gives back what they were. What a module reads from the
            model's own config at each forward (Falcon's attention) stays as it is.
        embedding_rank: rank of two factors through which the word embeddings learn, E + U V with E frozen; 0: they do
            not, and "full": E itself trains, and is saved. An embedding tied to an output layer cannot have it.

    Raises ValueError or TypeError that names the setting, its value and what is allowed.
    """

    sparsity: float = _DefaultFraction(0.9)
    initial_sparsity: float = 0.0
    weight_rank: int = 8
    score_rank: int = 8
    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0
    through_magnitude: bool = True
    warmup: float = 0.1
    cooldown: float = 0.3
    target_modules: Targets = ALL_LINEAR
    exclude_modules: Targets | None = None
    modules_to_save: Sequence[str] | None = None
    train_bias: bool = False
    adapter_dtype: torch.dtype = torch.float32
    pattern: str = "unstructured"
    mask_interval: int = _DefaultCount(1)
    recompute_input: bool = True
    masked_weight: str = "auto"
    products: str = "auto"
    score_interval: int = 1
    freeze: float = _DefaultFraction(0.0)
    train_kept: bool = False
    allocation: str = "uniform"
    magnitude: str = "plain"
    dropout: float | None = None
    embedding_rank: int | str = 0

    def __post_init__(self) -> None:
        self._follow_pattern()
        check_sparsity("sparsity", self.sparsity)
        check_sparsity("initial_sparsity", self.initial_sparsity)
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity={self.initial_sparsity} is above sparsity={self.sparsity};"
                " the schedule only rises, so start at or below the final sparsity"
            )
        for name in ("weight_rank", "score_rank", "mask_interval", "score_interval"):
            check_count(name, getattr(self, name), 1)
        _check_embedding_rank(self.embedding_rank)
        for name in ("beta", "alpha1", "alpha2"):
            _check_number(name, getattr(self, name), -math.inf, math.inf, "a finite number")
        for name in ("warmup", "cooldown", "freeze"):
            _check_number(name, getattr(self, name), 0.0, 1.0, "a fraction of the steps in [0, 1]")
        if self.dropout is not None:
            _check_number("dropout", self.dropout, 0.0, 1.0, "a probability in [0, 1], or None")
        if self.warmup + self.cooldown > 1.0:
            raise ValueError(
                f"warmup={self.warmup} and cooldown={self.cooldown} add up to more than 1; lower one of them"
            )
        for name in ("through_magnitude", "train_bias", "recompute_input", "train_kept"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; use one of {', '.join(known)}")
        if self.products == "sparse" and self.pattern != "unstructured":
            raise ValueError(
                f"products='sparse' is for pattern='unstructured', got pattern={self.pattern!r}; leave products out"
            )
        if self.products == "sparse" and self.masked_weight == "keep":
            raise ValueError("products='sparse' and masked_weight='keep' exclude one another; leave one of them out")
        self._check_rest()
        if self.magnitude == "fisher" and patterns.parse(self.pattern).block_size is not None:
            raise ValueError(
                f"magnitude='fisher' is for pattern='unstructured' or 'N:M', got pattern={self.pattern!r}; leave it out"
            )
        if self.allocation == "global" and self.pattern != "unstructured":
            raise ValueError(
                f"allocation='global' is for pattern='unstructured', got pattern={self.pattern!r}: how many weights a"
                " layer keeps must not be fixed beforehand; leave it out"
            )
        self.adapter_dtype = _dtype(self.adapter_dtype)
        self.target_modules = _targets("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            self.exclude_modules = _targets("exclude_modules", self.exclude_modules)
        if self.modules_to_save is not None:
            self.modules_to_save = _names("modules_to_save", self.modules_to_save)

    def _check_rest(self) -> None:
        """The settings of steps in which the scores rest."""
        if isinstance(self.freeze, _DefaultFraction):
            self.freeze = min(WITH_KEPT_WEIGHTS, self.cooldown) if self.train_kept else 0.0
        of_blocks = patterns.parse(self.pattern).block_size is not None
        if self.score_interval > 1 and of_blocks:
            raise ValueError(
                f"score_interval={self.score_interval} is not for pattern={self.pattern!r}, whose scores learn on the"
                " last step before each mask; set mask_interval instead"
            )
        if self.train_kept and of_blocks:
            raise ValueError(
                f"train_kept=True is for pattern='unstructured' or 'N:M', got pattern={self.pattern!r}; leave it out"
            )
        if self.freeze > self.cooldown:
            raise ValueError(
                f"freeze={self.freeze} is above cooldown={self.cooldown}, but a mask can be fixed only once the"
                " sparsity has reached its end; raise cooldown or lower freeze"
            )
        if self.train_kept and self.freeze == 0.0:
            raise ValueError("train_kept=True needs steps with a fixed mask, got freeze=0.0; set freeze=0.2, say")

    def _follow_pattern(self) -> None:
        pattern = patterns.parse(self.pattern)
        if isinstance(self.mask_interval, _DefaultCount):
            self.mask_interval = pattern.mask_interval
        given, only = self.sparsity, pattern.sparsity
        if isinstance(given, _DefaultFraction):
            self.sparsity = float(given) if only is None else only
        elif only is not None and check_sparsity("sparsity", given) and not math.isclose(given, only, abs_tol=1e-6):
            raise ValueError(
                f"sparsity={given} does not fit pattern={self.pattern!r}, which prunes {only:.6g}; leave sparsity out"
            )

    @property
    def embedding_rank_is_the_presets(self) -> bool:
        """Whether nobody asked for it by itself, so that a model whose embeddings cannot have it goes without."""
        return isinstance(self.embedding_rank, _DefaultCount | _DefaultText)

    @property
    def embedding_factor_rank(self) -> int:
        """Rank of the two factors of the word embeddings; 0 where there are none, as where these train in full."""
        return 0 if self.embedding_rank == FULL else int(self.embedding_rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Raises TypeError when a setting is a callable, which no file can hold."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("target_modules", "exclude_modules"):
            if callable(values[name]):
                raise TypeError(
                    f"{name} is a callable and cannot be saved; use a regular expression or a list of names"
                )
        return values | {"adapter_dtype": str(self.adapter_dtype).removeprefix("torch.")}

    @classmethod
    def preset(cls, name: str, **settings: Any) -> PSTConfig:
        """Settings by name, and those given on top of them.

        "paper": the defaults. "released": the same, and the task head stays as it is, random or not, as in the authors'
        release. "recipe": that of the accuracy study, smaller steps of U V and trained biases; it wants the LayerNorms
        among `modules_to_save` beside the head, and the learning rates of `parameter_groups`. "accurate": the recipe,
        with magnitude="fisher" and embedding_rank=32 above 50 %, without dropout, and with kept weights trained once
        the mask is fixed, in the last 70 % of the steps; up to 50 % word embeddings train in full, and all weights that
        go, if they go one by one, do so before the first step. "fast": the same, but A, B, R and C learn on every other
        step until the mask is fixed, and up to 50 % word embeddings do not learn.

        Raises ValueError for another name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; give one of {', '.join(PRESETS)}")
        found = PRESETS[name] | settings
        plain = cls(**(found | {"magnitude": "plain"}))
        sparsity, of_blocks = plain.sparsity, patterns.parse(plain.pattern).block_size is not None
        if "magnitude" not in settings and (sparsity <= WEIGHED_ABOVE or of_blocks):
            found["magnitude"] = "plain"
        if found.get("train_kept") and "freeze" not in found and "cooldown" not in found:
            found["freeze"] = found["cooldown"] = 0.7
            if sparsity > WEIGHED_ABOVE:
                found.setdefault("warmup", 0.0)  # the weights have few steps to go in
        if PRESETS[name] is _STUDIED and sparsity <= AT_ONCE and plain.pattern == "unstructured":
            found.setdefault("initial_sparsity", sparsity)
            found.setdefault("warmup", 0.0)
        if PRESETS[name] is _STUDIED and sparsity > WEIGHED_ABOVE:
            found.setdefault("embedding_rank", _DefaultCount(WORDS_RANK))
        elif name == "accurate":
            found.setdefault("embedding_rank", _DefaultText(FULL))
        if name == "fast" and not of_blocks:
            found.setdefault("score_interval", 2)
        return cls(**found)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PSTConfig:
        """The inverse of `to_dict`. Raises ValueError for an unknown setting, naming the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                raise ValueError(f"{name!r} is not a setting of PSTConfig{hint}")
        return cls(**values)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `pst_config.json` into a directory, which is made if need be."""
        write_json(Path(directory) / CONFIG_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> PSTConfig:
        """Read `pst_config.json`. Raises FileNotFoundError when it is absent, ValueError when it is damaged."""
        return cls.from_dict(
            read_json(Path(directory) / CONFIG_NAME, "a configuration saved by PSTConfig.save_pretrained")
        )


def matches(targets: Targets, module: nn.Module, name: str) -> bool:
    """Whether a module name meets a regular expression (in full), a list of suffixes, or a callable."""
    if callable(targets):
        return bool(targets(module, name))
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in targets)


def check_sparsity(name: str, value: Any) -> float:
    """A float in [0, 1), or an error that names the argument."""
    _check_number(name, value, 0.0, 1.0, "a fraction in [0, 1)")
    if value >= 1.0:
        raise ValueError(f"{name} must be a fraction in [0, 1), got {value!r}; 0.9 keeps a tenth of the weights")
    return float(value)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise an error that names the argument unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be a whole number of at least {least}, got {value!r} of type {type(value).__name__}"
        )
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_embedding_rank(value: Any) -> None:
    if isinstance(value, str):
        if value != FULL:
            raise ValueError(f"embedding_rank={value!r} is not known; give a rank, or {FULL!r}")
    else:
        check_count("embedding_rank", value, 0)


def _check_number(name: str, value: Any, low: float, high: float, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise an error that names the argument unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number above 0, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def _dtype(value: Any) -> torch.dtype:
    dtype: Any = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype not in DTYPES.values():
        raise ValueError(f"adapter_dtype={value!r} is not supported; use one of {', '.join(DTYPES)}")
    return dtype


def _targets(name: str, value: Any) -> Targets:
    if callable(value):
        return value
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{name}={value!r} is not a regular expression ({error}); pass a list to match suffixes"
            ) from error
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    raise TypeError(f"{name} must be a regular expression, a list of suffixes or a callable, got {value!r}")


def _names(name: str, value: Any) -> list[str]:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    hint = f"; use [{value!r}]" if isinstance(value, str) else ""
    raise TypeError(f"{name} must be a list of names, got {value!r}{hint}")
