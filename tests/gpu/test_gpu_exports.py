"""What a trained model becomes on a GPU: block-sparse layers, and torch's semi-structured tensors."""

from __future__ import annotations

import pytest
import torch
import toys
from linear_problem import relative_error
from places import CUDA, Place
from torch import nn

import pst_kernels as pst
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 192), (150, 200)], ids=str)
def test_block_sparse_linear(gpu: Place, shape: tuple[int, int], dtype: torch.dtype) -> None:
    (out, columns), size = shape, 32
    kept = torch.rand(-(-out // size), -(-columns // size)) < 0.4
    weight, bias = torch.randn(shape).to(dtype), nn.Parameter(torch.randn(out).to(dtype))
    layer = BlockSparseLinear.from_dense(weight, bias, size, kept).to(gpu.device)
    dense = layer.to_dense().double()
    mask = kept.repeat_interleave(size, 0)[:out].repeat_interleave(size, 1)[:, :columns]
    assert torch.equal(dense.cpu(), (weight * mask).double())
    x = torch.randn(64, columns).to(gpu.device, dtype).requires_grad_()
    gy = torch.randn(64, out).to(gpu.device, dtype)
    y = layer(x)
    y.backward(gy)
    error = 4.0 * torch.finfo(dtype).eps
    assert relative_error(y.detach(), x.detach().double() @ dense.T + layer.bias.detach().double()) <= error
    assert relative_error(x.grad, gy.double() @ dense) <= error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_semi_structured(gpu: Place, dtype: torch.dtype) -> None:
    """A stand-in, where torch has no such tensors, merges to dense ones."""
    model = pst.replace_linear(toys.plain(128, 256, 64, 4).to(gpu.device, dtype), pst.PSTConfig(pattern="2:4"))
    toys.perturb(model)
    x = torch.randn(64, 128).to(gpu.device, dtype)
    with torch.no_grad():
        expected = model(x)
        merged = pst.merge_and_unload(model, format="semi_structured" if gpu.kind == CUDA else "dense")
        if gpu.kind == CUDA:
            assert isinstance(merged[0].weight.data, torch.sparse.SparseSemiStructuredTensor)
        assert relative_error(merged(x), expected.double()) <= 4.0 * torch.finfo(dtype).eps
