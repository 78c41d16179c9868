"""The oracle itself: its gradient against finite differences, and against the formulas written out."""

import pytest
import torch
from oracle import SCALES, make_problem

from pst_kernels import reference


@pytest.mark.parametrize("through_magnitude", [True, False])
def test_gradcheck_with_fixed_scores(through_magnitude):
    weight, factors = make_problem(6, 7, rank=3, score_rank=2).requires_grad()
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        scores = reference.scores(weight, *factors, **SCALES)
    mask = reference.prune_mask(scores, 29)
    # without |W'| in the gradient its part of the score is a constant, so the differentiable function must hold it too
    frozen = reference.updated_weight(weight, *factors[:2], beta=SCALES["beta"]).abs().detach()

    def surrogate(x, bias, *factors):
        moving = reference.scores(weight, *factors, **SCALES)
        if not through_magnitude:
            moving = moving - reference.updated_weight(weight, *factors[:2], beta=SCALES["beta"]).abs() + frozen
        straight_through = mask + moving - scores
        return x @ (straight_through * reference.updated_weight(weight, *factors[:2], beta=SCALES["beta"])).T + bias

    inputs = (x, bias, *factors)
    assert torch.autograd.gradcheck(surrogate, inputs)
    gy = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.autograd.grad(surrogate(*inputs), inputs, gy)
    options = SCALES | {"through_magnitude": through_magnitude}
    y = reference.pst_linear(x, weight, bias, *factors, mask, **options)
    for ours, exact in zip(torch.autograd.grad(y, inputs, gy), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_page_itself():
    weight, factors = make_problem(5, 8, rank=2).requires_grad()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    anchor = reference.scores(weight, *factors).detach()
    mask = reference.prune_mask(anchor, 20)

    def page(x, *factors):
        return reference.pst_linear(x, weight, None, *factors, mask, anchor=anchor)

    assert torch.autograd.gradcheck(page, (x, *factors))


@pytest.mark.parametrize("through_magnitude", [True, False])
def test_gradient_formulas(through_magnitude):
    """dA = alpha1 D B^T and so on, with G, D and Q written out."""
    weight, (U, V, A, B, R, C) = make_problem(9, 11, rank=3).requires_grad()
    beta, alpha1, alpha2 = SCALES.values()
    x = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    mask = reference.prune_mask(reference.scores(weight, U, V, A, B, R, C, **SCALES), 60)
    options = SCALES | {"through_magnitude": through_magnitude}
    y = reference.pst_linear(x, weight, None, U, V, A, B, R, C, mask, **options)
    gy = torch.randn_like(y)
    dx, dU, dV, dA, dB, dR, dC = torch.autograd.grad(y, (x, U, V, A, B, R, C), gy)
    W = weight + beta * U @ V
    G = gy.T @ x
    D = G * W
    Q = G * (mask + W.abs()) if through_magnitude else G * mask
    for value, formula in [
        (dx, gy @ (mask * W)), (dA, alpha1 * D @ B.T), (dB, alpha1 * A.T @ D), (dR, alpha2 * D.sum(1)),
        (dC, alpha2 * D.sum(0)), (dU, beta * Q @ V.T), (dV, beta * U.T @ Q),
    ]:  # fmt: skip
        torch.testing.assert_close(value, formula, rtol=1e-12, atol=1e-12)


def test_ties_prune_the_lower_index_first():
    scores = torch.tensor([[1.0, 0.0, 1.0], [-0.0, 1.0, 0.0]])
    assert reference.prune_mask(scores, 2).tolist() == [[True, False, True], [False, True, True]]
    assert reference.prune_mask(scores, 4).tolist() == [[False, False, True], [False, True, False]]
