"""`magnitude="fisher"`: scores, masks, gradients and running sums against their definitions in float64."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from oracle import mask_by_definition, relative_error
from resumed import whole_and_resumed
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import pst_kernels as pst
from pst_kernels import reference
from pst_kernels.layers.fisher import DECAY
from pst_kernels.masks.patterns import parse

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

WAYS = {
    "lists": {"products": "sparse"},
    "keep": {"products": "dense", "masked_weight": "keep"},
    "remake": {"products": "dense", "masked_weight": "remake"},
}
SCALES = {"beta": 0.75, "alpha1": 0.5, "alpha2": 2.0}


def layer_of(kind: str = "linear", shape: tuple[int, int] = (70, 300), dtype=torch.float32, **settings) -> nn.Module:
    """Of shape (out, in), with moments that are far from even."""
    torch.manual_seed(0)
    config = pst.PSTConfig(**{"magnitude": "fisher", "sparsity": 0.8, "weight_rank": 5} | SCALES | settings)
    out, columns = shape
    base = nn.Linear(columns, out) if kind == "linear" else Conv1D(out, columns)
    cls = pst.PSTLinear if kind == "linear" else pst.PSTConv1D
    layer = toys.perturb(cls.from_linear(base.to(dtype), config))
    layer.pst_moments.copy_(torch.randn(out + columns).exp())
    layer.refresh_mask(force=True)
    return layer


def importance(layer: nn.Module) -> Tensor:
    """What |W'| is multiplied by, float64, of the sums that the layer holds."""
    rows, columns = layer.pst_moments.double().split(layer.oriented_weight.shape)
    return ((rows / rows.mean())[:, None] * (columns / columns.mean())).sqrt()


def exact_scores(layer: nn.Module) -> Tensor:
    factors = [factor.detach().double() for factor in layer.factors]
    return reference.scores(layer.oriented_weight.double(), *factors, **SCALES, importance=importance(layer))


def test_importance_of_the_definition():
    squares = torch.rand(7, 5, dtype=torch.float64)
    found = reference.fisher_importance(squares)
    torch.testing.assert_close(found.square() * squares.mean() ** 2, squares.mean(1)[:, None] * squares.mean(0))
    torch.testing.assert_close(found.square().mean(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(70, 300), (9, 40), (300, 1000)])
def test_scores_and_masks(kind, dtype, shape):
    layer = layer_of(kind, shape, dtype)
    scores = layer.scores()
    assert relative_error(scores, exact_scores(layer)) < 1e-6
    assert torch.equal(layer.mask, reference.prune_mask(scores, int(0.8 * scores.numel())))
    plain = pst.functional.scores(layer.oriented_weight, *layer.factors, **SCALES)
    assert not torch.equal(layer.mask, reference.prune_mask(plain, int(0.8 * scores.numel())))


