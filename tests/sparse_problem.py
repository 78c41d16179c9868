"""Problems for the products with packed weights, solved in float64 by a dense weight; as a script it solves them in the
interpreter, which needs a process of its own:

    TRITON_INTERPRET=1 python sparse_problem.py    prints a JSON list of [case, relative errors by output]
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import interpreter
import torch
from linear_problem import relative_error
from torch import Tensor

from pst_kernels import SparseLinear, ops

OUTPUTS = ("y", "dx", "values")
ALLOWED = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


class Problem(NamedTuple):
    out: int
    columns: int
    tokens: int
    dtype: str = "bfloat16"
    kept: float = 0.3  # fraction of the weights; every third row from the second on, and the last, keep none
    weight: str = ""  # dtype of the values where it differs

    def tensors(self) -> tuple[Tensor, Tensor, SparseLinear]:
        """x, gy and the layer; the bias is fp32."""
        made = torch.Generator().manual_seed(1)
        dtype = getattr(torch, self.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made)

        kept = torch.rand((self.out, self.columns), generator=made) < self.kept
        if 0 < self.kept < 1:
            kept[1::3] = False
            kept[-1:] = False
        weight = (normal(self.out, self.columns) * kept).to(getattr(torch, self.weight or self.dtype))
        layer = SparseLinear.from_dense(weight, torch.nn.Parameter(normal(self.out)), kept)
        return normal(self.tokens, self.columns).to(dtype), normal(self.tokens, self.out).to(dtype), layer

    def solve(self) -> list[Tensor]:
        """y, dx and the gradient of the values, by the ops of the chosen backend."""
        x, gy, layer = self.tensors()
        lists = layer.weight.detach(), layer.offsets, layer.pointers
        y = ops.sparse_forward(x, *lists, layer.bias.detach(), self.out)
        return [y, *ops.sparse_backward(gy, x, *lists, self.columns, True, True)]

    def exact(self) -> list[Tensor]:
        x, gy, layer = self.tensors()
        weight, x, gy = layer.to_dense().double(), x.double(), gy.double()
        return [x @ weight.T + layer.bias.detach().double(), gy @ weight, (gy.T @ x)[layer.lists.places()]]

    def errors(self) -> dict[str, float]:
        """Norm of the error over norm of the value for every output; infinite where anything is not finite."""
        return dict(zip(OUTPUTS, map(relative_error, self.solve(), self.exact()), strict=True))

    def wrong(self, errors: dict[str, float]) -> dict[str, float]:
        """The errors that are too large."""
        return {name: error for name, error in errors.items() if not error <= ALLOWED[self.dtype]}


INTERPRETED = [
    *(
        Problem(out, columns, tokens, dtype)
        for dtype in ("float32", "float16", "bfloat16")
        for out, columns, tokens in ((7, 33, 1), (70, 200, 8), (33, 300, 33), (1, 1, 64))
    ),
    Problem(70, 200, 64, kept=0.0), Problem(40, 128, 3, kept=1.0), Problem(37, 150, 65), Problem(37, 150, 0),
    Problem(37, 150, 8, weight="float32"),
    Problem(70, 1300, 1, kept=0.1), Problem(70, 1300, 3, "float16", kept=0.1), Problem(70, 1300, 8, "float32", 0.1),
    Problem(70, 1300, 2, "bfloat16", kept=0.3, weight="float32"), Problem(40, 128, 1, kept=1.0),
]  # fmt: skip

COMPILED = [  # as shipped, for the emulator and for GPUs
    Problem(37, 300, 1), Problem(35, 150, 8, "float32"), Problem(37, 150, 33), Problem(33, 130, 64, "float16"),
    Problem(33, 130, 8, kept=0.0), Problem(37, 150, 65),
    Problem(35, 1100, 3, kept=0.1), Problem(33, 130, 8, kept=0.1), Problem(33, 300, 2, "float32", kept=0.4),
]  # fmt: skip
FOR_GPUS = [
    Problem(7, 33, 64, "float32"), Problem(40, 257, 8, kept=1.0, weight="float32"), Problem(1000, 3000, 8, kept=0.1),
    Problem(1000, 3000, 64, kept=0.5), Problem(1000, 3000, 200, "float32"),
    Problem(1000, 3000, 1, kept=0.1), Problem(1000, 3000, 4, kept=0.2),
]  # fmt: skip

if __name__ == "__main__":
    interpreter.mend()
    json.dump([[problem._asdict(), problem.errors()] for problem in INTERPRETED], sys.stdout)
