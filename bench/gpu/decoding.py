"""Part `decoding`: tokens a second of a causal model with sparse weights, a decode step being one CUDA graph.

The models are those of `python -m bench serve`, random weights in bf16, their blocks pruned by magnitude; a static
cache. Dense and sparse take turns. The profiler tells what the kernels of a step take.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from pst_kernels.layers.sparse_linear import SparseLinear

from ..speed import measure, serve
from . import exits
from .captured import kernels_of
from .conditions import write_rows
from .graphs import captured

BATCHES, SPARSITIES, LENGTH = (1, 8), (0.5, 0.8, 0.9), 256


@dataclasses.dataclass
class Row:
    """Of one contestant; a step gives each sequence of the batch a token."""

    model: str
    what: str
    sparsity: float
    batch: int
    step_us: float
    ratio: float  # tokens a second over dense's, median over rounds
    weights_mb: float  # of the blocks' linear layers
    kernels: dict[str, tuple[float, float]]


class Decoding:
    """Greedy decoding with a static cache; what a step reads or writes is there before and stays."""

    def __init__(self, model: Any, batch: int):
        import transformers

        kind: Any = transformers
        self.model = model
        self.cache = kind.StaticCache(config=model.config, max_cache_len=LENGTH)
        self.places = torch.arange(LENGTH, device="cuda")
        self.position = torch.tensor([LENGTH // 2], device="cuda")
        self.token = torch.arange(batch, device="cuda")[:, None] + 5

    @torch.no_grad()
    def step(self) -> None:
        """At the same place each time: what is timed does not depend on it."""
        seen = (self.places <= self.position).view(1, 1, 1, LENGTH)
        logits = self.model(
            self.token, attention_mask=seen, position_ids=self.position[None], past_key_values=self.cache,
            use_cache=True,
        ).logits  # fmt: skip
        self.token.copy_(logits[:, -1:].argmax(-1))


def sparse_of(dense: Any, sparsity: float) -> Any:
    """The model with its blocks' linear layers pruned and packed. By the quantile of a sample: exactly, as `serve` does
    it, the models would take most of this part's minute.
    """
    model = copy.deepcopy(dense)
    for name, linear in serve.block_linears(model).items():
        weight = linear.weight
        sample = weight.flatten()[:: max(1, weight.numel() // 10**6)].abs().float()
        weight.mul_(weight.abs() > sample.quantile(sparsity))
        model.set_submodule(name, SparseLinear.from_linear(linear))
    return model


def rows_of(name: str, seconds: float) -> list[Row]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        dense = serve.MODELS[name](None)
    dense = dense.to(torch.bfloat16).eval().requires_grad_(False)
    in_blocks = sum(layer.weight.nbytes for layer in serve.block_linears(dense).values())
    models = {("dense", 0.0): dense} | {("sparse", sparsity): sparse_of(dense, sparsity) for sparsity in SPARSITIES}
    found = []
    for batch in BATCHES:
        replays = {key: captured(Decoding(model, batch).step) for key, model in models.items()}
        timers = {f"{what} {sparsity}": measure.timer(run, None, "cuda") for (what, sparsity), run in replays.items()}
        timings = measure.interleaved(timers, seconds, reference="dense 0.0", min_rounds=5, max_rounds=40)
        for (what, sparsity), replay in replays.items():
            timing = timings[f"{what} {sparsity}"]
            ratio = 1.0 / timing.ratio_to(timings["dense 0.0"]).median
            nbytes = in_blocks if what == "dense" else sum(
                layer.weight.nbytes + layer.offsets.nbytes + layer.pointers.nbytes
                for layer in models[what, sparsity].modules() if isinstance(layer, SparseLinear)
            )  # fmt: skip
            found.append(Row(
                name, what, sparsity, batch, round(1e6 * timing.quantiles.median, 1), round(ratio, 3),
                round(nbytes / 1e6, 1), kernels_of(replay),
            ))  # fmt: skip
            print(f"{name}, {what} {sparsity}, batch {batch}: {found[-1].step_us} us, {ratio:.2f} times dense")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a batch")
    options = parser.parse_args()
    rows: list[Row] = []
    failed = False
    for name in serve.MODELS:
        try:
            rows += rows_of(name, options.seconds)
        except Exception as error:
            failed = True
            print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
        write_rows(options.output, rows)
        torch.cuda.empty_cache()
    print(f"{len(rows)} rows of decoding")
    return exits.FAILED if failed or not rows else exits.PASSED


if __name__ == "__main__":
    raise SystemExit(main())