@pytest.mark.parametrize("shape", [(10, 35), (130, 400)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_masks_of_exact_scores(kind, shape):
    """Moments of 4 and 1/4 with a mean of 1 weigh by 1/4, 1 and 4: no score is rounded, and many are equal."""
    layer = layer_of(kind, shape)
    with torch.no_grad():
        layer.oriented_weight.copy_(toys.dyadic(*shape))
        for i, factor in enumerate(layer.factors):
            factor.copy_(toys.dyadic(*factor.shape, seed=i) / 8)
        layer.pst_moments.fill_(0.25)
        layer.pst_moments[::5] = 4
    layer.refresh_mask(force=True)
    scores = exact_scores(layer)
    assert set(importance(layer).unique().tolist()) == {0.25, 1.0, 4.0}
    assert len(scores.unique()) < scores.numel()
    assert torch.equal(layer.scores().double(), scores)
    assert torch.equal(layer.mask, reference.prune_mask(scores, int(0.8 * scores.numel())))


def test_masks_of_groups():
    layer = layer_of(pattern="2:4", sparsity=0.5)
    pattern = parse("2:4")
    assert torch.equal(layer.mask, mask_by_definition(layer.scores(), pattern, pattern.num_pruned_at((70, 300), 0.5)))
    assert relative_error(layer.scores(), exact_scores(layer)) < 1e-6


def test_without_moments_it_is_plain():
    layer = layer_of()
    layer.pst_moments.zero_()
    layer.refresh_mask(force=True)
    scores = pst.functional.scores(layer.weight, *layer.factors, **SCALES)
    assert torch.equal(layer.scores(), scores)
    assert torch.equal(layer.mask, reference.prune_mask(scores, int(0.8 * scores.numel())))


def by_definition(layer: nn.Module, x: Tensor, through: bool) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().double().requires_grad_() for t in (x, *layer.factors)]
    y = reference.pst_linear(
        leaves[0], layer.oriented_weight.double(), layer.bias.double(), *leaves[1:], layer.mask, **SCALES,
        through_magnitude=through, importance=importance(layer),
    )  # fmt: skip
    return y, leaves


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 65)])
@pytest.mark.parametrize("through", [True, False])
def test_values_and_gradients(way, kind, tokens, through):
    layer = layer_of(kind, through_magnitude=through, **WAYS[way])
    x = torch.randn(*tokens, 300, requires_grad=True)
    y = layer(x)
    gy = torch.randn(y.shape[::-1]).permute(*reversed(range(y.dim())))  # of other strides
    y.backward(gy)
    expected, leaves = by_definition(layer, x, through)
    gradients = torch.autograd.grad(expected, leaves, gy.double())
    assert relative_error(y, expected) < 1e-6
    for value, right in zip([x.grad, *(f.grad for f in layer.factors)], gradients, strict=True):
        assert relative_error(value, right) < 2e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_many_rows_in_other_dtypes(dtype, bound):
    """More rows than exist of G at a time, and the gradient of a sum, of stride 0."""
    layer = layer_of(shape=(1100, 40), dtype=dtype, adapter_dtype=torch.float64 if bound == 1e-12 else torch.float32)
    x = torch.randn(5, 40, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    expected, leaves = by_definition(layer, x, True)
    gradients = torch.autograd.grad(expected.sum(), leaves)
    for value, right in zip([x.grad, *(f.grad for f in layer.factors)], gradients, strict=True):
        assert relative_error(value, right) < bound


def test_under_a_profiler():
    """Ops are called by name then; those of a layer without moments know none."""
    layer, x = layer_of(), torch.randn(9, 300)
    with profile():
        layer(x).sum().backward()
    expected, leaves = by_definition(layer, x, True)
    for factor, right in zip(layer.factors, torch.autograd.grad(expected.sum(), leaves[1:]), strict=True):
        assert relative_error(factor.grad, right) < 2e-6


def model_of(**settings) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(100, 120), nn.GELU(), nn.Linear(120, 100), nn.GELU(), nn.Linear(100, 4))
    return toys.perturb(pst.replace_linear(base, pst.PSTConfig(**{"magnitude": "fisher"} | settings)))


def batch(step: int) -> Tensor:
    return torch.randn(20, 100, generator=torch.Generator().manual_seed(step))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def run(model, steps, schedule, optimizer, start=0) -> list[list[Tensor]]:
    """Two micro-batches a step; returns G of the first layer of each."""
    found = []
    for step in range(start, start + steps):
        found.append([])
        for part in batch(step).chunk(2):
            layer = model[0]
            y = layer(part)
            y.retain_grad()
            model[1:](y).pow(2).mean().backward()
            found[-1].append(y.grad.double().T @ part.double())
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return found


def test_running_sums():
    """Of all steps but those whose scores rest: of every second one before the freeze."""
    model = model_of(score_interval=2, freeze=0.2)
    gradients = run(model, 10, pst.SparsitySchedule(model, 10), optimizer_of(model))
    expected = torch.zeros(220, dtype=torch.float64)
    for of_step in gradients[1:8:2]:
        squares = torch.stack(of_step).square().mean(0)
        expected = expected * DECAY + torch.cat([squares.sum(1), squares.sum(0)])
    assert relative_error(model[0].pst_moments, expected) < 1e-6


