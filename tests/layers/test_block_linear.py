"""BlockSparseLinear: what it stores, its product and gradients, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import differences, snapshot

from pst_kernels import ops
from pst_kernels.cpu import kept_blocks
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SHAPES = [(128, 192), (150, 200), (16, 300), (70, 33)]


def blocks_of(shape=(150, 200), size=16, dtype=torch.float64, share=0.4):
    """A layer of random kept blocks, and its dense weight by element-wise masking."""
    out, columns = shape
    kept = torch.rand(-(-out // size), -(-columns // size)) < share
    weight = torch.randn(shape, dtype=dtype)
    bias = nn.Parameter(torch.randn(out, dtype=dtype))
    mask = kept.repeat_interleave(size, 0)[:out].repeat_interleave(size, 1)[:, :columns]
    return BlockSparseLinear.from_dense(weight, bias, size, kept), weight * mask


@pytest.mark.parametrize("size", [1, 16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stores_the_kept_blocks(shape, size):
    layer, dense = blocks_of(shape, size)
    assert torch.equal(layer.to_dense(), dense)
    assert layer.sparsity == pytest.approx((dense == 0).double().mean().item(), abs=1e-12)
    linear = nn.Linear(shape[1], shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(dense)
    found = BlockSparseLinear.from_linear(linear, size)
    assert not differences(
        snapshot(found) | {"bias": torch.zeros(0)}, snapshot(layer) | {"bias": torch.zeros(0)}
    )  # the blocks that are not zero
    assert found.bias is linear.bias
    assert not found.weight.requires_grad


def test_a_block_of_nan_is_kept_and_a_block_of_minus_zero_is_not():
    weight = torch.zeros(4, 6)
    weight[0, 4], weight[3, 0] = float("nan"), -0.0
    layer = BlockSparseLinear.from_dense(weight, None, 2)
    assert (layer.crow_indices.tolist(), layer.col_indices.tolist()) == ([0, 1, 1], [2])
    assert layer.to_dense()[0, 4].isnan()


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(shape, size, with_bias):
    layer, dense = blocks_of(shape, size)
    layer.bias = layer.bias if with_bias else None
    x = torch.randn(5, shape[1], 3, dtype=torch.float64).transpose(1, 2).requires_grad_()  # not contiguous
    y = layer(x)
    exact = nn.functional.linear(x, dense, layer.bias)
    torch.testing.assert_close(y, exact, **TIGHT)
    leaves = (x, layer.bias) if with_bias else (x,)
    for gy in (torch.randn_like(y), torch.ones((), dtype=torch.float64).expand_as(y)):  # the second has stride 0
        ours = torch.autograd.grad(y, leaves, gy, retain_graph=True)
        for value, expected in zip(ours, torch.autograd.grad(exact, leaves, gy, retain_graph=True), strict=True):
            torch.testing.assert_close(value, expected, **TIGHT)


def test_gradcheck():
    layer, _ = blocks_of((20, 35))
    x = torch.randn(4, 35, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, bias: torch.func.functional_call(layer, {"bias": bias}, x), (x, layer.bias)
    )


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_err_no_more_than_a_dense_product(dtype, size):
    layer, dense = blocks_of((130, 2000), size, dtype, share=0.9)
    x, gy = torch.randn(64, 2000).to(dtype).requires_grad_(), torch.randn(64, 130).to(dtype)
    y = layer(x)
    y.backward(gy)
    with torch.no_grad():
        pairs = (
            (y, nn.functional.linear(x, dense, layer.bias), x.double() @ dense.double().T + layer.bias.double()),
            (x.grad, gy @ dense, gy.double() @ dense.double()),
        )
    for ours, plain, truth in pairs:
        assert ours.dtype == dtype
        assert (ours.double() - truth).norm() <= 2.0 * (plain.double() - truth).norm()


def test_under_autocast_it_is_the_linear_layer_in_that_dtype():
    layer, dense = blocks_of(dtype=torch.float32)
    x = torch.randn(7, 200)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    sixteen = copy.deepcopy(layer).bfloat16()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, sixteen(x.bfloat16()))
    truth = x.bfloat16().double() @ dense.bfloat16().double().T + layer.bias.double()
    assert (y.double() - truth).norm() <= 4e-3 * truth.norm()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0)], ids=str)
def test_few_tokens(shape):
    layer, dense = blocks_of()
    x = torch.randn(*shape, 200, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, dense, layer.bias), **TIGHT)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, dense.sum(0).expand_as(dx), **TIGHT)


@pytest.fixture
def passes(monkeypatch):
    """The compiled passes for few tokens, and how many calls took them."""
    module = pytest.importorskip("pst_kernels.cpu.compiled.block_passes", reason="numba is not installed")
    calls, product = [], module.product
    monkeypatch.setattr(module, "product", lambda *operands: calls.append(operands[0].shape[0]) or product(*operands))
    return calls


@pytest.mark.parametrize("tokens", [1, 2, 7, 128])
@pytest.mark.parametrize(("shape", "size"), [((150, 200), 16), ((70, 33), 8), ((130, 100), 64), ((16, 300), 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_take_the_compiled_pass(passes, dtype, shape, size, tokens):
    layer, dense = blocks_of(shape, size, dtype)
    dense = dense.double()
    for bias in (layer.bias, None):
        layer.bias = bias
        x = torch.randn(tokens, shape[1], dtype=dtype, requires_grad=True)
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)  # the call that was kept ready, past the dispatcher
        (dx,) = torch.autograd.grad(y.sum(), x)
        truth = nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
        room = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (4e-3, 1e-2)}[dtype]
        torch.testing.assert_close(y.double(), truth, rtol=room[0], atol=room[1])
        torch.testing.assert_close(dx.double(), dense.sum(0).expand_as(dx), rtol=room[0], atol=room[1])
    assert passes == [tokens] * 6


def test_more_tokens_and_other_sizes_take_the_library(passes):
    for tokens, size, dtype in ((129, 16, torch.float32), (3, 12, torch.float32), (3, 16, torch.float16)):
        layer, dense = blocks_of((40, 50), size, dtype)
        x = torch.randn(tokens, 50, dtype=dtype)
        torch.testing.assert_close(
            layer(x).double(), nn.functional.linear(x.double(), dense.double(), layer.bias.double()),
            rtol=2e-3, atol=2e-2,
        )  # fmt: skip
    assert not passes


def test_what_is_kept_ready_follows_the_layer(passes):
    """New values in place, other blocks from a state dict, other threads: each call sees the layer as it is."""
    layer, _ = blocks_of((96, 64), 8, torch.float32)
    x = torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2.0), layer.bias.add_(1.0)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_dense(), layer.bias))
        layer.load_state_dict(blocks_of((96, 64), 8, torch.float32, share=0.7)[0].state_dict())
        y = layer(x)
        torch.testing.assert_close(y, nn.functional.linear(x, layer.to_dense(), layer.bias))
        threads = torch.get_num_threads()
        for other in (1, 3):
            torch.set_num_threads(other)
            assert torch.equal(layer(x), y)
        torch.set_num_threads(threads)
    assert len(passes) == 5


def test_nan_reaches_what_keeps_its_block(passes):
    layer, _ = blocks_of((32, 48), 16, torch.float32)
    x = torch.zeros(2, 48)
    x[1, 17] = float("nan")
    with torch.no_grad():
        y = layer(x)
    second = {i for i in range(2) if 1 in layer.col_indices[layer.crow_indices[i] : layer.crow_indices[i + 1]]}
    assert not y[0].isnan().any()
    assert [bool(part.isnan().any()) for part in y[1].split(16)] == [i in second for i in range(2)]
    assert passes == [2]


def test_a_layer_without_blocks_gives_the_bias():
    layer = BlockSparseLinear(40, 50, 16)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(3, 40, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.bias.expand_as(y))
    assert layer.sparsity == 1.0
    assert not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_stored_blocks_are_multiplied(dtype):
    counted = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name.startswith("aten::addmm"):
                left, right = args[-2:]
                counted.append(left.shape[0] * right.numel())
            return function(*args, **(kwargs or {}))

    layer, dense = blocks_of((256, 512), 16, dtype)
    parts, indices = (layer.weight.detach(), layer.bias.detach()), (layer.crow_indices, layer.col_indices)
    with Counting():  # it does not see into an op
        kept_blocks._multiply_blocks(torch.randn(32, 512).to(dtype), *parts, *indices, 256)
    assert sum(counted) == 32 * int((dense != 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    layer, _ = blocks_of((40, 50), dtype=dtype)
    x, indices = torch.randn(6, 50).to(dtype), (layer.crow_indices, layer.col_indices)
    for bias in (layer.bias.detach(), None):
        torch.library.opcheck(ops.kept_blocks_forward, (x, layer.weight, bias, *indices, 40))
    torch.library.opcheck(ops.kept_blocks_backward, (torch.randn(6, 40).to(dtype), layer.weight, *indices, 50))


def test_compiles_as_one_graph():
    layer, _ = blocks_of(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 200, requires_grad=True)
    y, expected = compiled(x), layer(x)
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(value.pow(2).sum(), x)[0] for value in (y, expected)))


def test_a_graph_keeps_no_input():
    """Between forward and backward it keeps the blocks, which exist anyway: dx does not need x."""
    layer, _ = blocks_of()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(torch.randn(7, 200, dtype=torch.float64, requires_grad=True))
    assert set(kept) == {layer.weight.data_ptr(), layer.crow_indices.data_ptr(), layer.col_indices.data_ptr()}


# torch's layout


def test_to_torch_bsr_and_back():
    layer, dense = blocks_of((128, 192), 32)
    bsr = layer.to_bsr()
    assert bsr.layout == torch.sparse_bsr
    assert torch.equal(bsr.to_dense(), dense)
    assert torch.equal(bsr.crow_indices(), layer.crow_indices)
    again = BlockSparseLinear.from_bsr(bsr, layer.bias)
    assert not differences(snapshot(again), snapshot(layer))
    of_torch = BlockSparseLinear.from_bsr(dense.to_sparse_bsr((32, 32)), layer.bias)
    assert not differences(snapshot(of_torch), snapshot(layer))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch's BSR product on a CPU needs MKL")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_of_other_devices_is_the_same(shape, with_bias):
    """torch's BSR product, which runs where the layer is not on a CPU; here on a CPU."""
    layer, dense = blocks_of(shape, 16)
    bias = layer.bias if with_bias else None
    x, gy = torch.randn(6, shape[1], dtype=torch.float64), torch.randn(6, shape[0], dtype=torch.float64)
    indices = layer.crow_indices, layer.col_indices
    y = kept_blocks._multiply_bsr(x, layer.weight, bias, *indices, shape[0])
    torch.testing.assert_close(y, nn.functional.linear(x, dense, bias), **TIGHT)
    transposed = kept_blocks.transpose(layer.weight, *indices, shape[1])
    dx = kept_blocks._multiply_bsr(gy, transposed[0], None, *transposed[1:], shape[1])
    torch.testing.assert_close(dx, gy @ dense, **TIGHT)


