"""A sparse language model at work on the device: generate with both caches, and a decode step as a CUDA graph."""

from __future__ import annotations

import pytest
import torch
import toys
from places import Place
from torch import nn

from pst_kernels.layers.sparse_linear import SparseLinear

transformers = pytest.importorskip("transformers")

PROMPT, LENGTH, REPLAYS = 5, 16, 4


def pair(gpu: Place) -> tuple[nn.Module, nn.Module]:
    """A Llama whose blocks' weights are zero at 80 %, dense and sparse, in fp32."""
    dense, sparse = toys.seeded("llama"), toys.seeded("llama")
    generator = torch.Generator().manual_seed(1)
    for name, linear in list(dense.named_modules()):
        if type(linear) is nn.Linear and ".layers." in name:
            with torch.no_grad():
                linear.weight.mul_(torch.rand(linear.weight.shape, generator=generator) >= 0.8)
            sparse.set_submodule(name, SparseLinear.from_linear(linear))
    return dense.to(gpu.device), sparse.to(gpu.device)


def prompt(gpu: Place, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, toys.VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).to(gpu.device)


@pytest.mark.parametrize(
    ("cache", "rows", "eager"),
    [
        ("dynamic", 1, True), ("dynamic", 3, True), ("static", 1, True), ("static", 3, True),
        pytest.param("static", 1, False, marks=pytest.mark.large),  # compiled, in a minute perhaps
    ],
    ids=str,
)  # fmt: skip
def test_generate_gives_the_dense_models_tokens(gpu: Place, cache: str, rows: int, eager: bool) -> None:
    """transformers compiles the model for a static cache on CUDA by itself, with CUDA graphs."""
    tokens = prompt(gpu, rows)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(tokens), "cache_implementation": cache, "disable_compile": eager}
    expected, found = (model.generate(tokens, **settings) for model in pair(gpu))
    assert found.shape == (rows, PROMPT + 8)
    assert torch.equal(found, expected)


class Decoding:
    """Greedy decoding of one sequence with a static cache; what a step reads or writes is there before and stays."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor):
        self.model, device = model, tokens.device
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
        self.places, self.position = torch.arange(LENGTH, device=device), torch.tensor([PROMPT], device=device)
        self.found = torch.zeros(LENGTH, dtype=torch.int64, device=device)
        with torch.no_grad():
            logits = model(tokens, past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def step(self) -> None:
        self.found.index_copy_(0, self.position, self.token[0])
        seen = (self.places <= self.position).view(1, 1, 1, LENGTH)
        logits = self.model(
            self.token, attention_mask=seen, position_ids=self.position[None], past_key_values=self.cache,
            use_cache=True,
        ).logits  # fmt: skip
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)


def test_a_captured_decode_step_replays(gpu: Place) -> None:
    dense, sparse = (Decoding(model, prompt(gpu)) for model in pair(gpu))
    replay = gpu.captured(sparse.step)
    for _ in range(REPLAYS):
        with gpu.without_waiting():
            replay()
    while dense.position < sparse.position:
        dense.step()
    assert int(sparse.position) >= PROMPT + REPLAYS
    assert torch.equal(sparse.found, dense.found)
    assert torch.equal(sparse.token, dense.token)
