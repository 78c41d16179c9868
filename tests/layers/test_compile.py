"""torch.compile of whole models: one graph over a sparsity schedule, a changing batch, and activation checkpointing."""

import pytest
import torch
import toys
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import pst_kernels as pst
from pst_kernels import ops


class Block(nn.Module):
    def __init__(self, recompute=None):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.recompute = recompute

    def inner(self, x):
        return x + self.down(torch.relu(self.up(x)))

    def forward(self, x):
        if self.recompute is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.recompute == "reentrant")


def build(recompute=None):
    torch.manual_seed(0)
    model = nn.Sequential(Block(recompute), Block(recompute), nn.Linear(32, 4))
    return pst.replace_linear(model, pst.PSTConfig(sparsity=0.8, weight_rank=2, score_rank=2))


def train(model, forward, steps, dtype=None):
    schedule = pst.SparsitySchedule(model, steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    outputs = []
    torch.manual_seed(1)
    for step in range(steps):
        x = torch.randn(
            3 + step, 32, requires_grad=True
        )  # reentrant checkpointing wants an input that needs a gradient
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            y = forward(x)
        outputs.append(y.detach())
        y.float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return outputs


def assert_same_training(compiled, eager, forward, **kwargs):
    for ours, expected in zip(train(compiled, forward, 12, **kwargs), train(eager, eager, 12, **kwargs), strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for (name, ours), expected in zip(compiled.state_dict().items(), eager.state_dict().values(), strict=True):
        if name.endswith("pst_mask"):
            assert torch.equal(ours, expected), name
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert [layer.sparsity for layer in pst.get_layer_status(compiled)] == [int(2048 * 0.8) / 2048] * 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_over_a_schedule_and_changing_batches(backend):
    torch.compiler.reset()
    counters.clear()
    compiled, eager = build(), build()
    assert_same_training(compiled, eager, torch.compile(compiled, fullgraph=True, backend=backend, dynamic=True))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_autocast_gives_the_same_dtypes_compiled():
    torch.compiler.reset()
    compiled, eager = build(), build()
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same_training(compiled, eager, forward, dtype=torch.bfloat16)


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_activation_checkpointing_in_eager_mode(recompute):
    checkpointed, plain = build(recompute), build()
    assert_same_training(checkpointed, plain, checkpointed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "dynamic"), [("reentrant", True), ("non-reentrant", True), ("non-reentrant", None)]
)
def test_activation_checkpointing_compiled(recompute, dynamic):
    torch.compiler.reset()
    counters.clear()
    compiled, eager = build(recompute), build()
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same_training(compiled, eager, forward)
    assert not counters["graph_break"]


ONE_LAYER = {"bert": "num_hidden_layers", "gpt2": "n_layer", "llama": "num_hidden_layers", "t5": "num_layers"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_LAYER)
def test_whole_transformers_compile_to_one_graph_and_train_as_in_eager_mode(family):
    torch.compiler.reset()
    counters.clear()

    def build():
        model = toys.seeded(family, **{ONE_LAYER[family]: 1})
        return toys.perturb(pst.replace_linear(model, pst.PSTConfig(sparsity=0.7))).train()

    def trained(model, forward):
        schedule = pst.SparsitySchedule(model, 2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(2):
            batch = toys.inputs(family, seed=step)
            if family != "t5":  # transformers' own losses say things on the way, which breaks a graph
                del batch["labels"]
            forward(**batch).logits.pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return toys.snapshot(model)

    compiled, eager = build(), build()
    found = trained(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for name, expected in trained(eager, eager).items():
        if name.endswith(("pst_mask", "pst_num_pruned")):
            assert torch.equal(found[name], expected), name
        else:
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=name)


class OnTheHost(TorchDispatchMode):
    """Notes every tensor of a CPU that an op is given or returns."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.found.append(str(func))
        return out


@pytest.mark.parametrize("pattern", ["block:16", "unstructured", "2:4"])
def test_a_graph_of_a_gpu_layer_has_no_tensor_of_the_host(pattern, monkeypatch):
    """As a compiler traces it: with fake tensors, here of a GPU that need not be there, and has no random numbers."""
    monkeypatch.setattr(pst.PSTLinear, "reset_factors", lambda self: None)
    monkeypatch.setattr(pst.PSTLinear, "reset_parameters", lambda self: None)
    with FakeTensorMode():
        layer = pst.PSTLinear(64, 32, device="cuda", config=pst.PSTConfig(pattern=pattern))
        x = torch.empty(4, 64, device="cuda", requires_grad=True)
        with OnTheHost() as mode, torch.no_grad():  # the engine of autograd would ask the GPU
            layer(x)
    assert mode.found == []
    given = [str(argument.type) for argument in ops.block_backward._schema.arguments]
    assert given.count("Tensor") == 2 + len(layer.factors) + 2  # gy and x, W and the mask
