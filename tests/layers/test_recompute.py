"""A layer's input that is made again for its backward: the same gradients, and it is not kept meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu
from torch.utils.checkpoint import checkpoint

from bench.speed import measure
from pst_kernels import PSTConfig, PSTLinear
from pst_kernels.layers import recompute

IN, OUT = 12, 7
WEIGHT, BIAS = torch.linspace(0.5, 1.5, IN), torch.linspace(-1.0, 1.0, IN)

PRODUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu tanh": lambda z: gelu(z, approximate="tanh"),
    "silu": silu,
    "gated": lambda z: silu(z) * (z + 1.0),
    "gated, broadcast": lambda z: silu(z) * (z[:, :1] + 1.0),
    "LayerNorm": lambda z: layer_norm(z, (IN,), WEIGHT, BIAS, 1e-3),
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda z: z * 3.0,
    "times a parameter": lambda z: nn.Parameter(WEIGHT) * z,
    "times a constant": lambda z: WEIGHT * z,
    "view": lambda z: gelu(z).view(15, IN),
    "LayerNorm without weight": lambda z: layer_norm(z, (IN,)),
    "other function": torch.tanh,
    "written in place": lambda z: gelu(z).add_(1.0),
    "product written in place": lambda z: gelu(z).mul_(z),
}


def layer_of(recompute_input: bool, pattern: str = "unstructured", dtype: torch.dtype = torch.float32) -> PSTLinear:
    torch.manual_seed(0)
    config = PSTConfig(sparsity=0.5, pattern=pattern, recompute_input=recompute_input)
    layer = PSTLinear(IN, OUT, config=config, dtype=dtype)
    with torch.no_grad():
        layer.pst_V.normal_(0.0, 0.1)
        layer.pst_B.normal_(0.0, 0.1)
    return layer


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def gradients(layer: PSTLinear, y: Tensor, z: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.float().square().sum(), [z, *layer.factors]))


def keeps(y: Tensor, x: Tensor) -> bool:
    """Whether the layer behind y keeps x itself."""
    node: Any = y.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return x.data_ptr() in [t.data_ptr() for t in node.saved_tensors if t is not None]


@pytest.mark.parametrize("pattern", ["unstructured", "block:16"])
@pytest.mark.parametrize("name", PRODUCERS)
def test_made_again(name: str, pattern: str) -> None:
    found = {}
    for recompute_input in (False, True):
        z, layer = start(), layer_of(recompute_input, pattern)
        x = PRODUCERS[name](z + 0.0)
        y = layer(x)
        assert keeps(y, x) is not recompute_input
        found[recompute_input] = gradients(layer, y, z)
    for kept, again in zip(found[False], found[True], strict=True):
        if name == "LayerNorm":
            assert (kept - again).norm() <= 1e-6 * kept.norm()
        else:
            assert torch.equal(kept, again)


@pytest.mark.parametrize("name", KEPT)
def test_kept_where_it_cannot_be_made_again(name: str) -> None:
    found = {}
    for recompute_input in (False, True):
        z, layer = start(), layer_of(recompute_input)
        x = KEPT[name](z + 0.0)
        y = layer(x)
        assert keeps(y, x)
        found[recompute_input] = gradients(layer, y, z)
    assert all(map(torch.equal, found[False], found[True]))


def test_kept_after_a_write_that_autograd_did_not_see() -> None:
    z, layer = start(), layer_of(True)
    x = gelu(z)
    with torch.no_grad():
        x.mul_(2.0)
    assert recompute.producer_of(x) is None
    assert keeps(layer(x), x)


def test_an_input_without_a_gradient_is_kept() -> None:
    x = gelu(start().detach())
    assert keeps(layer_of(True)(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    for name in ("gelu", "gated"):
        found = {}
        for recompute_input in (False, True):
            z, layer = start(dtype), layer_of(recompute_input, dtype=dtype)
            x = PRODUCERS[name](z + 0.0)
            y = layer(x)
            assert keeps(y, x) is not recompute_input
            found[recompute_input] = gradients(layer, y, z)
        assert all(map(torch.equal, found[False], found[True]))
    x = layer_norm(start(dtype) + 0.0, (IN,), WEIGHT.to(dtype), BIAS.to(dtype))
    assert recompute.producer_of(x) is None  # it would be rounded in another way


def test_autocast() -> None:
    for name in ("gelu", "LayerNorm"):
        found = {}
        for recompute_input in (False, True):
            z, layer, before = start(), layer_of(recompute_input), nn.Linear(IN, IN)
            nn.init.eye_(before.weight)
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(PRODUCERS[name](before(z)))
            assert y.dtype == torch.bfloat16
            found[recompute_input] = gradients(layer, y, z)
        for kept, again in zip(found[False], found[True], strict=True):
            # a last bit of LayerNorm's fp32 may round the other way in bf16
            assert (kept - again).norm() <= (2e-3 if name == "LayerNorm" else 0.0) * kept.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_decides_for_itself(reentrant: bool) -> None:
    found = {}
    for recompute_input in (False, True):
        z, layer = start(), layer_of(recompute_input)
        calls = []

        def block(z: Tensor, layer: PSTLinear = layer, calls: list = calls) -> Tensor:
            calls.append(0)
            return layer(gelu(z + 0.0))

        y = checkpoint(block, z, use_reentrant=reentrant)
        y.square().sum().backward()
        found[recompute_input] = [z.grad, *(f.grad for f in layer.factors)]
        assert len(calls) == 2  # looking at what autograd keeps must not run it once more
    assert all(map(torch.equal, found[False], found[True]))


def test_offloading_decides_for_itself() -> None:
    z, layer = start(), layer_of(True)
    x = gelu(z + 0.0)
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert recompute.producer_of(x) is None
        layer(x)
    assert x.data_ptr() in packed
    assert recompute.producer_of(x) is not None


def test_writing_into_what_it_is_made_of_is_an_error() -> None:
    z, layer = start(), layer_of(True)
    hidden = z + 0.0
    y = layer(gelu(hidden))
    with torch.no_grad():
        hidden.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_it_is_made_of_was_freed() -> None:
    z, layer, weight = start(), layer_of(True), WEIGHT.clone()
    y = layer(layer_norm(z + 0.0, (IN,), weight, BIAS))
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"recompute_input=False"):
        torch.autograd.grad(y.sum(), layer.pst_U)


def test_a_setting_that_is_no_bool() -> None:
    with pytest.raises(TypeError, match="recompute_input"):
        PSTConfig(recompute_input="yes")  # type: ignore[arg-type]


def test_memory_of_an_mlp() -> None:
    """At the end of the forward four results of GELU are not held, beside the one that is being used."""
    tokens, width = 4096, 64

    def peak(recompute_input: bool) -> int:
        config = PSTConfig(sparsity=0.5, recompute_input=recompute_input)
        layers = [PSTLinear(width, width, config=config) for _ in range(5)]
        x = torch.randn(tokens, width, requires_grad=True)

        def step() -> None:
            hidden = x
            for layer in layers:
                hidden = layer(gelu(hidden))
            hidden.sum().backward()

        step()
        return measure.peak_bytes(step, "cpu")

    kept, again = peak(False), peak(True)
    assert kept - again >= 3 * tokens * width * 4