def same_training(compiled: nn.Module, eager: nn.Module, **given) -> None:
    """Of the same model; what a compiled step hands to the sums differs in its rounding alone."""
    for model, forward in ((compiled, torch.compile(compiled, fullgraph=True, **given)), (eager, eager)):
        optimizer, schedule = optimizer_of(model), pst.SparsitySchedule(model, 8)
        for step in range(8):
            for part in batch(step).chunk(2):
                forward(part).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    ours, expected = compiled.state_dict(), eager.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
        else:
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("settings", [{}, {"score_interval": 2, "train_kept": True}, {"pattern": "2:4"}])
def test_compiled_training_is_eager_training(settings):
    torch._dynamo.reset()
    compiled, eager = model_of(**settings), model_of(**settings)
    same_training(compiled, eager, backend="aot_eager")
    assert compiled[0].pst_moments.any()


def test_training_compiled_by_inductor():
    torch._dynamo.reset()
    same_training(model_of(), model_of())


def test_a_graph_called_twice_before_its_backward():
    torch._dynamo.reset()
    found = []
    for compiles in (True, False):
        model = model_of()
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        (forward(batch(0)).pow(2).mean() + forward(batch(1)).pow(2).mean()).backward()
        optimizer_of(model).step()
        found.append(model[0].pst_moments)
        assert model[0].moments.tally.grad is None
    torch.testing.assert_close(*found, rtol=1e-6, atol=0.0)


def test_the_tally_goes_where_the_layer_goes_and_is_no_part_of_it():
    layer = layer_of()
    names = {*layer.state_dict(), *dict(layer.named_parameters()), *dict(layer.named_buffers())}
    assert not any("tally" in name for name in names)
    tally = layer.to("meta").moments.tally
    assert (tally.device.type, tally.requires_grad, tally.shape) == ("meta", True, (371,))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_sees_each_gradient_once(use_reentrant):
    found = []
    for checkpointed in (False, True):
        model, x = model_of(), batch(0).requires_grad_()
        y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        y.pow(2).mean().backward()
        optimizer_of(model).step()
        found.append(model[0].pst_moments)
    assert found[0].any()
    assert torch.equal(*found)


def test_a_mask_follows_the_moments_of_its_step():
    model = model_of(sparsity=0.7)
    optimizer = optimizer_of(model)
    for step in range(3):
        before = model[0].pst_moments.clone()
        run(model, 1, None, optimizer, step)
        assert not torch.equal(model[0].pst_moments, before)
        model(batch(0))
        assert torch.equal(model[0].mask, reference.prune_mask(model[0].scores(), int(0.7 * 12000)))


def test_what_is_not_finite_joins_no_sum():
    model = model_of()
    optimizer = optimizer_of(model)
    run(model, 1, None, optimizer)
    moments = model[0].pst_moments.clone()
    (model(batch(0)).pow(2).mean() * torch.inf).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model[0].pst_moments, moments)
    run(model, 1, None, optimizer)
    assert not torch.equal(model[0].pst_moments, moments)


def test_the_scale_of_the_loss_does_not_count():
    found = []
    for scale in (1.0, 1024.0):
        model = model_of(sparsity=0.7)
        (model(batch(0)).pow(2).mean() * scale).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
        model[0].refresh_mask(force=True)
        found.append((model[0].scores(), model[0].mask))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("at", [4, 9])
def test_a_resumed_run_is_the_same_to_the_bit(at, tmp_path):
    """Stopped before the freeze, and in it."""

    def new():
        model = model_of(train_kept=True, score_interval=2)
        return model, optimizer_of(model)

    model, again = whole_and_resumed(new, run, at, tmp_path)
    assert not toys.differences(model.state_dict(), again.state_dict())