# State dicts


def test_a_state_dict_brings_its_own_number_of_blocks(tmp_path):
    from safetensors.torch import load_file, save_file

    layer, dense = blocks_of()
    save_file(layer.state_dict(), tmp_path / "file")
    for start in (BlockSparseLinear(200, 150, 16, dtype=torch.float64), blocks_of()[0]):
        model = nn.Sequential(start)
        model.load_state_dict({f"0.{name}": tensor for name, tensor in load_file(tmp_path / "file").items()})
        assert not differences(snapshot(model[0]), snapshot(layer))
        assert torch.equal(model[0].to_dense(), dense)
        assert not model[0].weight.requires_grad
    with torch.device("meta"):
        start = BlockSparseLinear(200, 150, 16, dtype=torch.float64)
    start.load_state_dict(load_file(tmp_path / "file"), assign=True)
    assert torch.equal(start.to_dense(), dense)


def test_damaged_state_dicts_are_refused_and_change_nothing():
    layer, _ = blocks_of((48, 64), share=2.0)  # all twelve blocks
    state, before = snapshot(layer), snapshot(layer)
    rising = "that do not rise from 0 to the number of blocks"
    damaged = {
        "other size": ({"weight": torch.randn(12, 8, 8)}, r"blocks of shape \(12, 8, 8\), not \(kept, 16, 16\)"),
        "dense": ({"weight": torch.randn(48, 64)}, r"blocks of shape \(48, 64\)"),
        "rows": ({"crow_indices": torch.tensor([0, 12])}, r"crow_indices \(2,\) and col_indices \(12,\), not \(4,\)"),
        "count": ({"col_indices": torch.arange(11)}, r"col_indices \(11,\), not \(4,\) and \(12,\)"),
        "first": ({"crow_indices": torch.tensor([1, 4, 8, 12])}, rising),
        "last": ({"crow_indices": torch.tensor([0, 4, 8, 11])}, rising),
        "falls": ({"crow_indices": torch.tensor([0, 8, 4, 12])}, rising),
        "high": ({"col_indices": torch.tensor([0, 1, 2, 4] * 3)}, "from 0 to below 4"),
        "low": ({"col_indices": torch.tensor([-1, 1, 2, 3] * 3)}, "from 0 to below 4"),
        "twice": ({"col_indices": torch.tensor([0, 1, 1, 3] * 3)}, "do not rise within each row"),
    }
    for change, message in damaged.values():
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state | change)
        assert not differences(snapshot(layer), before)
    with pytest.raises(RuntimeError, match="crow_indices"):
        layer.load_state_dict({"weight": state["weight"], "bias": state["bias"]})


