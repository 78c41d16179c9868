"""Steps in which the scores rest: what U, V and the kept weights learn then, and a mask that stays as it is."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import toys
from oracle import make_problem, relative_error
from resumed import whole_and_resumed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pst_kernels as pst
from pst_kernels import ops
from pst_kernels.layers.pst_layer import FACTORS

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

OF_SCORES = FACTORS[2:]
WAYS = {
    "lists": {"products": "sparse"},
    "keep": {"products": "dense", "masked_weight": "keep"},
    "remake": {"products": "dense", "masked_weight": "remake"},
}


def layer_of(kind: str = "linear", shape: tuple[int, int] = (70, 300), **settings) -> nn.Module:
    """Of shape (out, in)."""
    torch.manual_seed(0)
    config = pst.PSTConfig(**{"sparsity": 0.8, "beta": 0.75, "weight_rank": 5} | settings)
    out, columns = shape
    base = nn.Linear(columns, out) if kind == "linear" else Conv1D(out, columns)
    cls = pst.PSTLinear if kind == "linear" else pst.PSTConv1D
    return toys.perturb(cls.from_linear(base, config))


def train_kept_weights(layer: nn.Module) -> None:
    layer.freeze_mask()
    with torch.no_grad():
        layer.pst_kept.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)


def by_definition(layer: nn.Module, x: torch.Tensor, through: bool):
    """y in float64 from a graph of plain operators, with leaves for x, U, V and the kept weights."""
    mask = layer.mask
    x, U, V = (t.detach().double().requires_grad_() for t in (x, layer.pst_U, layer.pst_V))
    updated = layer.oriented_weight.double() + layer.config.beta * U @ V
    if through:  # the value W', the derivative 1 + |W'|
        updated = updated + (updated - updated.detach()) * updated.detach().abs()
    masked, leaves = mask * updated, [x, U, V]
    if layer.frozen and layer.config.train_kept:
        kept = layer.pst_kept.detach().double().requires_grad_()
        # the order of the lists: chunks of 128 columns, in a chunk row by row
        places = [
            (i, j)
            for start in range(0, mask.shape[1], 128)
            for i in range(len(mask))
            for j in range(start, min(start + 128, mask.shape[1]))
            if mask[i, j]
        ]
        rows, columns = zip(*places, strict=True)
        masked = masked.index_put((torch.tensor(rows), torch.tensor(columns)), kept, accumulate=True)
        leaves.append(kept)
    return nn.functional.linear(x, masked, layer.bias.double()), leaves


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("tokens", [(0,), (1,), (7,), (2, 65)])
@pytest.mark.parametrize("state", ["rested", "rested, not through", "frozen", "kept trained"])
def test_values_and_gradients(way, kind, tokens, state):
    settings = WAYS[way] | {"through_magnitude": state != "rested, not through"}
    settings |= {"score_interval": 3} if "rested" in state else {"freeze": 0.2, "train_kept": state == "kept trained"}
    layer = layer_of(kind, **settings)
    if state == "frozen":
        layer.freeze_mask()
    elif state == "kept trained":
        train_kept_weights(layer)
    x = torch.randn(*tokens, 300, requires_grad=True)
    y = layer(x)
    gy = torch.randn(y.shape[::-1]).permute(*reversed(range(y.dim())))  # of other strides
    y.backward(gy)
    expected, leaves = by_definition(layer, x, through=state == "rested")
    gradients = torch.autograd.grad(expected, leaves, gy.double())
    found = [x.grad, layer.pst_U.grad, layer.pst_V.grad]
    assert relative_error(y, expected) < 1e-6
    if state == "kept trained":
        found.append(layer.pst_kept.grad)
    for value, right in zip(found, gradients, strict=True):
        assert value.shape == right.shape
        assert relative_error(value, right) < 2e-6
    for name in OF_SCORES:
        gradient = getattr(layer, name).grad
        assert gradient is None if layer.frozen else torch.equal(gradient, torch.zeros_like(getattr(layer, name)))


class Fills(TorchDispatchMode):
    """Counts the tensors of zeros that are made; on a GPU each is a launch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.zeros_like, torch.ops.aten.new_zeros)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_filled_at_once_and_nobody_elses(adapter_dtype):
    layer = layer_of(score_interval=3, adapter_dtype=adapter_dtype, **WAYS["keep"])
    loss = layer(torch.randn(7, 300)).sum()
    with Fills() as fills:
        loss.backward()
    assert fills.count == 1
    gradients = [getattr(layer, name).grad for name in OF_SCORES]
    for number, gradient in enumerate(gradients):
        assert gradient.dtype == adapter_dtype
        gradient.fill_(number + 1)
    assert [gradient.unique().tolist() for gradient in gradients] == [[1.0], [2.0], [3.0], [4.0]]


