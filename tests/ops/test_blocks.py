"""Layers with block and N:M masks: values and gradients, when the scores learn, saving, merging, compilation."""

import copy

import pytest
import torch
from oracle import make_problem
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from toys import differences, logits, snapshot, trained

import pst_kernels as pst
from pst_kernels import functional, ops, reference
from pst_kernels.cpu import block_matmul
from pst_kernels.layers.pst_layer import PSTLayer
from pst_kernels.masks import patterns
from pst_kernels.masks.packing import pack_mask
from pst_kernels.operands import Factors, MaskedWeight, Needs, Scales

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SCALES = {"beta": 0.75, "alpha1": 0.5, "alpha2": 2.0}
SHAPES = [(128, 192), (150, 200), (16, 300), (70, 33)]


def layer_of(pattern, shape=(150, 200), kind=pst.PSTLinear, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    out, columns = shape
    config = pst.PSTConfig(pattern=pattern, adapter_dtype=dtype, **SCALES, **settings)
    layer = kind(columns, out, config=config) if kind is pst.PSTLinear else kind(out, columns, config=config)
    layer.to(dtype)
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.randn_like(factor) * 0.2)
    return layer


def expected_gradients(layer, x, gy, mask, learns):
    """dx, dU, ..., dC by the formulas of the method, U and V from kept blocks alone."""
    U, V, A, B, _, _ = (f.detach() for f in layer.factors)
    updated = layer.oriented_weight + SCALES["beta"] * U @ V
    G = gy.T @ x
    D = G * updated
    Q = G * mask * (1.0 + updated.abs() if layer.config.through_magnitude else 1.0)
    scores = (SCALES["alpha1"] * D @ B.T, SCALES["alpha1"] * A.T @ D, 2.0 * D.sum(1), 2.0 * D.sum(0))
    return [
        gy @ (mask * updated), SCALES["beta"] * Q @ V.T, SCALES["beta"] * U.T @ Q,
        *(g if learns else torch.zeros_like(g) for g in scores),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [pst.PSTLinear, pst.PSTConv1D])
