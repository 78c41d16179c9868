"""The ops as PyTorch sees them: schemas, fakes, opcheck, compilation, and the choice of a backend."""

import logging

import pytest
import torch
from op_samples import samples

import pst_kernels as pst
from pst_kernels import functional, notices, ops


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    checked = set()
    for name, arguments in samples(dtype):
        torch.library.opcheck(getattr(torch.ops.pst_kernels, name).default, arguments)
        checked.add(name)
    assert checked == set(ops.NAMES)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_layer_compiles_as_one_graph(backend):
    torch.manual_seed(0)
    layer = pst.PSTLinear(24, 16, config=pst.PSTConfig(sparsity=0.5))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(5, 24)
    for _ in range(3):
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.pow(2).sum().backward()
        with torch.no_grad():
            for factor in layer.factors:
                factor -= 0.1 * factor.grad
                factor.grad = None
    assert int((~layer.mask).sum()) == 16 * 24 // 2


def test_a_compiled_layer_notices_changes():
    torch.manual_seed(0)
    layer = pst.PSTLinear(24, 16, config=pst.PSTConfig(sparsity=0.5))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 24)
    before = compiled(x)
    with torch.no_grad():
        layer.pst_C += 10.0 * torch.arange(24) % 7
    after = compiled(x)
    assert not torch.equal(before, after)
    expected = pst.functional.prune_mask(layer.weight, *layer.factors, 192)
    assert torch.equal(layer.pst_mask, expected)
    torch.testing.assert_close(after, layer(x))


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("PST_KERNELS_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match=r"PST_KERNELS_BACKEND='cuda' is not known; set it to one of auto, triton, torch"
    ):
        functional.kth_value(torch.randn(4), 1)


def test_an_explicit_request_never_falls_back(monkeypatch):
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(ops.env, "has_triton", lambda: False)
    with pytest.raises(ImportError, match="PST_KERNELS_BACKEND=triton, but triton is not installed"):
        functional.kth_value(torch.randn(4), 1)


def test_a_fallback_says_once_why(monkeypatch, caplog):
    monkeypatch.setattr(ops.env, "has_triton", lambda: False)
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="pst_kernels"):
        ops.kernels_for("cuda")
        ops.kernels_for("cuda")
    assert [r.message for r in caplog.records] == [
        "pst_kernels runs in plain PyTorch on the GPU, slowly: triton is not installed"
    ]
    assert ops.env.backend_for("cpu") == ("torch", "no kernels for cpu tensors")
