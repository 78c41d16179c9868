"""PSTLinear and PSTConv1D: steps against reference.py and against the CPU, and a training loop that never waits."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from dyadic import exact_scores, grid
from linear_problem import relative_error
from places import Place
from torch import Tensor, nn

import pst_kernels as pst
from pst_kernels import reference
from pst_kernels.layers.pst_layer import PSTLayer
from pst_kernels.model import pst_layers

OUT, COLUMNS = 40, 70
ALLOWED = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
KINDS = {"linear": pst.PSTLinear, "conv1d": pst.PSTConv1D}


def layer_of(
    kind: str = "linear", dtype: torch.dtype = torch.bfloat16, shape: tuple[int, int] = (OUT, COLUMNS), **settings
) -> PSTLayer:
    """On the CPU, with a weight and factors that make scores exact."""
    torch.manual_seed(0)
    out, columns = shape
    config = pst.PSTConfig(**{"sparsity": 0.7, "weight_rank": 3, "score_rank": 2} | settings)
    sizes = (columns, out) if kind == "linear" else (out, columns)  # Conv1D takes its outputs first
    layer = KINDS[kind](*sizes, dtype=dtype, config=config)
    with torch.no_grad():
        layer.oriented_weight.copy_(grid(out, columns, unit=256, reach=200))
        for factor in layer.factors:
            factor.copy_(grid(*factor.shape))
    return layer


def step(layer: PSTLayer, x: Tensor) -> list[Tensor]:
    """Output, dx and the factors' gradients, for a gradient of stride 0."""
    x = x.detach().requires_grad_()
    for factor in layer.factors:
        factor.grad = None
    y = layer(x)
    y.sum().backward()
    return [y.detach(), x.grad, *(factor.grad for factor in layer.factors)]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize(
    ("kind", "shape", "tokens"),
    [
        ("linear", (OUT, COLUMNS), 6), ("conv1d", (OUT, COLUMNS), 6), ("linear", (129, 65), 130),
        pytest.param("linear", (768, 3072), 2048, marks=pytest.mark.large),
        pytest.param("conv1d", (3072, 1024), 512, marks=pytest.mark.large),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_equals_the_formulas(
    gpu: Place, kind: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype, pattern: str
) -> None:
    sparsity = {"sparsity": 0.5} if pattern == "2:4" else {}
    layer = layer_of(kind, dtype, shape, pattern=pattern, **sparsity).to(gpu.device)
    x = torch.randn(tokens, shape[1]).to(gpu.device, dtype)
    found = gpu.twice(lambda: step(layer, x))
    mask, weight = layer.mask, layer.oriented_weight.detach()
    if pattern == "unstructured":
        scores = exact_scores([weight, *(factor.detach() for factor in layer.factors)])
        assert torch.equal(mask, reference.prune_mask(scores, int(weight.numel() * 0.7)))
    else:
        assert layer.pattern.fits(mask, int(layer.pst_num_pruned))
    factors = [factor.detach().double().requires_grad_() for factor in layer.factors]
    exact_x = x.double().requires_grad_()
    y = reference.pst_linear(exact_x, weight.double(), layer.bias.detach().double(), *factors, mask)
    y.sum().backward()
    exact = [y.detach(), exact_x.grad, *(factor.grad for factor in factors)]
    for value, wanted in zip(found, exact, strict=True):
        assert relative_error(value, wanted) <= ALLOWED[dtype]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", {}),
        ("linear", {"masked_weight": "remake"}),  # in the product's loop, for so few tokens
        ("linear", {"masked_weight": "keep"}),
        ("conv1d", {}),
        ("conv1d", {"masked_weight": "remake"}),
        ("linear", {"pattern": "block:32", "mask_interval": 2, "sparsity": 0.5}),
        ("conv1d", {"pattern": "block:16", "mask_interval": 2, "sparsity": 0.5}),
        ("linear", {"through_magnitude": False, "beta": 0.5, "alpha1": 2.0, "alpha2": 0.25}),
    ],
    ids=str,
)
def test_steps_equal_those_of_the_cpu(gpu: Place, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict) -> None:
    """Two steps, the mask of each and the one after them; the second learns the scores where the mask rests."""
    plain = layer_of(kind, **settings)
    ours = copy.deepcopy(plain).to(gpu.device)
    x = torch.randn(2, 3, COLUMNS).to(torch.bfloat16)
    there = x.to(gpu.device)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setenv("PST_KERNELS_BACKEND", "torch")
            expected, mask = step(plain, x), plain.pst_mask.clone()
        with gpu.without_waiting():
            found = step(ours, there)
        assert torch.equal(ours.pst_mask.cpu(), mask)
        for value, wanted in zip(found, expected, strict=True):
            assert relative_error(value.cpu(), wanted.double()) <= 1e-2  # bf16, and G rounded to bf16 on the CPU
        with torch.no_grad():  # by the same dyadic step: signs of gradients near zero may differ
            for one, other in zip(plain.factors, ours.factors, strict=True):
                one -= one.grad.sign() / 64
                other.copy_(one)
    with monkeypatch.context() as patch:
        patch.setenv("PST_KERNELS_BACKEND", "torch")
        after = plain.mask
    assert torch.equal(ours.mask.cpu(), after)


