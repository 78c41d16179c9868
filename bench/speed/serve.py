"""`python -m bench serve`: what a sparse causal language model costs to keep, to load and to decode with, on a CPU.

The models have the layer lists of published ones and random weights, their blocks' linear layers pruned by magnitude
(whole blocks of 64 x 64 by their norm for block:64). Each contestant is timed in turns with the dense model, prompt
first, then token by token with a cache; ratios are medians over rounds. Load time and memory are those of a fresh
process that reads the folder and touches every weight once. A GPU's are those of `python -m bench gpu`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pst_kernels as pst
from pst_kernels.layers.checks import is_conv1d

from ..console import console
from ..tables.report import Report, measured_on
from .measure import interleaved

GPT2, LLAMA = "GPT-2 medium", "Llama-3.2-1B"
DENSE, SPARSE, BLOCK, INT8 = "dense", "sparse", "block:64", "torch dynamic int8"
SPARSITIES, BATCHES, PROMPT, NEW, WARMUP = (0.0, 0.5, 0.8, 0.9), (1, 8), 128, 64, 4
Clock = Callable[[], float]


@dataclasses.dataclass
class Row:
    model: str
    what: str
    sparsity: float
    batch: int
    tokens_s: float  # decoded, over all sequences
    ratio: float  # to the dense model's, in the same rounds
    prompt_ms: float | None = None
    disk_mb: float | None = None
    load_s: float | None = None
    load_mb: float | None = None  # growth of the largest resident set
    device: str = "cpu"
    own_time: bool = False  # processor time of one thread, not time on the wall


def _cells(row: Row) -> list[str]:
    def number(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    speed = [number(row.tokens_s, 1), f"{row.ratio:.2f}", number(row.prompt_ms)]
    kept = [number(row.disk_mb), number(row.load_s, 2), number(row.load_mb)]
    return [row.model, row.device, row.what, f"{100 * row.sparsity:g} %", str(row.batch), *speed, *kept]


REPORT = Report(
    "serve", Row, "decoding with sparse weights: tokens a second, and what is kept",
    ("model", "device", "weights", "pruned", "batch", "tokens/s", "over dense", "prompt, ms", "disk, MB", "load, s",
     "load, MB"),
    _cells,
    lambda under: (
        f"{measured_on(under)} fp32 on the CPU, a prompt of {PROMPT} tokens and {NEW} new ones; random weights, pruned"
        " by magnitude."
    ),
    left=3,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--layers", type=int, default=None, help="of each model, instead of all; named in the rows")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--new-tokens", type=int, default=NEW)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--own-time", action="store_true", help="one thread, and its processor time alone")
    REPORT.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    if options.own_time:
        torch.set_num_threads(1)

    def rows() -> list[Row]:
        found = []
        for model in options.models:
            for row in _rows_of(model, options):
                found.append(row)
                console().print(" | ".join(_cells(row)), highlight=False)  # each takes a minute
        return found

    REPORT.run(options, rows)
    return 0


def _gpt2(layers: int | None) -> Any:
    import transformers

    kind: Any = transformers
    config = kind.GPT2Config(n_embd=1024, n_layer=layers or 24, n_head=16, bos_token_id=0, eos_token_id=None)
    return kind.GPT2LMHeadModel(config)


def _llama(layers: int | None) -> Any:
    import transformers

    kind: Any = transformers
    return kind.LlamaForCausalLM(
        kind.LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers or 16, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256, max_position_embeddings=2048, tie_word_embeddings=True,
            eos_token_id=None,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[int | None], Any]] = {GPT2: _gpt2, LLAMA: _llama}


def _rows_of(name: str, options: argparse.Namespace) -> Iterator[Row]:
    torch.manual_seed(0)
    dense = MODELS[name](options.layers).eval().requires_grad_(False)
    label = name if options.layers is None else f"{name}, {options.layers} layers"
    clock = time.thread_time if options.own_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in options.sparsities:
            for what in (DENSE, INT8) if sparsity == 0 else (SPARSE, BLOCK):
                kept = _kept(dense, what, sparsity, Path(folder))
                for batch in options.batches:
                    row = Row(label, what, sparsity, batch, 0.0, 1.0, own_time=options.own_time)
                    row = dataclasses.replace(row, **kept.costs)
                    yield _timed(row, dense, kept.model, options, clock)


@dataclasses.dataclass
class _Kept:
    model: Any
    costs: dict[str, Any]  # fields of a row


def _kept(dense: Any, what: str, sparsity: float, folder: Path) -> _Kept:
    """A contestant, by way of its folder."""
    if what == INT8:
        return _Kept(_int8(dense), {})
    pruned = dense
    if what != DENSE:
        pruned = copy.deepcopy(dense)
        for layer in block_linears(pruned).values():
            _prune(layer.weight, sparsity, 64 if what == BLOCK else 1)
    place = folder / what.replace(":", "-")
    pst.save_sparse(pruned, place, format=what)
    size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    costs: dict[str, Any] = {"disk_mb": size / 1e6} | _loading(place)
    if what == DENSE:
        return _Kept(dense, costs)
    model = pst.load_sparse(place).requires_grad_(False)
    _check(pruned, model)
    return _Kept(model, costs)


def block_linears(model: nn.Module) -> dict[str, Any]:
    """The linear layers of a model's blocks."""
    blocks = (name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    inside = tuple(f"{name}." for name in blocks)
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear or is_conv1d(m)}
    return {name: module for name, module in linears.items() if name.startswith(inside)}