@pytest.mark.parametrize("way", WAYS)
def test_of_a_constant_gradient(way):
    """The gradient of a sum has stride 0, and rows or columns may have nothing that is kept."""
    layer = layer_of(shape=(9, 140), sparsity=0.99, freeze=0.2, train_kept=True, **WAYS[way])
    train_kept_weights(layer)
    x = torch.randn(5, 140, requires_grad=True)
    layer(x).sum().backward()
    expected, leaves = by_definition(layer, x, through=False)
    found = (x.grad, layer.pst_U.grad, layer.pst_V.grad, layer.pst_kept.grad)
    for value, right in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_other_dtypes_and_patterns(dtype, pattern):
    sparsity = {} if pattern == "2:4" else {"sparsity": 0.8}
    config = pst.PSTConfig(pattern=pattern, freeze=0.2, train_kept=True, weight_rank=5, **sparsity)
    torch.manual_seed(0)
    layer = toys.perturb(pst.PSTLinear.from_linear(nn.Linear(300, 70).to(dtype), config))
    train_kept_weights(layer)
    x = torch.randn(9, 300, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert layer.pst_kept.grad.dtype == layer.pst_kept.dtype
    expected, leaves = by_definition(layer, x, through=False)
    bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
    assert relative_error(y, expected) < bound
    found = (x.grad, layer.pst_U.grad, layer.pst_V.grad, layer.pst_kept.grad)
    for value, right in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert relative_error(value, right) < bound


@pytest.mark.parametrize("backend", ["lists", "dense"])
@pytest.mark.parametrize("through", [True, False])
def test_the_op_equals_the_definition(backend, through):
    weight, factors = make_problem(65, 130, factor_dtype=torch.float32, weight_dtype=torch.float32)
    packed = pst.functional.prune_mask(weight, *factors, 6000, beta=0.5)
    gy, x = torch.randn(11, 65), torch.randn(11, 130)
    dx, dU, dV = ops.rested_backward(gy, x, weight, *factors, packed, 0.5, 1.0, 1.0, through, True, True)
    updated = weight.double() + 0.5 * factors[0].double() @ factors[1].double()
    mask = pst.functional.unpack_mask(packed, 130)
    Q = gy.double().T @ x.double() * mask * (1 + updated.abs() if through else 1)
    for value, right in (
        (dx, gy.double() @ (mask * updated)), (dU, 0.5 * Q @ factors[1].double().T),
        (dV, 0.5 * factors[0].double().T @ Q),
    ):  # fmt: skip
        assert relative_error(value, right) < 1e-6


def model_of(**settings) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(300, 280), nn.GELU(), nn.Linear(280, 300), nn.GELU(), nn.Linear(300, 4))
    return pst.replace_linear(base, pst.PSTConfig(**{"sparsity": 0.9} | settings))


def batch(step: int) -> torch.Tensor:
    return torch.randn(20, 300, generator=torch.Generator().manual_seed(step))


