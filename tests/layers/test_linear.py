"""PSTLinear and PSTConv1D: when a mask is made, merging, dtypes, and what a state dict means."""

import concurrent.futures
import copy
import pickle

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels import cpu, functional, reference
from pst_kernels.layers.pst_layer import FACTORS


@pytest.fixture(params=["PSTLinear", "PSTConv1D"])
def layer(request):
    torch.manual_seed(0)
    config = pst.PSTConfig(sparsity=0.6, weight_rank=3, score_rank=2)
    if request.param == "PSTLinear":
        made = pst.PSTLinear(40, 24, config=config)
    else:
        made = pst.PSTConv1D(24, 40, config=config)
    with torch.no_grad():
        for factor in made.factors:
            factor.copy_(torch.randn_like(factor) * 0.1)
    return made


@pytest.fixture
def refreshes(monkeypatch):
    """Counts how often a mask is computed."""
    calls = []
    compute = cpu.prune_mask
    monkeypatch.setattr(cpu, "prune_mask", lambda *args: calls.append(1) or compute(*args))
    return calls


def reference_output(layer, x):
    weight, factors = layer.oriented_weight.double(), [f.double() for f in layer.factors]
    scores = reference.scores(weight, *factors)
    mask = reference.prune_mask(scores.float(), int(layer.pst_num_pruned))
    bias = None if layer.bias is None else layer.bias.double()
    return reference.pst_linear(x.double(), weight, bias, *factors, mask)


def step(layer, x):
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    layer(x).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_follows_the_reference_through_training(layer):
    x = torch.randn(3, 7, 40)
    for _ in range(5):
        torch.testing.assert_close(layer(x).double(), reference_output(layer, x), rtol=1e-5, atol=1e-5)
        step(layer, x)