def _prune(weight: Tensor, sparsity: float, size: int) -> None:
    """Set the smallest blocks of size x size to zero, of what lies in whole blocks."""
    rows, columns = (n // size for n in weight.shape)
    blocks = weight[: rows * size, : columns * size].view(rows, size, columns, size)
    norms = blocks.square().sum((1, 3)) if size > 1 else weight.abs()
    least = norms.flatten().kthvalue(max(1, int(sparsity * norms.numel()))).values
    blocks.mul_((norms > least).view(rows, 1, columns, 1))


def _int8(dense: Any) -> Any:
    """With the blocks' linear layers in 8 bits by torch's dynamic quantization, which takes no Conv1D."""
    model = copy.deepcopy(dense)
    for name, layer in block_linears(model).items():
        if is_conv1d(layer):
            plain = nn.Linear(layer.weight.shape[0], layer.weight.shape[1], device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.weight.T.contiguous()), layer.bias
            model.set_submodule(name, plain)
    names = dict.fromkeys(block_linears(model), torch.ao.quantization.default_dynamic_qconfig)
    return torch.ao.quantization.quantize_dynamic(model, names, inplace=True).requires_grad_(False)


def _check(pruned: Any, model: Any) -> None:
    """Raise ValueError for a model that is not the pruned one: nothing is timed for wrong products."""
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected, found = pruned(tokens).logits, model(tokens).logits
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise ValueError(f"the loaded model's logits are off by {error:g} of the largest: nothing is timed")


LOADING = """
import json, re, sys, time
import torch, transformers
import pst_kernels as pst, pst_kernels.hf

torch.set_num_threads(1)
kind = getattr(transformers, transformers.AutoConfig.from_pretrained(sys.argv[1]).architectures[0])

def largest():  # what getrusage says begins with the parent's
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) * 1024 / 1e6

before = largest() if sys.platform == "linux" else None
start = time.perf_counter()
model = kind.from_pretrained(sys.argv[1])
with torch.no_grad():
    for tensor in model.state_dict().values():
        tensor.sum()  # a mapped file is read when it is touched
seconds = time.perf_counter() - start
print(json.dumps({"load_s": seconds, "load_mb": None if before is None else largest() - before}))
"""


def _loading(place: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", LOADING, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"loading {place} in a fresh process failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _timed(row: Row, dense: Any, model: Any, options: argparse.Namespace, clock: Clock) -> Row:
    """The row with its times, in turns with the dense model."""
    vocabulary = dense.config.vocab_size
    prompt = torch.randint(vocabulary, (row.batch, options.prompt), generator=torch.Generator().manual_seed(0))
    prompts: list[float] = []

    def run(contestant: Any, into: list[float], new_tokens: int = options.new_tokens) -> float:
        first, cache, seconds = _prefill(contestant, prompt, clock)
        into.append(seconds)
        return _decode(contestant, first, cache, new_tokens, clock)

    for contestant in (dense, model):
        run(contestant, [], WARMUP)  # what is made once; a whole run would take as long as what is timed
    timers = {row.what: lambda: run(model, prompts), "reference": lambda: run(dense, [])}
    limits = {"min_rounds": options.rounds, "max_rounds": options.rounds, "warmup": 0}
    timings = interleaved(timers, 3600, reference="reference", **limits)
    ours, theirs = timings[row.what], timings["reference"]
    row.tokens_s = row.batch * options.new_tokens / ours.quantiles.median
    row.ratio = 1.0 / ours.ratio_to(theirs).median
    row.prompt_ms = 1e3 * sorted(prompts)[len(prompts) // 2]
    return row


@torch.no_grad()
def _prefill(model: Any, prompt: Tensor, clock: Clock) -> tuple[Tensor, Any, float]:
    start = clock()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values, clock() - start


@torch.no_grad()
def _decode(model: Any, token: Tensor, cache: Any, steps: int, clock: Clock) -> float:
    start = clock()
    for _ in range(steps):
        out = model(token, past_key_values=cache, use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    return clock() - start