@pytest.mark.parametrize("pattern", ["block:16", "block:32", "block:64", "block:128"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("through", [True, False])
def test_values_and_gradients(kind, pattern, shape, through):
    layer = layer_of(pattern, shape, kind, sparsity=0.6, mask_interval=2, through_magnitude=through)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(3, 5, shape[1], dtype=torch.float64, requires_grad=True)
    gy = torch.randn(3, 5, shape[0], dtype=torch.float64)
    for learns in (False, True):  # the second step is the last before the next mask
        y, mask = layer(x), layer.mask
        exact = reference.pst_linear(
            x, layer.oriented_weight, layer.bias, *layer.factors, mask, **SCALES, through_magnitude=False
        )
        torch.testing.assert_close(y, exact, **TIGHT)
        leaves = (x, *layer.factors)
        ours, reference_of = torch.autograd.grad(y, leaves, gy), torch.autograd.grad(exact, leaves, gy)
        formulas = expected_gradients(layer, x.detach().flatten(0, 1), gy.flatten(0, 1), mask, learns)
        for i, (value, formula, autograd) in enumerate(zip(ours, formulas, reference_of, strict=True)):
            torch.testing.assert_close(value, formula.view(value.shape), **TIGHT)
            if i == 0 or (i < 3 and not through) or (i >= 3 and learns):
                torch.testing.assert_close(value, autograd, **TIGHT)
        with torch.no_grad():
            layer.pst_U.mul_(1.01)


def test_gradcheck_of_a_layer_with_a_fixed_mask():
    layer = layer_of("block:16", (20, 35), sparsity=0.5, through_magnitude=False, mask_interval=1000)
    x = torch.randn(4, 35, dtype=torch.float64, requires_grad=True)
    layer(x)

    def forward(x, U, V):
        factors = layer.factors._replace(U=U, V=V)
        operands = MaskedWeight(layer.weight, factors, layer.pst_mask, Scales(0.75, 0.5, 2.0))
        options = functional.Options(False, block_size=16, interval=1000)
        return functional.masked_linear(x, operands, layer.bias, x.dtype, options)

    assert torch.autograd.gradcheck(forward, (x, layer.pst_U, layer.pst_V))


@pytest.mark.parametrize("pattern", ["2:4", "3:7"])
def test_groups_have_the_gradients_of_any_mask(pattern):
    layer = layer_of(pattern)
    x = torch.randn(9, 200, dtype=torch.float64, requires_grad=True)
    y, mask = layer(x), layer.mask
    kept, size = map(int, pattern.split(":"))
    whole = 200 // size * size
    assert (mask[:, :whole].reshape(-1, size).sum(1) == kept).all()
    exact = reference.pst_linear(x, layer.weight, layer.bias, *layer.factors, mask, **SCALES)
    torch.testing.assert_close(y, exact, **TIGHT)
    leaves, gy = (x, *layer.factors), torch.randn_like(y)
    for ours, expected in zip(torch.autograd.grad(y, leaves, gy), torch.autograd.grad(exact, leaves, gy), strict=True):
        torch.testing.assert_close(ours, expected, **TIGHT)


@pytest.mark.parametrize("pattern", ["block:16", "block:64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_err_no_more_than_a_dense_product(pattern, dtype):
    """A result is within twice the error of torch's own product of M * W' in the dtype."""
    layer = layer_of(pattern, (130, 2000), dtype=torch.float32, sparsity=0.1)
    layer.weight.data = layer.weight.to(dtype)
    layer.bias = None
    x, gy = torch.randn(64, 2000).to(dtype).requires_grad_(), torch.randn(64, 130).to(dtype)
    masked = layer.masked_weight().detach()
    exact = layer.oriented_weight.double() + 0.75 * layer.pst_U.double() @ layer.pst_V.double()
    exact = exact * layer.mask
    y = layer(x)
    y.backward(gy)
    for ours, plain, truth in (
        (y, x @ masked.T, x.double() @ exact.T), (x.grad, gy @ masked, gy.double() @ exact),
    ):  # fmt: skip
        assert (ours.double() - truth).norm() <= 2.0 * (plain.double() - truth).norm()
        assert ours.dtype == dtype


@pytest.mark.parametrize("tokens", [0, 1, block_matmul.MANY_TOKENS])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.99])
def test_few_and_many_tokens_and_blocks(tokens, sparsity):
    layer = layer_of("block:16", (40, 50), sparsity=sparsity, mask_interval=1, through_magnitude=False)
    layer.sparsity = sparsity
    x = torch.randn(tokens, 50, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(tokens, 40, dtype=torch.float64)
    y = layer(x)
    exact = reference.pst_linear(
        x, layer.weight, layer.bias, *layer.factors, layer.mask, **SCALES, through_magnitude=False
    )
    torch.testing.assert_close(y, exact, **TIGHT)
    leaves = (x, layer.pst_U, layer.pst_V, layer.pst_A)
    for ours, expected in zip(torch.autograd.grad(y, leaves, gy), torch.autograd.grad(exact, leaves, gy), strict=True):
        torch.testing.assert_close(ours, expected, **TIGHT)


def test_a_layer_without_any_kept_block():
    """Every block pruned: the count is set by hand, for no sparsity below 1 does it."""
    layer = layer_of("block:16", (32, 48), mask_interval=1)
    layer.pst_num_pruned.fill_(6)
    x = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand_as(y))
    dx, dU = torch.autograd.grad(y.sum(), (x, layer.pst_U))
    assert not dx.any()
    assert not dU.any()


def test_only_kept_blocks_are_visited():
    """Multiply-adds of the products, counted by their shapes: proportional to the kept blocks."""
    counted = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name.startswith(("aten::mm", "aten::addmm")):
                left, right = args[-2:]
                if min(left.shape[0], left.shape[1], right.shape[1]) > 8:  # not those with a factor
                    counted.append(left.shape[0] * right.numel())
            return function(*args, **(kwargs or {}))

    for pattern in ("block:16", "block:64"):
        layer = layer_of(pattern, (256, 512), sparsity=0.75)
        layer.refresh_mask()
        operands = MaskedWeight(layer.weight, layer.factors.map(torch.Tensor.detach), layer.pst_mask, Scales())
        x, gy = torch.randn(32, 512, dtype=torch.float64), torch.randn(32, 256, dtype=torch.float64)
        counted.clear()
        with Counting():  # it does not see into an op
            block_matmul.block_forward(x, operands, layer.bias.detach(), layer.pattern.size)
            block_matmul.kept_block_gradients(gy, x, operands, layer.pattern.size, True, Needs(True, True))
        assert sum(counted) == 3 * 32 * 256 * 512 // 4


@pytest.mark.parametrize("with_schedule", [False, True])
def test_scores_learn_on_the_last_step_before_a_mask(with_schedule):
    torch.manual_seed(0)
    config = pst.PSTConfig(pattern="block:16", sparsity=0.5, mask_interval=3, initial_sparsity=0.5)
    model = pst.replace_linear(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 2)), config)
    layer = model[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    schedule = pst.SparsitySchedule(model, 9) if with_schedule else None
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.randn_like(factor) * 0.1)
    learned, moved = [], []
    for i in range(9):
        for _ in range(2):  # accumulation: both backwards of a step do the same
            model(torch.randn(5, 64)).pow(2).sum().backward()
            nonzero = [bool(f.grad.any()) for f in layer.factors]
            assert nonzero[:2] == [True, True]
            assert len(set(nonzero[2:])) == 1
        learned.append(nonzero[2])
        before = layer.pst_mask.clone()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        layer.refresh_mask()
        moved.append(not torch.equal(before, layer.pst_mask))
        assert i % 3 == 2 or not moved[-1]
    assert learned == [False, False, True] * 3
    assert any(moved)