def test_one_mask_per_optimizer_step(layer, refreshes):
    x = torch.randn(4, 40)
    for _ in range(3):  # gradient accumulation and evaluation reuse it
        layer(x).sum().backward()
    layer.eval()
    layer(x)
    assert len(refreshes) == 1
    layer.train()
    step(layer, x)
    layer(x)
    layer(x)
    assert len(refreshes) == 2
    layer.sparsity = 0.7
    layer(x)
    assert len(refreshes) == 3
    assert int((~layer.mask).sum()) == int(layer.weight.numel() * 0.7)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_every_kind_of_optimizer_is_noticed(layer, refreshes, options):
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, **options)
    x = torch.randn(4, 40)
    for _ in range(3):
        layer(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(layer(x).double(), reference_output(layer, x), rtol=1e-5, atol=1e-5)
    assert len(refreshes) == 4


def test_recomputation_reuses_the_mask(layer, refreshes):
    x = torch.randn(4, 40, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(refreshes) == 1


@pytest.mark.parametrize("name", ["weight", *FACTORS])
def test_every_input_of_the_mask_is_watched(layer, refreshes, name):
    layer.refresh_mask()
    with torch.no_grad():
        getattr(layer, name).mul_(1.5)
    layer.refresh_mask()
    layer.refresh_mask()
    assert len(refreshes) == 2


def test_a_replaced_parameter_is_noticed(layer, refreshes):
    layer.refresh_mask()
    other = nn.Parameter(torch.empty_like(layer.pst_A))
    with torch.no_grad():
        while other._version < layer.pst_A._version:  # only its address tells it from its predecessor
            other.normal_()
    layer.pst_A = other
    layer.refresh_mask()
    assert len(refreshes) == 2


def test_forced_refresh_sees_what_versions_do_not(layer, refreshes):
    layer.refresh_mask()
    layer.pst_C.data.normal_()
    layer.refresh_mask()
    assert len(refreshes) == 1
    layer.refresh_mask(force=True)
    assert len(refreshes) == 2


def test_mask_interval(refreshes):
    layer = pst.PSTLinear(16, 16, config=pst.PSTConfig(sparsity=0.5, mask_interval=3))
    x, made = torch.randn(2, 16), []
    for _ in range(9):
        step(layer, x)
        made.append(len(refreshes))
    assert made == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_steps_of_other_optimizers_do_not_shorten_an_interval(refreshes):
    layer = pst.PSTLinear(16, 16, config=pst.PSTConfig(sparsity=0.5, mask_interval=3))
    other = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    x, made = torch.randn(2, 16), []
    for _ in range(9):
        step(layer, x)
        for _ in range(4):  # a discriminator, say, that is trained beside it
            other.step()
            layer(x)
        made.append(len(refreshes))
    assert made == [1, 1, 2, 2, 2, 3, 3, 3, 4]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_notices_the_steps_of_its_own_optimizer(refreshes, copied):
    """A fused optimizer moves no version counter."""
    layer = pst.PSTLinear(16, 16, config=pst.PSTConfig(sparsity=0.5))
    layer.refresh_mask()
    again, x = copied(layer), torch.randn(2, 16)
    again(x)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.1, fused=True)
    again(x).pow(2).mean().backward()
    made = len(refreshes)
    optimizer.step()
    layer(x)
    assert len(refreshes) == made
    again(x)
    assert len(refreshes) == made + 1


def test_starts_as_magnitude_pruning():
    layer = pst.PSTLinear(32, 8, config=pst.PSTConfig(sparsity=0.75))
    assert torch.equal(layer.mask, reference.prune_mask(layer.weight.abs(), 192))
    assert layer.sparsity == 0.75
    U, V, A, B, R, C = layer.factors
    assert not any(f.any() for f in (V, B, R, C))
    for normal in (U, A):
        assert normal.std() > 0.5


def test_from_linear_holds_the_same_parameters():
    base = nn.Linear(12, 5).eval()
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    layer = pst.PSTLinear.from_linear(base)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert isinstance(layer, nn.Linear)
    assert not layer.training
    layer(torch.randn(2, 12))
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge(layer, dtype):
    layer.to(dtype)
    for factor in FACTORS:  # PEFT's way: factors stay fp32 over a 16-bit base
        setattr(layer, factor, nn.Parameter(getattr(layer, factor).float()))
    layer.eval()
    x = torch.randn(6, 40).to(dtype)
    before, weight = layer(x), layer.weight.detach().clone()
    mask = layer.mask
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(
        layer(x), before, rtol=1e-3 if dtype != torch.float32 else 1e-6, atol=1e-3 if dtype != torch.float32 else 1e-6
    )
    assert int((layer.weight == 0).sum()) == int((~mask).sum()) == int(layer.weight.numel() * 0.6)
    assert torch.equal(layer.mask, mask)
    for name, tensor in layer.state_dict().items():  # a state dict describes the unmerged layer
        assert torch.equal(tensor, state[name]), name
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


def test_a_merged_layer_does_not_train(layer):
    layer.merge()
    with pytest.raises(RuntimeError, match=r"this layer is merged, so its factors would not train; call unmerge\(\)"):
        layer(torch.randn(2, 40))
    with torch.no_grad():
        layer(torch.randn(2, 40))


def test_safe_merge_refuses_what_is_not_finite(layer):
    with torch.no_grad():
        layer.pst_U[0, 0] = float("inf")
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"the merged weight has \d+ NaN or infinite values of 960"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.weight, weight)


def test_state_dict_round_trip(layer, refreshes):
    step(layer, torch.randn(4, 40))
    state = copy.deepcopy(layer.state_dict())  # between a step and the next forward: the saved mask must fit
    torch.manual_seed(9)
    other = (
        type(layer)(40, 24, config=layer.config)
        if isinstance(layer, nn.Linear)
        else type(layer)(24, 40, config=layer.config)
    )
    other.load_state_dict(state)
    made = len(refreshes)
    x = torch.randn(3, 40)
    assert torch.equal(other(x), layer(x))
    assert len(refreshes) == made  # the mask came with its factors
    assert other.sparsity == layer.sparsity