@pytest.mark.parametrize("settings", [{}, {"pattern": "block:16", "mask_interval": 2}, {"pattern": "2:4"}], ids=str)
def test_a_training_loop_never_waits(gpu: Place, settings: dict) -> None:
    """Forward, backward, fused AdamW and a schedule, twice with equal bits; the masks have the schedule's counts."""
    sparsity = {"sparsity": 0.5} if settings.get("pattern") == "2:4" else {"sparsity": 0.8}
    x, labels = torch.randn(16, 48).to(gpu.device), torch.randint(0, 4, (16,)).to(gpu.device)
    ends = []
    for _ in range(2):
        torch.manual_seed(1)
        config = pst.PSTConfig(**settings | sparsity, warmup=0.0, cooldown=0.2)
        model = pst.replace_linear(toys.plain(48, 96, 64, 4), config).to(gpu.device)
        schedule = pst.SparsitySchedule(model, total_steps=6)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
        losses = []
        for _ in range(6):
            with gpu.without_waiting():
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            losses.append(loss.detach())
        assert losses[-1] < losses[0]
        ends.append([*trained, *losses, *(layer.mask for _, layer in pst_layers(model))])
        for _, layer in pst_layers(model):
            assert layer.pattern.fits(layer.mask, layer.num_pruned_at(sparsity["sparsity"]))
    assert toys.differences(dict(enumerate(ends[0])), dict(enumerate(ends[1]))) == []


def test_a_recomputed_input_changes_no_bit(gpu: Place) -> None:
    """After GELU a layer does not keep its input, but makes it again."""
    x = torch.randn(12, 48).to(gpu.device)
    found = []
    for recompute in (True, False):
        torch.manual_seed(0)
        layer = layer_of(dtype=torch.float32, recompute_input=recompute).to(gpu.device)
        before = nn.Linear(48, COLUMNS).to(gpu.device)
        found.append(gpu.twice(lambda layer=layer, before=before: _chain(before, layer, x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _chain(before: nn.Linear, layer: PSTLayer, x: Tensor) -> list[Tensor]:
    parameters = [before.weight, *layer.factors]
    return list(torch.autograd.grad(layer(nn.functional.gelu(before(x))).sum(), parameters))


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_computes_the_same(gpu: Place, kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(kind, dtype).to(gpu.device).eval()
    x = torch.randn(5, COLUMNS).to(gpu.device, dtype)
    with torch.no_grad():
        expected = layer(x)
        layer.merge()
        assert relative_error(layer(x), expected.double()) <= ALLOWED[dtype]
        weight = layer.oriented_weight
    assert int((weight == 0).sum()) >= int(weight.numel() * 0.7)


def test_a_layer_moves_to_the_device_and_back(gpu: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask, count and guess move with it, and each side finds the same mask anew."""
    layer = layer_of(dtype=torch.float32).to(gpu.device)
    x = torch.randn(3, COLUMNS)
    there, mask = layer(x.to(gpu.device)).cpu(), layer.mask.cpu()
    monkeypatch.setenv("PST_KERNELS_BACKEND", "torch")
    layer.cpu().refresh_mask(force=True)
    torch.testing.assert_close(layer(x), there, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.mask, mask)