def test_sparsity_is_reported_in_weights():
    whole, ragged = layer_of("block:16", (32, 48), sparsity=0.5), layer_of("block:16", (40, 50), sparsity=0.5)
    assert int(whole.pst_num_pruned) == 3
    assert whole.sparsity == 0.5
    assert int(ragged.pst_num_pruned) == 6  # of 12 blocks
    assert ragged.sparsity == int((~ragged.mask).sum()) / 2000
    status = pst.get_layer_status(ragged)[0]
    assert (status.sparsity, status.target_sparsity) == (ragged.sparsity, 0.5)
    groups = layer_of("2:4", (5, 43))
    assert groups.sparsity == (~groups.mask).double().mean() == 5 * 21 / 215


@pytest.mark.parametrize("pattern", ["block:16", "2:4"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_checkpoints_and_merging(family, pattern, tmp_path):
    from toys import seeded

    model = trained(family, pattern=pattern)
    pst.save_pretrained(model, tmp_path)
    loaded = pst.load_pretrained(seeded(family), tmp_path).eval()
    assert not differences(snapshot(model), snapshot(loaded))
    assert torch.equal(logits(loaded, family), logits(model, family))
    expected, masks = logits(model, family), [m.mask for m in model.modules() if isinstance(m, PSTLayer)]
    names = [name for name, m in model.named_modules() if isinstance(m, PSTLayer)]
    merged = pst.merge_and_unload(model)
    torch.testing.assert_close(logits(merged, family), expected, rtol=1e-4, atol=1e-5)
    for name, mask in zip(names, masks, strict=True):
        weight = merged.get_submodule(name).weight
        assert not (weight.T if family == "gpt2" else weight)[~mask].any()


def test_a_checkpoint_of_another_pattern_is_refused(tmp_path):
    model = pst.replace_linear(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)), pst.PSTConfig(pattern="2:4"))
    pst.save_pretrained(model, tmp_path)
    other = pst.replace_linear(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)), pst.PSTConfig(pattern="block:16"))
    before = snapshot(other)
    with pytest.raises(ValueError, match="converted with pattern='block:16', the checkpoint with pattern='2:4'"):
        pst.load_pretrained(other, tmp_path)
    assert not differences(before, snapshot(other))


@pytest.mark.parametrize("pattern", ["block:16", "block:64", "2:4"])
def test_compiles_as_one_graph(pattern):
    torch.compiler.reset()
    counters.clear()
    settings = {"mask_interval": 3} if pattern.startswith("block") else {}
    eager = layer_of(pattern, (70, 96), dtype=torch.float32, **settings)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    for _ in range(5):
        x = torch.randn(6, 96)
        outputs = [forward(x) for forward in (eager, compiled)]
        torch.testing.assert_close(*outputs)
        for y, layer in zip(outputs, (eager, twin), strict=True):
            y.pow(2).mean().backward()
            with torch.no_grad():
                for factor in layer.factors:
                    factor -= 0.1 * factor.grad
                    factor.grad = None
        for ours, expected in zip(twin.factors, eager.factors, strict=True):
            torch.testing.assert_close(ours, expected)
        assert torch.equal(twin.pst_mask, eager.pst_mask)
    assert counters["stats"]["unique_graphs"] == 1


