"""Layers whose scores weigh |W'|, solved in float64 by reference.py; as a script it solves them in the interpreter,
which needs a process of its own:

    TRITON_INTERPRET=1 python weighed_problem.py    prints a JSON list of [case, relative errors by output]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import interpreter
import torch
from linear_problem import relative_error
from torch import Tensor, nn

import pst_kernels as pst
from pst_kernels import reference

OUTPUTS = ("y", "x", "U", "V", "A", "B", "R", "C", "rows", "columns", "mask", "scores")
SPARSITY = 0.6
SCALES = {"beta": 0.75, "alpha1": 0.5, "alpha2": 2.0}


class Problem(NamedTuple):
    out: int
    columns: int
    tokens: int
    rank: int
    dtype: str = "float32"
    weight: str = ""  # dtype of W where it differs: the case of autocast
    conv1d: bool = False
    through: bool = True
    dead: bool = False  # whether a row and a column have had no gradient so far

    def layer(self) -> nn.Module:
        """With moments that are far from even."""
        settings = {"through_magnitude": self.through, "weight_rank": self.rank, "score_rank": self.rank} | SCALES
        config = pst.PSTConfig(magnitude="fisher", sparsity=SPARSITY, **settings)
        dtype = getattr(torch, self.weight or self.dtype)
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            layer = pst.PSTConv1D.from_linear(Conv1D(self.out, self.columns).to(dtype), config)
        else:
            layer = pst.PSTLinear.from_linear(nn.Linear(self.columns, self.out).to(dtype), config)
        with torch.no_grad():
            for factor in layer.factors:
                factor.normal_(0.0, 0.3)
            layer.pst_moments.copy_(torch.randn(self.out + self.columns).exp())
            if self.dead:
                layer.pst_moments[[0, self.out]] = 0.0
        return layer

    def tensors(self, device: str) -> tuple[nn.Module, Tensor, Tensor]:
        """The layer, x and the gradient of y."""
        torch.manual_seed(0)
        layer, dtype = self.layer().to(device), getattr(torch, self.dtype)
        x = torch.randn(self.tokens, self.columns).to(device, dtype).requires_grad_()
        return layer, x, torch.randn(self.out, self.tokens).T.to(device, dtype)

    def ready(self, device: str = "cpu") -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        """What computes the outputs by the layer, and what does in float64; the layer comes with its mask made."""
        layer, x, gy = self.tensors(device)
        layer.refresh_mask(force=True)

        def run() -> list[Tensor]:
            layer.moments.seen = x.grad = None
            layer.zero_grad()
            with torch.autocast(device, dtype=x.dtype, enabled=bool(self.weight)):
                y = layer(x)
            y.backward(gy)
            sums = layer.moments.seen[:-1].split((self.out, self.columns))
            return [y.detach(), x.grad, *(f.grad for f in layer.factors), *sums, layer.mask, layer.scores()]

        def exact() -> list[Tensor]:
            rows, columns = layer.pst_moments.double().split((self.out, self.columns))
            importance = ((rows / rows.mean())[:, None] * (columns / columns.mean())).sqrt()
            leaves = [t.detach().double().requires_grad_() for t in (x, *layer.factors)]
            weight, mask = layer.oriented_weight.double(), layer.mask
            given = SCALES | {"importance": importance}
            y = reference.pst_linear(
                leaves[0], weight, layer.bias.double(), *leaves[1:], mask, **given, through_magnitude=self.through
            )
            squares = (gy.double().T @ x.detach().double()).square()
            scores = reference.scores(weight, *(leaf.detach() for leaf in leaves[1:]), **given)
            kept = reference.prune_mask(layer.scores(), int(SPARSITY * mask.numel()))
            gradients = torch.autograd.grad(y, leaves, gy.double())
            return [y.detach(), *gradients, squares.sum(1), squares.sum(0), kept, scores]

        return run, exact

    def errors(self) -> dict[str, float]:
        run, exact = self.ready()
        return errors_of(run(), exact())


def errors_of(found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """RMS error over RMS value for every output; of a mask, the share of the weights that it has wrong."""
    errors = dict(zip(OUTPUTS, map(relative_error, found, [t.double() for t in wanted]), strict=True))
    place = OUTPUTS.index("mask")
    return errors | {"mask": float((found[place] != wanted[place]).double().mean())}


PROBLEMS = [
    Problem(7, 33, 5, 3), Problem(129, 65, 3, 8), Problem(40, 64, 130, 8, through=False), Problem(1, 1, 3, 1),
    Problem(33, 70, 4, 16, conv1d=True), Problem(64, 96, 0, 8), Problem(40, 64, 9, 8, "bfloat16"),
    Problem(40, 64, 9, 8, "float16"), Problem(40, 64, 5, 8, "bfloat16", weight="float32"),
    Problem(64, 40, 7, 5, "float16", weight="float32", conv1d=True), Problem(40, 64, 9, 8, dead=True),
    Problem(40, 64, 9, 8, "float16", dead=True),
]  # fmt: skip

if __name__ == "__main__":
    interpreter.mend()
    json.dump([[problem._asdict(), problem.errors()] for problem in PROBLEMS], sys.stdout)
