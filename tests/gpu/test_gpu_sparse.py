"""Products with packed weights on the device against float64, twice with the same bits, and without waiting."""

from __future__ import annotations

import pytest
import torch
from linear_problem import relative_error
from places import Place
from sparse_problem import COMPILED, FOR_GPUS, OUTPUTS, Problem

from pst_kernels import ops


@pytest.mark.parametrize("problem", [*COMPILED, *FOR_GPUS], ids=str)
def test_equals_float64(gpu: Place, problem: Problem) -> None:
    x, gy, layer = problem.tensors()
    x, gy, layer = x.to(gpu.device), gy.to(gpu.device), layer.to(gpu.device)
    lists, bias = (layer.weight.detach(), layer.offsets, layer.pointers), layer.bias.detach()

    def products() -> list[torch.Tensor]:
        y = ops.sparse_forward(x, *lists, bias, problem.out)
        return [y, *ops.sparse_backward(gy, x, *lists, problem.columns, True, True)]

    found = [value.cpu() for value in gpu.twice(products)]
    errors = dict(zip(OUTPUTS, map(relative_error, found, problem.exact()), strict=True))
    assert problem.wrong(errors) == {}


def test_a_captured_layer_replays(gpu: Place) -> None:
    x, _, layer = Problem(70, 300, 8).tensors()
    x, layer = x.to(gpu.device), layer.to(gpu.device)
    found = torch.zeros(8, 70, dtype=x.dtype, device=gpu.device)

    @torch.no_grad()
    def step() -> None:
        found.copy_(layer(x))

    replay = gpu.captured(step)
    x.copy_(torch.randn(8, 300))
    replay()
    expected = x.double() @ layer.to_dense().double().T + layer.bias.detach().double()
    assert relative_error(found.cpu(), expected.detach().cpu()) <= 2e-2