# Errors


@pytest.mark.parametrize("name", ["in_features", "out_features", "block_size"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_sizes_must_be_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1, got {value}"):
        BlockSparseLinear(**{"in_features": 8, "out_features": 8, "block_size": 8} | {name: value})


def test_what_it_cannot_be_made_of_is_refused():
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Conv1d"):
        BlockSparseLinear.from_linear(nn.Conv1d(4, 4, 1), 2)
    with pytest.raises(TypeError, match=r"weight must be 2-d \(out, in\) of float32.* got torch.int8"):
        BlockSparseLinear.from_dense(torch.ones(4, 4, dtype=torch.int8), None, 2)
    with pytest.raises(ValueError, match=r"kept must be bool of shape \(2, 3\) for weight \(4, 5\)"):
        BlockSparseLinear.from_dense(torch.ones(4, 5), None, 2, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"weight must be a 2-d torch.sparse_bsr tensor, got torch.strided \(4, 4\)"):
        BlockSparseLinear.from_bsr(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"blocks of \(2, 4\); convert it with square ones"):
        BlockSparseLinear.from_bsr(torch.ones(4, 4).to_sparse_bsr((2, 4)))
    indices = torch.tensor([0, 1]), torch.tensor([3])
    outside = torch.sparse_bsr_tensor(*indices, torch.ones(1, 2, 2), (2, 4), check_invariants=False)
    with pytest.raises(ValueError, match="not a valid BSR tensor: col_indices that do not rise"):
        BlockSparseLinear.from_bsr(outside)
    with pytest.raises(ValueError, match=r"\(150, 200\) is not made of whole blocks of 16.*use to_dense\(\)"):
        blocks_of()[0].to_bsr()


def test_inputs_that_do_not_fit_are_refused():
    layer, _ = blocks_of(dtype=torch.float32)
    for x in (torch.randn(3, 150), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., 200\), got shape"):
            layer(x)
    with pytest.raises(TypeError, match=r"x is torch.float64 but weight is torch.float32; .*autocast"):
        layer(torch.randn(3, 200).double())
    with pytest.raises(ValueError, match="weight is on cpu but x is on meta; move the layer or the input"):
        layer(torch.randn(3, 200, device="meta"))
    layer.requires_grad_(True)
    with pytest.raises(ValueError, match=r"does not train it; call weight.requires_grad_\(False\)"):
        layer(torch.randn(3, 200))
    with torch.no_grad():
        assert layer(torch.randn(3, 200)).shape == (3, 150)


def test_says_what_it_holds():
    layer, _ = blocks_of((48, 64), share=2.0)
    assert repr(layer) == (
        "BlockSparseLinear(in_features=64, out_features=48, block_size=16, bias=True, blocks=12 of 12)"
    )
