"""torch.compile of a layer as one graph: the same values as eagerly, over steps in which its factors move."""

from __future__ import annotations

import pytest
import torch
from linear_problem import relative_error
from places import CUDA, Place

import pst_kernels as pst


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(torch.float32, "plain"), (torch.bfloat16, "plain"), (torch.float32, "fisher")], ids=str
)
def test_a_layer_compiles_as_one_graph(gpu: Place, dtype: torch.dtype, magnitude: str) -> None:
    torch.manual_seed(0)
    layer = pst.PSTLinear(48, 32, dtype=dtype, config=pst.PSTConfig(sparsity=0.5, magnitude=magnitude)).to(gpu.device)
    if layer.moments is not None:
        layer.pst_moments.copy_(torch.rand(80) + 0.1)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if gpu.kind == CUDA else "aot_eager")
    x = torch.randn(5, 48).to(gpu.device, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(3):
        gradients = []
        for run in (compiled, layer):
            y = run(x)
            gradients.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), layer.factors)])
        for found, expected in zip(*gradients, strict=True):
            assert found.dtype == expected.dtype
            assert relative_error(found, expected.double()) <= tolerance
        with torch.no_grad():  # by steps of one size, so that nothing grows beyond what its sums can tell apart
            for factor, gradient in zip(layer.factors, gradients[1][1:], strict=True):
                factor -= 0.01 * gradient / gradient.abs().max().clamp(min=1e-3)
    if (moments := layer.moments) is not None:
        moments.seen = None
        for run in (compiled, layer):
            run(x).float().square().sum().backward()
        assert moments.tally.grad[-1] == moments.seen[-1] == 1
        assert relative_error(moments.tally.grad, moments.seen.double()) <= tolerance
    assert int((~layer.mask).sum()) == 32 * 48 // 2