@pytest.fixture(scope="module")
def trained():
    model = model_of(sparsity=0.7)
    run(model, 4, pst.SparsitySchedule(model, 4), optimizer_of(model))
    return model


@pytest.mark.parametrize("format", ["dense", "sparse"])
def test_merged(trained, format):
    model = copy.deepcopy(trained)
    expected, kept = model(batch(99)), model[0].mask
    merged = pst.merge_and_unload(model, format=format)
    torch.testing.assert_close(merged(batch(99)), expected, rtol=1e-5, atol=1e-6)
    weight = merged[0].weight if format == "dense" else merged[0].to_dense()
    assert torch.equal(weight != 0, kept)


def test_adapters_hold_the_moments(trained, tmp_path):
    pst.save_pretrained(trained, tmp_path)
    loaded = pst.load_pretrained(model_of(sparsity=0.7), tmp_path)
    assert not toys.differences(loaded.state_dict(), trained.state_dict())
    pst.refresh_masks(loaded)
    assert torch.equal(loaded[0].mask, trained[0].mask)
    with pytest.raises(ValueError, match="converted with magnitude='plain', the checkpoint with magnitude='fisher'"):
        pst.load_pretrained(model_of(sparsity=0.7, magnitude="plain"), tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_moments_of_its_own(trained, copied):
    other = copied(trained)
    before = toys.snapshot(trained)
    run(other, 1, None, optimizer_of(other))
    assert not toys.differences(trained.state_dict(), before)
    assert not torch.equal(other[0].pst_moments, trained[0].pst_moments)


THERE = """
import torch
model = torch.load("model.pt", weights_only=False)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model(torch.load("batch.pt")).pow(2).mean().backward()
optimizer.step()
torch.save(model.state_dict(), "state.pt")
"""


def test_a_model_that_another_process_unpickles_trains_as_here(tmp_path):
    model = model_of()
    torch.save(model, tmp_path / "model.pt")
    torch.save(batch(0), tmp_path / "batch.pt")
    package = str(Path(pst.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", THERE], check=True, cwd=tmp_path, env=environment)
    model(batch(0)).pow(2).mean().backward()
    optimizer_of(model).step()
    there = torch.load(tmp_path / "state.pt")
    assert there["0.pst_moments"].any()
    assert not toys.differences(model.state_dict(), there)


def test_moments_of_a_model_in_half_precision():
    model = model_of(sparsity=0.7).to(torch.bfloat16)
    optimizer = optimizer_of(model)
    model(batch(0).bfloat16()).float().pow(2).mean().backward()
    optimizer.step()
    assert model[0].pst_moments.dtype is torch.float32
    assert model[0].pst_moments.any()


def test_one_threshold_for_all_layers():
    model = model_of(allocation="global", sparsity=0.7, warmup=0.0, cooldown=0.5)
    run(model, 4, pst.SparsitySchedule(model, 4), optimizer_of(model))
    layers = [model[0], model[2]]
    kept = torch.cat([layer.scores()[layer.mask] for layer in layers])
    pruned = torch.cat([layer.scores()[~layer.mask] for layer in layers])
    assert len(pruned) == sum(layer.num_pruned_at(0.7) for layer in layers)
    assert kept.min() >= pruned.max()


def test_what_it_is_not_for():
    with pytest.raises(ValueError, match="magnitude='wanda' is not known; use one of plain, fisher"):
        pst.PSTConfig(magnitude="wanda")
    with pytest.raises(ValueError, match="magnitude='fisher' is for pattern='unstructured' or 'N:M', got pattern='blo"):
        pst.PSTConfig(magnitude="fisher", pattern="block:16")
    layer = layer_of()
    layer._is_replica = True  # as DataParallel's copies are
    with pytest.raises(RuntimeError, match="magnitude='fisher' trains in one process, or in several under Distributed"):
        layer(torch.randn(2, 300))
    with torch.no_grad():
        layer(torch.randn(2, 300))