def test_a_dense_state_dict_loads(layer):
    dense = {"weight": torch.randn_like(layer.weight), "bias": torch.randn(24)}
    result = layer.load_state_dict(dense, strict=False)
    assert not result.unexpected_keys
    assert sorted(result.missing_keys) == sorted([*FACTORS, "pst_mask", "pst_num_pruned"])
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x).double(), reference_output(layer, x), rtol=1e-5, atol=1e-5)


def test_casting_the_whole_layer(layer):
    x = torch.randn(3, 40)
    layer(x)
    layer.to(torch.bfloat16)
    assert layer.pst_mask.dtype == torch.int32
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert int((~layer.mask).sum()) == int(layer.weight.numel() * 0.6)


def test_deepcopy_is_independent(layer):
    x = torch.randn(3, 40)
    layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    step(twin, x)
    assert not torch.equal(twin(x), layer(x))


def test_a_mask_changed_before_backward_is_caught(layer):
    y = layer(torch.randn(2, 40)).sum()
    layer.sparsity = 0.1
    layer.refresh_mask()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode(layer):
    x = torch.randn(2, 40)
    expected = layer(x)
    layer.mark_stale()
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_trains_after_an_evaluation_in_inference_mode():
    """The scratch buffers that the evaluation made are then written by the training step."""
    cpu.release_scratch()
    layer, x = pst.PSTLinear(40, 24), torch.randn(4, 40)
    with torch.inference_mode():
        expected = layer(x)
        layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    step(layer, x)
    torch.testing.assert_close(layer(x).double(), reference_output(layer, x), rtol=1e-5, atol=1e-5)


def test_threads_at_a_first_forward_get_the_same_right_output():
    for seed in range(10):
        torch.manual_seed(seed)
        layer, x = pst.PSTLinear(256, 1024).eval(), torch.randn(8, 256)
        with torch.no_grad(), concurrent.futures.ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda _, layer=layer, x=x: layer(x), range(4)))
            expected = reference_output(layer, x)
        for y in outputs:
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_functional_call_with_fresh_tensors(layer):
    """A tensor at the address of a freed one, with the same version, is another tensor all the same."""
    x, base = torch.randn(4, 40), {name: p.detach().clone() for name, p in layer.named_parameters()}
    for _ in range(20):
        changed = base | {"pst_V": base["pst_V"] + 0.3 * torch.randn_like(base["pst_V"])}
        with torch.no_grad():
            y = torch.func.functional_call(layer, changed, (x,))
        again = copy.deepcopy(layer)
        with torch.no_grad():
            again.pst_V.copy_(changed["pst_V"])
        torch.testing.assert_close(y.double(), reference_output(again, x), rtol=1e-5, atol=1e-5)
        del y, changed


def test_a_replaced_data_is_noticed(layer):
    """As weights of an average are swapped in: `p.data = average`."""
    layer(torch.randn(4, 40))
    layer.pst_V.data = torch.randn_like(layer.pst_V)
    x = torch.randn(4, 40)
    torch.testing.assert_close(layer(x).double(), reference_output(layer, x), rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_refused(layer):
    """They came out as zeros: the backward is written by hand, and not differentiable itself."""
    x = torch.randn(4, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.pow(2).sum().backward()


def test_transforms_of_torch_func_say_that_they_do_not_apply(layer):
    for transformed in (torch.func.grad(lambda x: layer(x).sum()), torch.func.vmap(lambda x: layer(x))):
        with pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
            transformed(torch.randn(4, 40))


@pytest.mark.parametrize("shape", [(40, 24), (300, 200)])
@pytest.mark.parametrize("way", ["auto", "numba", "torch"])
def test_a_mask_made_under_autocast_is_made_in_fp32(shape, way, monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", way)
    layer = toys.perturb(pst.PSTLinear(*shape, config=pst.PSTConfig(sparsity=0.7)))
    again = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, shape[0]))
    assert y.dtype == torch.bfloat16
    assert torch.equal(layer.pst_mask, functional.prune_mask(again.weight, *again.factors, int(again.pst_num_pruned)))
