"""pst_linear and prune_mask against the reference in float64: values, gradients, masks, dtypes, and what is kept."""

import pytest
import torch
from oracle import SCALES, SHAPES, SPARSITIES, make_problem, relative_error

from pst_kernels import functional, reference

pytestmark = pytest.mark.usefixtures("cpu_passes")
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def both(x, problem, bias, packed, through_magnitude=True):
    """Outputs of ours and of the reference, on the same leaves."""
    weight, factors = problem
    options = SCALES | {"through_magnitude": through_magnitude}
    mask = functional.unpack_mask(packed, weight.shape[1])
    ours = functional.pst_linear(x, weight, bias, *factors, packed, **options)
    return ours, reference.pst_linear(x, weight, bias, *factors, mask, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("through_magnitude", [True, False])
def test_values_and_gradients(shape, sparsity, through_magnitude):
    problem = make_problem(*shape).requires_grad()
    packed = functional.prune_mask(problem.weight, *problem.factors, int(problem.num_weights * sparsity), **SCALES)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    ours, exact = both(x, problem, bias, packed, through_magnitude)
    torch.testing.assert_close(ours, exact, **TIGHT)
    gy = torch.randn_like(exact)
    leaves = (x, bias, *problem.factors)
    for value, expected in zip(
        torch.autograd.grad(ours, leaves, gy), torch.autograd.grad(exact, leaves, gy), strict=True
    ):
        torch.testing.assert_close(value, expected, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_equal_a_stable_argsort(shape, sparsity, dtype):
    weight, factors = make_problem(*shape, weight_dtype=dtype, factor_dtype=torch.float32)
    num_pruned = int(weight.numel() * sparsity)
    scores = functional.scores(weight, *factors, **SCALES)
    assert scores.dtype == torch.float32
    mask = functional.unpack_mask(functional.prune_mask(weight, *factors, num_pruned, **SCALES), shape[1])
    order = torch.argsort(scores.flatten(), stable=True)[:num_pruned]
    expected = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, order, False).view(shape)
    assert torch.equal(mask, expected)
    assert int((~mask).sum()) == num_pruned


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_equal_the_formula(shape):
    problem = make_problem(*shape)
    exact = reference.scores(problem.weight, *problem.factors, **SCALES)
    ours = functional.scores(problem.weight, *problem.factors, **SCALES)
    assert torch.equal(ours, exact.float())  # float64 inputs are rounded once, at the end
    single = problem.to(torch.float32)
    torch.testing.assert_close(
        functional.scores(single.weight, *single.factors, **SCALES).double(), exact, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_of_heavy_ties(sparsity):
    """bf16 magnitudes with untrained factors: thousands of equal scores around the threshold."""
    weight = torch.randn(257, 999).to(torch.bfloat16)
    U, V, A, B, R, C = (torch.zeros_like(f) for f in make_problem(257, 999, factor_dtype=torch.float32).factors)
    num_pruned = int(weight.numel() * sparsity)
    mask = functional.unpack_mask(functional.prune_mask(weight, U, V, A, B, R, C, num_pruned), 999)
    assert torch.equal(mask, reference.prune_mask(weight.float().abs(), num_pruned))


def test_exact_on_dyadic_factors():
    """Scores that fp32 holds exactly give the mask of float64."""
    weight, factors = make_problem(200, 300, dyadic=True, weight_dtype=torch.float32, factor_dtype=torch.float32)
    scores = reference.scores(weight.double(), *(f.double() for f in factors), **SCALES)
    for num_pruned in (1, 30000, 54000, 59999, 60000):
        mask = functional.unpack_mask(functional.prune_mask(weight, *factors, num_pruned, **SCALES), 300)
        assert torch.equal(mask, reference.prune_mask(scores, num_pruned))


def test_num_pruned_as_a_tensor():
    weight, factors = make_problem(20, 40)
    packed = functional.prune_mask(weight, *factors, torch.tensor(321))
    assert torch.equal(packed, functional.prune_mask(weight, *factors, 321))


def test_gradcheck_of_the_weight_update():
    """With a fixed mask and the gradient through |W'| off, U, V, x and bias have true derivatives."""
    problem = make_problem(6, 35, rank=2).requires_grad()
    U, V, *score_factors = problem.factors
    packed = functional.prune_mask(problem.weight, *problem.factors, 100)
    x = torch.randn(3, 35, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    fixed = [f.detach() for f in score_factors]

    def layer(x, bias, U, V):
        return functional.pst_linear(x, problem.weight, bias, U, V, *fixed, packed, through_magnitude=False)

    assert torch.autograd.gradcheck(layer, (x, bias, U, V))


@pytest.mark.parametrize(
    "reduce",
    [
        lambda y: y.sum(),  # stride 0
        lambda y: y.t().contiguous().mul(torch.arange(y.numel()).view(y.shape[1], -1)).sum(),  # transposed
        lambda y: torch.cat([y, y.detach()], 1).pow(2).sum(),  # a slice of a cat
        lambda y: y[:, ::2].pow(2).sum() + y.mean(0).expand(4, -1).pow(2).sum(),
    ],
    ids=["sum", "transposed", "cat", "expanded"],
)
def test_gradients_of_any_layout(reduce):
    problem = make_problem(37, 70).requires_grad()
    packed = functional.prune_mask(problem.weight, *problem.factors, 1000, **SCALES)
    x = torch.randn(70, 9, dtype=torch.float64).t().requires_grad_()
    leaves = (x, *problem.factors)
    ours, exact = both(x, problem, None, packed)
    for value, expected in zip(
        torch.autograd.grad(reduce(ours), leaves), torch.autograd.grad(reduce(exact), leaves), strict=True
    ):
        torch.testing.assert_close(value, expected, **TIGHT)


def test_weight_of_any_layout():
    weight, factors = make_problem(40, 90)
    x = torch.randn(5, 90, dtype=torch.float64)
    packed = functional.prune_mask(weight, *factors, 3000, **SCALES)
    transposed = weight.t().contiguous().t()
    assert torch.equal(functional.prune_mask(transposed, *factors, 3000, **SCALES), packed)
    torch.testing.assert_close(
        functional.pst_linear(x, transposed, None, *factors, packed),
        functional.pst_linear(x, weight, None, *factors, packed), **TIGHT,
    )  # fmt: skip


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0, 3), (2, 1, 3)])
def test_leading_dimensions(leading):
    problem = make_problem(12, 34).requires_grad()
    packed = functional.prune_mask(problem.weight, *problem.factors, 200, **SCALES)
    x = torch.randn(*leading, 34, dtype=torch.float64, requires_grad=True)
    ours, exact = both(x, problem, None, packed)
    assert ours.shape == (*leading, 12)
    leaves = (x, *problem.factors)
    for value, expected in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(exact.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(value, expected, **TIGHT)


@pytest.mark.parametrize("needs", ["input", "factors", "bias", "U only"])
def test_only_the_gradients_asked_for(needs):
    problem = make_problem(10, 20)
    weight, factors = problem
    packed = functional.prune_mask(weight, *factors, 100, **SCALES)
    x = torch.randn(4, 20, dtype=torch.float64, requires_grad=needs == "input")
    bias = torch.randn(10, dtype=torch.float64, requires_grad=needs == "bias")
    factors = [
        f.clone().requires_grad_(needs == "factors" or (needs == "U only" and i == 0)) for i, f in enumerate(factors)
    ]
    leaves = [t for t in (x, bias, *factors) if t.requires_grad]
    ours, exact = both(x, type(problem)(weight, factors), bias, packed)
    gy = torch.randn_like(exact)
    for value, expected in zip(
        torch.autograd.grad(ours, leaves, gy), torch.autograd.grad(exact, leaves, gy), strict=True
    ):
        torch.testing.assert_close(value, expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, None])
