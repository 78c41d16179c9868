"""Problems for the products with blocks, solved in float64 by the formulas; as a script it solves them in the
interpreter, which needs a process of its own:

    TRITON_INTERPRET=1 python block_problem.py    prints a JSON list of [case, relative errors by output]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import interpreter
import torch
from linear_problem import LEARNED, SCALES, relative_error
from linear_problem import Problem as LinearProblem
from torch import Tensor

from pst_kernels import functional
from pst_kernels.masks.packing import pack_mask
from pst_kernels.operands import Factors, MaskedWeight, Scales

OUTPUTS = ("y", "dx", "dU", "dV", "dA", "dB", "dR", "dC")


class Problem(NamedTuple):
    out: int
    columns: int
    tokens: int
    rank: int
    size: int
    dtype: str = "float32"
    weight: str = ""  # dtype of W where it differs: the case of autocast
    kept: float = 0.4  # fraction of the blocks; the second row and the second column of blocks keep none
    factors: str = "float32"
    transposed: bool = False
    through: bool = True
    learn: bool = False

    def flags(self) -> Tensor:
        """bool (rows of blocks, columns of blocks)."""
        shape = -(-self.out // self.size), -(-self.columns // self.size)
        flags = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < self.kept
        if self.kept < 1:
            flags[1:2] = False
            flags[:, 1:2] = False
        return flags

    def mask(self) -> Tensor:
        """bool (out, columns)."""
        spread = self.flags().repeat_interleave(self.size, 0).repeat_interleave(self.size, 1)
        return spread[: self.out, : self.columns]

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """As of `linear_problem.Problem`; U has the size that it has in training, so that W' is not all U V."""
        same = {name: value for name, value in self._asdict().items() if name in LinearProblem._fields}
        return LinearProblem(**same).tensors(device) | {"kept": self.mask().to(device)}

    def ready(self, device: str = "cpu") -> Callable[[], list[Tensor]]:
        """What computes y and the gradients by the ops of the chosen backend, its tensors made."""
        given = self.tensors(device)
        gy, mask, interval = given.pop("gy"), pack_mask(given.pop("kept")), 1 if self.learn else 2
        gy = gy.t().contiguous().t()  # its transpose is contiguous, it is not

        def run() -> list[Tensor]:
            learned = {name: given[name].detach().requires_grad_() for name in LEARNED}
            x, factors = learned["x"], Factors(*(learned[name] for name in Factors._fields))
            operands = MaskedWeight(given["weight"], factors, mask, Scales(**SCALES))
            options = functional.Options(self.through, block_size=self.size, interval=interval)
            with torch.autocast(device, dtype=gy.dtype, enabled=bool(self.weight)):
                dtype = functional.operand_dtype(x)
                y = functional.masked_linear(x, operands, given["bias"], dtype, options)
            y.backward(gy)
            return [y.detach(), *(tensor.grad for tensor in learned.values())]

        return run

    def solve(self, device: str = "cpu") -> list[Tensor]:
        return self.ready(device)()

    def exact(self, device: str = "cpu") -> list[Tensor]:
        """The same in float64: U and V learn from kept blocks of G, the scores from all of it or not at all."""
        given = {name: tensor.double() for name, tensor in self.tensors(device).items()}
        x, gy, kept, U, V, A, B = (given[name] for name in ("x", "gy", "kept", "U", "V", "A", "B"))
        beta, alpha1, alpha2 = SCALES.values()
        updated = given["weight"] + beta * U @ V
        G = gy.T @ x
        D, Q = G * updated, G * kept * (1.0 + updated.abs() if self.through else 1.0)
        scores = alpha1 * D @ B.T, alpha1 * A.T @ D, alpha2 * D.sum(1), alpha2 * D.sum(0)
        return [
            x @ (kept * updated).T + given["bias"], gy @ (kept * updated), beta * Q @ V.T, beta * U.T @ Q,
            *(value if self.learn else torch.zeros_like(value) for value in scores),
        ]  # fmt: skip

    def errors(self) -> dict[str, float]:
        """RMS error over RMS value for every output; infinite where anything is not finite."""
        return dict(zip(OUTPUTS, map(relative_error, self.solve(), self.exact()), strict=True))

    def wrong(self, errors: dict[str, float], times: float = 1.0) -> dict[str, float]:
        """The errors that are too large. W' and y are rounded to the dtype of x once each; sums are in fp32, of pairs
        of bf16 for 16-bit x."""
        allowed = LinearProblem(1, 1, 1, 1, self.dtype, factors=self.factors).allowed
        return {name: errors[name] for name in OUTPUTS if not errors[name] <= times * allowed(name)}


INTERPRETED = [
    *(
        Problem(out, columns, tokens, rank, size, dtype)
        for dtype, cases in (("float32", ((0, 8), (3, 5), (130, 8))), ("float16", ((3, 8),)), ("bfloat16", ((3, 8),)))
        for out, columns, size in ((96, 384, 16), (96, 384, 32), (130, 200, 64), (7, 33, 128), (1, 1, 16))
        for tokens, rank in cases
    ),
    Problem(96, 100, 130, 8, 32, "float16"), Problem(96, 100, 130, 8, 32, "bfloat16"),
    Problem(130, 300, 3, 8, 128), Problem(96, 384, 5, 8, 16, kept=0.1), Problem(130, 200, 5, 8, 64, kept=1.0),
    Problem(130, 200, 5, 8, 64, kept=0.0), Problem(70, 96, 3, 1, 32), Problem(33, 100, 3, 64, 16),
    Problem(96, 100, 3, 20, 32, transposed=True), Problem(40, 64, 3, 8, 16, through=False, learn=True),
    Problem(40, 100, 5, 8, 32, "bfloat16", weight="float32"), Problem(40, 100, 5, 8, 32, "float16", factors="float16"),
]  # fmt: skip

COMPILED = [  # one of each kind: as shipped, for the emulator and for GPUs
    Problem(64, 96, 20, 8, 32, "bfloat16", kept=0.6),
    Problem(48, 80, 7, 16, 16, "float16", factors="float16"),
    Problem(64, 96, 3, 8, 16, "float32"),
    Problem(70, 200, 3, 5, 64, "bfloat16"),
    Problem(128, 256, 40, 8, 128, "bfloat16", kept=0.7),
    Problem(64, 128, 33, 8, 64, "bfloat16", weight="float32", transposed=True, through=False),
    Problem(32, 96, 3, 64, 32, "bfloat16", kept=0.8),
]

if __name__ == "__main__":
    interpreter.mend()
    json.dump([[problem._asdict(), problem.errors()] for problem in INTERPRETED], sys.stdout)
