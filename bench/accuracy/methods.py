"""What a method is: how it converts a model, which rate each parameter takes, and how far its masks are.

A setting maps the role of a parameter to its learning rate: "weights" (everything pretrained), "factors" (low-rank
updates), "scores" (what only decides the mask) and "head" (what is new); "penalty" is the factor of a method's penalty.
`catalogue` lists the methods and the settings that each is tuned over. The head's rate is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pst_kernels import Distillation, PSTConfig, SparsitySchedule, parameter_groups, replace_linear
from pst_kernels.layers.pst_layer import PSTLayer
from pst_kernels.schedule import sparsity_at
from pst_kernels.targets import find_targets

from .. import baselines
from ..baselines.pst_variant import PARTS
from .tasks import Batch, Task

Setting = dict[str, float]
HEAD_RATE = 1e-3
RANK = 8
LORA_RANK = 2 * RANK  # as many numbers as PST's two products of rank 8
NORMS = ("LayerNorm",)
WORDS = "word_embeddings"
BERT_DROPOUT = 0.1
SCORES = ("mask_scores", "gate_scores", "pst_A", "pst_B", "pst_R", "pst_C")
FACTORS = ("pst_U", "pst_V", "lora_A", "lora_B")


@dataclass(frozen=True)
class Plan:
    """What a conversion may look at: the task, the target, and training data for calibration."""

    task: Task
    sparsity: float
    seed: int

    def norms(self, model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
        """The 2-norm of every input feature of the layers over the calibration tokens, padding left out."""
        return _input_norms(model, layers, self.task.calibration(self.seed))


@dataclass(frozen=True)
class Method:
    """`convert(model, plan)` makes the layers and sets what trains.

    `like`: the method whose tuned setting it takes: that of which it is an ablation, shown on validation, or the
    candidate that became this recipe, which is tested. `distillation`: what it learns from the dense model of the same
    seed. `candidate`: a recipe that is compared with others on validation, by seeds of its own, and never tested.
    `only`: the one sparsity it is for.
    """

    name: str
    convert: Callable[[Any, Plan], Any]
    grid: tuple[Setting, ...] = ()
    like: str | None = None
    sparse: bool = True
    distillation: Distillation | None = None
    candidate: bool = False
    only: float | None = None


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that every method prunes or adapts: those of `replace_linear`."""
    return find_targets(model, PSTConfig())