def test_error_is_at_most_twice_that_of_pytorch(dtype, factor_dtype):
    """The oracle of low precision: the reference run in the same dtype is wrong by at least half as much as we are."""
    exact_problem = make_problem(64, 160, weight_dtype=dtype).to(torch.float64)
    x = torch.randn(48, 160).to(dtype)
    gy = torch.randn(48, 64).to(dtype)

    def run(function, problem, x, gy, mask):
        problem, x = problem.requires_grad(), x.detach().requires_grad_()
        y = function(x, problem.weight, None, *problem.factors, mask, **SCALES)
        return [y, *torch.autograd.grad(y, (x, *problem.factors), gy)]

    low = type(exact_problem)(
        exact_problem.weight.to(dtype), [f.to(factor_dtype or dtype) for f in exact_problem.factors]
    )
    exact_problem = low.to(torch.float64)
    packed = functional.prune_mask(low.weight, *low.factors, 8000, **SCALES)
    mask = functional.unpack_mask(packed, 160)
    ours = run(functional.pst_linear, low, x, gy, packed)
    plain = run(reference.pst_linear, low.to(dtype), x, gy, mask)
    exact = run(reference.pst_linear, exact_problem, x.double(), gy.double(), mask)
    assert ours[0].dtype == dtype
    assert [g.dtype for g in ours[2:]] == [f.dtype for f in low.factors]
    for value, naive, truth in zip(ours, plain, exact, strict=True):
        assert relative_error(value, truth) <= 2 * relative_error(naive, truth) + 1e-7


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_autocast_dtype(weight_dtype):
    weight, factors = make_problem(30, 64, weight_dtype=weight_dtype, factor_dtype=torch.float32)
    factors = [f.requires_grad_() for f in factors]
    packed = functional.prune_mask(weight, *factors, 900)
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.pst_linear(x, weight, None, *factors, packed)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), (x, *factors))
    assert all(g.dtype == torch.float32 for g in gradients)
    exact = reference.pst_linear(
        x.to(torch.bfloat16).double(), weight.double(), None, *(f.double() for f in factors),
        functional.unpack_mask(packed, 64),
    )  # fmt: skip
    assert relative_error(y, exact) < 4e-3  # bf16 rounds to 2^-9


def test_kept_for_backward():
    """Beyond x: the packed mask, and what is there anyway, the weight and the six factors."""
    weight, factors = make_problem(256, 512, rank=8, weight_dtype=torch.float32, factor_dtype=torch.float32)
    factors = [f.requires_grad_() for f in factors]
    packed = functional.prune_mask(weight, *factors, 100_000)
    x = torch.randn(4, 512)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.pst_linear(x, weight, None, *factors, packed)
    extra = set(kept) - {weight.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
    factor_bytes = sum(f.numel() * 4 for f in factors)
    assert sum(kept[p] for p in extra) <= 0.2 * weight.numel() + factor_bytes
    assert sum(kept[p] for p in extra) == weight.numel() // 8 + factor_bytes


def test_the_weight_stays_frozen():
    weight, factors = make_problem(4, 8)
    packed = functional.prune_mask(weight, *factors, 3)
    with pytest.raises(ValueError, match=r"weight requires grad, but PST keeps it frozen; call weight.requires_grad_"):
        functional.pst_linear(torch.randn(2, 8, dtype=torch.float64), weight.requires_grad_(), None, *factors, packed)