def run(model, steps, schedule=None, optimizer=None, start=0):
    """What each step saw: (whether frozen, gradients by name of the first layer, its mask)."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seen = []
    for step in range(start, start + steps):
        model(batch(step)).pow(2).mean().backward()
        layer = model[0]
        gradients = {name: getattr(layer, name).grad for name in FACTORS}
        seen.append((layer.frozen, gradients, layer.mask))
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return seen


@pytest.mark.parametrize("scheduled", [True, False])
def test_scores_learn_on_every_third_step(scheduled):
    model = model_of(score_interval=3)
    schedule = pst.SparsitySchedule(model, 9) if scheduled else None
    learned = [bool(gradients["pst_R"].any()) for _, gradients, _ in run(model, 9, schedule)]
    assert learned == [False, False, True] * 3


def test_a_resumed_schedule_keeps_the_turn():
    model = model_of(score_interval=3)
    pst.SparsitySchedule(model, 9, step_count=2)
    assert not model[0].scores_rest


def test_the_mask_is_fixed_in_the_last_steps():
    model = model_of(freeze=0.2, cooldown=0.4)
    schedule = pst.SparsitySchedule(model, 10)
    seen = run(model, 14, schedule)
    assert [frozen for frozen, _, _ in seen] == [False] * 8 + [True] * 6
    masks = [mask for _, _, mask in seen]
    assert not torch.equal(masks[6], masks[7])
    assert all(torch.equal(mask, masks[8]) for mask in masks[9:])
    assert int((~masks[8]).sum()) == int(0.9 * 300 * 280)
    scores = pst.functional.scores(model[0].weight, *model[0].factors)
    assert not torch.equal(masks[8], scores > scores.flatten().kthvalue(int(0.9 * 300 * 280)).values)  # it would move


def test_kept_weights_have_no_optimizer_state_before_the_freeze():
    model = model_of(train_kept=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = pst.SparsitySchedule(model, 10)
    run(model, 8, schedule, optimizer)
    assert model[0].pst_kept not in optimizer.state
    assert not model[0].pst_kept.any()
    run(model, 2, schedule, optimizer, start=8)
    assert optimizer.state[model[0].pst_kept]["exp_avg"].numel() == 8400  # a tenth of 84,000
    assert model[0].pst_kept.all()


@pytest.mark.parametrize("at", [4, 9])
def test_a_resumed_run_is_the_same_to_the_bit(at, tmp_path):
    """Stopped before the freeze, and in it."""

    def new():
        model = model_of(train_kept=True, score_interval=2)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    model, again = whole_and_resumed(new, run, at, tmp_path)
    for (name, value), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


@pytest.fixture(scope="module")
def after_freeze():
    model = model_of(train_kept=True)
    run(model, 10, pst.SparsitySchedule(model, 10))
    return model


@pytest.mark.parametrize("format", ["dense", "sparse"])
def test_merged_with_the_kept_weights(after_freeze, format):
    model = copy.deepcopy(after_freeze)
    expected, kept = model(batch(99)), model[0].mask
    merged = pst.merge_and_unload(model, format=format)
    torch.testing.assert_close(merged(batch(99)), expected, rtol=1e-5, atol=1e-6)
    weight = merged[0].weight if format == "dense" else merged[0].to_dense()
    assert torch.equal(weight != 0, kept)
    plain = after_freeze[0].weight * kept
    assert relative_error(weight, plain) > 1e-4  # they count


def test_adapters_hold_the_kept_weights(after_freeze, tmp_path):
    pst.save_pretrained(after_freeze, tmp_path)
    loaded = pst.load_pretrained(model_of(train_kept=True), tmp_path)
    assert loaded[0].frozen
    assert torch.equal(loaded(batch(99)), after_freeze(batch(99)))
    run(loaded, 3)  # without a schedule the mask stays, too
    assert torch.equal(loaded[0].mask, after_freeze[0].mask)
    assert not torch.equal(loaded[0].pst_kept, after_freeze[0].pst_kept)
    with pytest.raises(ValueError, match=r"does not fit the model: unexpected 0\.pst_frozen"):
        pst.load_pretrained(model_of(), tmp_path)


def test_a_new_schedule_keeps_the_mask_unless_told(after_freeze):
    model = copy.deepcopy(after_freeze)
    mask = model[0].mask
    schedule = pst.SparsitySchedule(model, 10)
    run(model, 3, schedule)
    assert model[0].frozen
    assert torch.equal(model[0].mask, mask)
    pst.refresh_masks(model)
    assert torch.equal(model[0].mask, mask)
    pst.SparsitySchedule(model, 10, restart=True)
    assert not model[0].frozen
    assert not model[0].pst_kept.any()
    assert model[0].sparsity == 0.0


def test_kept_weights_written_by_hand_count(after_freeze):
    model = copy.deepcopy(after_freeze)
    before = model(batch(0))
    with torch.no_grad():
        model[0].pst_kept.mul_(2)
    assert not torch.equal(model(batch(0)), before)
    before = model(batch(0))
    model[0].pst_kept.data.mul_(2)  # leaves no trace
    pst.refresh_masks(model)
    assert not torch.equal(model(batch(0)), before)


def test_no_pass_over_the_weight_is_left(after_freeze, monkeypatch):
    """At 90 % after the freeze: the ops that make or read anything of W's size are not called."""
    model = copy.deepcopy(after_freeze)
    model(batch(0))  # makes what is kept
    for name in ("masked_weight", "linear_forward", "linear_backward", "rested_backward", "prune_mask"):
        monkeypatch.setattr(ops, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    large, fixed = model[0:3], model[0]._fixed
    optimizer = torch.optim.AdamW([p for p in large.parameters() if p.requires_grad], lr=1e-3)
    schedule = pst.SparsitySchedule(large, 10, step_count=9)
    for step in range(2):
        large(batch(step)).sum().backward()
        optimizer.step()
        schedule.step()
    assert model[0]._fixed is fixed


def test_counts(after_freeze, capsys):
    pst.print_trainable_parameters(after_freeze)
    assert "(of them 16,800 kept weights, from the freeze on)" in capsys.readouterr().out
    assert all(row.frozen for row in pst.get_layer_status(after_freeze))


def test_settings():
    assert pst.PSTConfig(train_kept=True).freeze == 0.2
    assert pst.PSTConfig(train_kept=True, cooldown=0.1).freeze == 0.1
    assert pst.PSTConfig().freeze == 0.0
    for settings, message in (
        ({"freeze": 0.4}, r"freeze=0\.4 is above cooldown=0\.3"),
        ({"train_kept": True, "freeze": 0.0}, r"got freeze=0\.0; set freeze=0\.2"),
        ({"train_kept": True, "pattern": "block:16"}, "train_kept=True is for pattern='unstructured' or 'N:M'"),
        ({"score_interval": 2, "pattern": "block:16"}, "set mask_interval instead"),
        ({"score_interval": 0}, "score_interval must be at least 1"),
        ({"freeze": 2}, "freeze must be a fraction"),
    ):
        with pytest.raises(ValueError, match=message):
            pst.PSTConfig(**settings)
    layer = layer_of()
    with pytest.raises(RuntimeError, match="converted with freeze=0"):
        layer.freeze_mask()
    layer = layer_of(freeze=0.2)
    layer.freeze_mask()
    with pytest.raises(RuntimeError, match="the mask of this layer is fixed"):
        layer.sparsity = 0.5


def test_blocks_rest_too():
    layer = layer_of(pattern="block:16", sparsity=0.5, freeze=0.2, mask_interval=1)
    layer.freeze_mask()
    x = torch.randn(9, 300, requires_grad=True)
    layer(x).sum().backward()
    expected, leaves = by_definition(layer, x, through=False)
    for value, right in zip(
        (x.grad, layer.pst_U.grad, layer.pst_V.grad), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert relative_error(value, right) < 2e-6
    assert not any(getattr(layer, name).grad.any() for name in OF_SCORES)


@pytest.mark.slow
def test_compiled():
    """One graph for each state, and the same values."""
    model, plain = (model_of(train_kept=True, score_interval=2, products="dense")[2:] for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (model, plain)]
    schedules = [pst.SparsitySchedule(m, 5) for m in (model, plain)]
    for step, (one, schedule, optimizer) in itertools.product(
        range(6), zip((compiled, plain), schedules, optimizers, strict=True)
    ):
        loss = one(batch(step)[:, :280]).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert model[0].frozen
    for (name, value), (_, other) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)