def set_dropout(model: nn.Module, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def with_dropout(convert: Callable[[Any, Plan], Any]) -> Callable[[Any, Plan], None]:
    """Trained with BERT's dropout, also under a preset that has none; the models of `tasks` have none either."""

    def converted(model: Any, plan: Plan) -> None:
        convert(model, plan)
        set_dropout(model, BERT_DROPOUT)

    return converted


def _each_linear(model: nn.Module, make: Callable[[nn.Linear, str], nn.Module]) -> None:
    for name, linear in targets(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(linear, name))


def dense(model: nn.Module, plan: Plan) -> None:
    model.requires_grad_(True)


def trains_all(layer: Any) -> Callable[[nn.Module, Plan], None]:
    """All weights train, embeddings and LayerNorm too, as those methods were published."""

    def convert(model: nn.Module, plan: Plan) -> None:
        model.requires_grad_(True)
        given = {"sparsity": plan.sparsity} if layer in (baselines.Magnitude, baselines.Movement) else {}
        _each_linear(model, lambda linear, _: layer.from_linear(linear, **given))

    return convert


def lora(model: nn.Module, plan: Plan) -> None:
    model.requires_grad_(False)
    _each_linear(model, lambda linear, _: baselines.LoRA.from_linear(linear, LORA_RANK, float(LORA_RANK)))
    _train(model, plan.task.head)


def wanda_lora(model: nn.Module, plan: Plan, decoder: bool = False) -> None:
    norms = plan.norms(model, targets(model))
    model.requires_grad_(False)
    _each_linear(
        model,
        lambda linear, name: baselines.MaskedLoRA.from_linear(
            linear, norms[name], plan.sparsity, LORA_RANK, float(LORA_RANK)
        ),
    )
    _train(model, (*plan.task.head, *(plan.task.decoder if decoder else ())))


def pst(
    head: bool = True, also: tuple[str, ...] = (), decoder: bool = False, **config: Any
) -> Callable[[nn.Module, Plan], None]:
    """Our package. `also`: suffixes of further modules to train; `decoder`: train what makes the logits, pretrained or
    not; `config`: settings other than the defaults.
    """

    def convert(model: nn.Module, plan: Plan) -> None:
        saved = [*(plan.task.head if head else ()), *also, *(plan.task.decoder if decoder else ())]
        settings = {"weight_rank": RANK, "score_rank": RANK} | config
        replace_linear(model, PSTConfig(sparsity=plan.sparsity, modules_to_save=saved, **settings))

    return convert


def preset(
    name: str, decoder: bool = False, also: tuple[str, ...] = (), **config: Any
) -> Callable[[nn.Module, Plan], None]:
    """A preset of the package, as its user takes it. `decoder`, `also`: as for `pst`. `config`: settings other than its
    own.
    """

    def convert(model: nn.Module, plan: Plan) -> None:
        settings = dict(config)
        if "initial_sparsity" in config:  # a candidate's own is that for every sparsity above it
            settings["initial_sparsity"] = min(config["initial_sparsity"], plan.sparsity)
        decoders = plan.task.decoder if decoder else ()
        saved = [*plan.task.head, *(NORMS if name != "paper" else ()), *also, *decoders]
        replace_linear(model, PSTConfig.preset(name, sparsity=plan.sparsity, modules_to_save=saved, **settings))

    return convert


def variant(parts: tuple[str, ...] = PARTS, wanda: bool = False, **config: Any) -> Any:
    """PST in plain PyTorch, for what the package does not do. `wanda`: |W'| times the input norm, of mean 1."""

    def convert(model: nn.Module, plan: Plan) -> None:
        norms = plan.norms(model, targets(model)) if wanda else {}
        model.requires_grad_(False)

        def make(linear: nn.Linear, name: str) -> nn.Module:
            scale = norms[name] / norms[name].mean() if wanda else None
            return baselines.PSTVariant.from_linear(
                linear, plan.sparsity, parts=parts, rank=RANK, scale=scale, **config
            )

        _each_linear(model, make)
        _train(model, plan.task.head)

    return convert


def _train(model: nn.Module, modules: tuple[str, ...]) -> None:
    for name in modules:
        model.get_submodule(name).requires_grad_(True)


def role(name: str, head: tuple[str, ...]) -> str:
    """Which rate a parameter takes, by its name in the model."""
    last = name.rpartition(".")[2]
    if last in SCORES:
        return "scores"
    if last in FACTORS:
        return "factors"
    return "head" if name.startswith(tuple(f"{module}." for module in head)) else "weights"


def groups(model: nn.Module, task: Task, setting: Setting) -> list[dict[str, Any]]:
    """AdamW's parameter groups: those of the package where the setting has "lr"; other names in it set a group's rate,
    "embeddings" that of words, where they train.

    Raises ValueError for a parameter whose role has no rate in the setting.
    """
    if "lr" in setting:
        ours = parameter_groups(model, setting["lr"])
        if "embeddings" in setting:
            ours = list(_words_apart(ours, model))
        return [group | {"lr": setting.get(group["name"], group["lr"])} for group in ours]
    by_role: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = "embeddings" if WORDS in name and "embeddings" in setting else role(name, task.head)
            by_role.setdefault(own, []).append(parameter)
    rates = {"head": HEAD_RATE} | setting
    # LayerNorms and biases that train beside factors take the rate of the head: as few, and as free
    rates.setdefault("weights", rates["head"])
    for wanted in by_role:
        if wanted not in rates:
            raise ValueError(f"setting {setting} has no learning rate for {wanted}; give one of {sorted(by_role)}")
    return [{"params": parameters, "lr": rates[name]} for name, parameters in by_role.items()]


def _words_apart(groups: list[dict[str, Any]], model: nn.Module) -> Iterator[dict[str, Any]]:
    words = [p for name, p in model.named_parameters() if WORDS in name and p.requires_grad]
    ids = {id(p) for p in words}
    for group in groups:
        yield group | {"params": [p for p in group["params"] if id(p) not in ids]}
    yield groups[0] | {"params": words, "name": "embeddings"}


def sparse_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> every layer that has a mask."""
    kinds = (baselines.SparseLayer, PSTLayer)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def masks(model: nn.Module) -> dict[str, Tensor]:
    """bool (out, in) of every layer that has one, True for kept weights."""
    layers = sparse_layers(model).items()
    return {name: layer.mask if isinstance(layer, PSTLayer) else layer.mask() for name, layer in layers}


def pruning(model: nn.Module, steps: int) -> Callable[[int], None]:
    """What takes every mask to where it is after a number of optimizer steps.

    The package's schedule for its own layers, the same with the default settings for all others.
    """
    layers = [layer for layer in sparse_layers(model).values() if isinstance(layer, baselines.SparseLayer)]
    if not layers:
        return SparsitySchedule(model, steps).go_to if sparse_layers(model) else lambda step: None

    def go_to(step: int) -> None:
        for layer in layers:
            layer.go_to(progress_at(step, steps))

    return go_to


def progress_at(step: int, steps: int) -> float:
    """From 0 to 1 along the cubic schedule of pst_kernels."""
    config = PSTConfig()
    return sparsity_at(step, steps, config) / config.sparsity


def penalty(model: nn.Module) -> Tensor | None:
    """The mean over layers of what they add to the loss."""
    found = [layer.penalty() for layer in sparse_layers(model).values() if isinstance(layer, baselines.SparseLayer)]
    terms = [term for term in found if term is not None]
    return torch.stack(terms).mean() if terms else None


@torch.no_grad()
def _input_norms(model: nn.Module, layers: dict[str, nn.Linear], batches: Iterator[Batch]) -> dict[str, Tensor]:
    squares = {name: torch.zeros(layer.in_features, device=layer.weight.device) for name, layer in layers.items()}
    real = torch.empty(0, dtype=torch.bool)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares[name] += inputs[0][real].float().square().sum(0)

        return layers[name].register_forward_pre_hook(hook)

    handles = [watch(name) for name in layers]
    model.eval()
    try:
        for batch in batches:
            real = batch["attention_mask"].bool()
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}
