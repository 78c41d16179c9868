"""A whole training step as a CUDA graph: replayed, it leaves the same bits as the step does eagerly."""

from __future__ import annotations

import copy

import pytest
import torch
from places import CUDA, WARM_UP, Place, same_bits
from torch import Tensor, nn

import pst_kernels as pst
from pst_kernels.model import pst_layers

REPLAYS = 3
SETTINGS = {
    "unstructured": {"sparsity": 0.7},
    "unstructured, M * W' made for each product": {"sparsity": 0.7, "masked_weight": "remake"},
    "2:4": {"pattern": "2:4", "sparsity": 0.5},
    "scores at rest": {"sparsity": 0.7, "score_interval": 1000},
    "mask fixed": {"sparsity": 0.7, "freeze": 0.2},
    "blocks at rest": {"pattern": "block:16", "sparsity": 0.5, "mask_interval": 1000},
    "blocks": {"pattern": "block:16", "sparsity": 0.5, "mask_interval": 1},
}


class Training:
    """Two PST layers and AdamW; every tensor that a step reads or writes is there before and stays."""

    def __init__(self, gpu: Place, dtype: torch.dtype, tokens: int, settings: dict):
        torch.manual_seed(0)
        layers = [nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 4)]
        config = pst.PSTConfig(**settings, weight_rank=4, score_rank=4)
        self.model = pst.replace_linear(nn.Sequential(*layers).to(gpu.device, dtype), config)
        if config.freeze:
            for _, layer in pst_layers(self.model):
                layer.freeze_mask()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        on_cuda = gpu.kind == CUDA
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, capturable=on_cuda, foreach=on_cuda)
        self.x = torch.randn(tokens, 48).to(gpu.device, dtype)
        self.loss = torch.zeros((), device=gpu.device)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.x).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def state(self) -> list[Tensor]:
        masks = [layer.pst_mask for _, layer in pst_layers(self.model)]
        return [t.detach().clone() for t in (self.loss, *self.model.parameters(), *masks)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [
        (torch.bfloat16, 24), (torch.float32, 24),
        pytest.param(torch.bfloat16, 2048, marks=pytest.mark.large),  # by the library
    ],
    ids=str,
)  # fmt: skip
def test_a_replayed_step_equals_an_eager_one(gpu: Place, dtype: torch.dtype, tokens: int, settings: str) -> None:
    eager, graphed = (Training(gpu, dtype, tokens, copy.deepcopy(SETTINGS[settings])) for _ in range(2))
    assert same_bits(eager.state(), graphed.state())
    replay = gpu.captured(graphed.step)
    for _ in range(WARM_UP):
        eager.step()
    assert same_bits(eager.state(), graphed.state())  # capturing runs nothing
    for _ in range(REPLAYS):
        with gpu.without_waiting():
            eager.step()
            replay()
        assert same_bits(eager.state(), graphed.state())


def test_scores_learn_on_every_other_step_of_a_graph_of_two(gpu: Place) -> None:
    """As many steps to a graph as there are from one gradient of the scores to the next."""
    eager, graphed = (Training(gpu, torch.float32, 24, {"sparsity": 0.7, "score_interval": 2}) for _ in range(2))
    before = [layer.pst_A.detach().clone() for _, layer in pst_layers(graphed.model)]

    def two(training: Training) -> None:
        training.step()
        training.step()

    replay = gpu.captured(lambda: two(graphed))
    for _ in range(WARM_UP):
        two(eager)
    for _ in range(REPLAYS):
        with gpu.without_waiting():
            two(eager)
            replay()
        assert same_bits(eager.state(), graphed.state())
    for A, (_, layer) in zip(before, pst_layers(graphed.model), strict=True):
        assert not torch.equal(A, layer.pst_A)


def test_an_unstructured_mask_moves_in_the_graph(gpu: Place) -> None:
    """The refresh is part of the captured step: the mask follows the factors in every replay."""
    training = Training(gpu, torch.float32, 5, {"sparsity": 0.7})
    replay = gpu.captured(training.step)
    before = [layer.pst_mask.clone() for _, layer in pst_layers(training.model)]
    with torch.no_grad():
        for _, layer in pst_layers(training.model):
            layer.pst_C.copy_(10.0 * (torch.arange(layer.pst_C.numel(), device=gpu.device) % 7))
    replay()
    for mask, (_, layer) in zip(before, pst_layers(training.model), strict=True):
        assert not torch.equal(mask, layer.pst_mask)


@pytest.mark.parametrize("written", ["by an eager step", "by a checkpoint", "by hand"])
def test_a_graph_follows_a_mask_of_blocks_that_was_written_after_it(gpu: Place, written: str) -> None:
    """It holds no launch that lists the kept blocks, and reads the lists of the mask as it is."""
    settings = {"pattern": "block:16", "sparsity": 0.5, "mask_interval": 1000}
    training = Training(gpu, torch.float32, 24, settings)
    layers = [layer for _, layer in pst_layers(training.model)]

    def gradients() -> list[Tensor]:
        training.optimizer.zero_grad(set_to_none=True)
        y = training.model(training.x)
        y.float().square().sum().backward()
        training.loss.copy_(y.detach().float().square().sum())
        return [layer.pst_V.grad for layer in layers]

    made = gradients()
    replay = gpu.captured(lambda: made.__setitem__(slice(None), gradients()))
    replay()
    before, masks = training.loss.clone(), [layer.pst_mask.clone() for layer in layers]
    if written == "by an eager step":
        with torch.no_grad():
            for layer in layers:
                layer.pst_C.copy_(10.0 * (torch.arange(layer.pst_C.numel(), device=gpu.device) // 16 % 3))
        for layer in layers:
            layer.refresh_mask(force=True)
    else:
        rolled = {
            name: mask.roll(16, 0) for name, mask in training.model.state_dict().items() if name.endswith("pst_mask")
        }
        rolled = {name: mask for name, mask in rolled.items() if len(mask) % 16 == 0}
        if written == "by a checkpoint":
            training.model.load_state_dict(training.model.state_dict() | rolled)
        else:
            layers[0].pst_mask.copy_(rolled["0.pst_mask"])
            training.model(training.x)  # a graph looks at nothing
    replay()
    found = [training.loss.clone(), *[gradient.clone() for gradient in made]]
    assert not torch.equal(layers[0].pst_mask, masks[0])
    assert not torch.equal(found[0], before)
    eager = gradients()
    assert same_bits(found, [training.loss, *eager])


def test_an_eager_forward_follows_a_mask_of_blocks_that_a_replay_has_written(gpu: Place) -> None:
    """A replay moves no version, by which lists of a mask are told from older ones."""
    training = Training(gpu, torch.float32, 24, {"pattern": "block:16", "sparsity": 0.5, "mask_interval": 1})
    layer = next(layer for _, layer in pst_layers(training.model))
    replay, x = gpu.captured(training.step), torch.randn(7, 48, device=gpu.device)
    for turn in range(3):
        with torch.no_grad():
            layer(x)  # lists that are made here belong to the mask before the next replay
        mask = layer.pst_mask.clone()
        layer.pst_C.data.copy_(10.0 * ((torch.arange(48, device=gpu.device) // 16 + turn) % 3))  # leaves no trace
        replay()
        with torch.no_grad():
            y, expected = layer(x), nn.functional.linear(x, layer.masked_weight(), layer.bias)
        assert not torch.equal(mask, layer.pst_mask)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