def test_an_explicit_triton_backend_does_not_fall_back(monkeypatch):
    """Not even for float64, which the kernels do not take."""
    pytest.importorskip("triton", reason="triton is not installed")
    layer = layer_of("block:16")
    layer.refresh_mask()
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    with pytest.raises(TypeError, match="take float32, float16 and bfloat16, got float64"):
        layer(torch.randn(2, 200, dtype=torch.float64))


def test_block_rows_list_the_kept_blocks():
    weight, factors = make_problem(40, 50, weight_dtype=torch.float32, factor_dtype=torch.float32)
    packed = ops.prune_mask(weight, *factors, *Scales(), torch.tensor(5), functional.new_guess(), "block:16")
    mask = functional.unpack_mask(packed, 50)
    rows, index = block_matmul.block_rows(packed, (40, 50), 16)
    again = torch.zeros(40, 50, dtype=torch.bool)
    for row in rows:
        again[row.rows, index[row.span]] = True
        assert [c for one in row.columns for c in range(one.start, one.stop)] == index[row.span].tolist()
    assert torch.equal(again, mask)
    assert patterns.parse("block:16").fits(mask, 5)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_zeros_of_a_step_between_masks_are_parts_of_one_tensor(adapter_dtype):
    torch.manual_seed(0)
    config = pst.PSTConfig(pattern="block:16", sparsity=0.5, mask_interval=9, adapter_dtype=adapter_dtype)
    layer = pst.PSTLinear(70, 40, config=config)
    layer(torch.randn(5, 70)).sum().backward()
    gradients = [factor.grad for factor in layer.factors[2:]]
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 1
    assert not any(bool(gradient.any()) for gradient in gradients)
    for number, gradient in enumerate(gradients):
        assert gradient.dtype == adapter_dtype
        gradient.fill_(number + 1)
    assert [gradient.unique().tolist() for gradient in gradients] == [[1.0], [2.0], [3.0], [4.0]]


def test_kept_blocks_are_listed_once_a_mask(monkeypatch):
    """By forward and backward of all steps until the mask is written; a copy's are its own."""
    listed, made = [], block_matmul._block_rows
    monkeypatch.setattr(block_matmul, "_block_rows", lambda *args: listed.append(1) or made(*args))
    layer = layer_of("block:16", (128, 192), sparsity=0.5)
    x = torch.randn(5, 192, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        layer(x).sum().backward()
    assert len(listed) == 1
    with torch.inference_mode():  # of a layer that has made its mask outside
        layer(x)
    assert len(listed) == 1
    mask = layer.mask.roll(16, 0)
    layer.pst_mask.copy_(pack_mask(mask))
    for one in (layer, copy.deepcopy(layer)):
        y, updated = one(x), one.weight + SCALES["beta"] * one.pst_U @ one.pst_V
        torch.testing.assert_close(y, nn.functional.linear(x, mask * updated, one.bias), **TIGHT)
    assert len(listed) == 3
    packed = pack_mask(mask)
    with torch.inference_mode():
        inference = packed.clone()
        for kept in (mask, ~mask):
            inference.copy_(pack_mask(kept))
            rows, _ = block_matmul.block_rows(inference, tuple(mask.shape), 16)
            assert [len(row.columns) for row in rows] == kept[::16, ::16].sum(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 50), (33, 65), (1, 1), (128, 96)])
@pytest.mark.parametrize("pruned", [0, 2, None])
def test_the_updated_weight_of_kept_blocks(cpu_passes, shape, dtype, pruned):
    """Rows of blocks without any kept block, an odd number of rows, narrow last blocks, ranks that fill no vector."""
    weight, factors = make_problem(*shape, weight_dtype=dtype, factor_dtype=torch.float32)
    blocks = -(-shape[0] // 16) * -(-shape[1] // 16)
    count = torch.tensor(blocks if pruned is None else min(pruned, blocks - 1))
    packed = ops.prune_mask(weight, *factors, *Scales(), count, functional.new_guess(), "block:16")
    weights = block_matmul.BlockRowWeights(MaskedWeight(weight, Factors(*factors), packed, Scales(0.75, 1.0, 1.0)), 16)
    expected = weight.double() + 0.75 * factors[0].double() @ factors[1].double()
    found = weights.updated(weights.buffer("test", torch.float32).fill_(torch.nan))
    assert len(found) == -(-shape[0] // 16)
    for row, updated in zip(weights.rows, found, strict=True):
        torch.testing.assert_close(
            updated.double(), expected[row.rows][:, weights.columns[row.span]], rtol=1e-6, atol=1e-6
        )
