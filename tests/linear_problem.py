"""Problems for the masked linear, solved in float64 by reference.py; as a script it solves them in the interpreter.

Triton decides when a kernel is defined whether it is interpreted, so that needs a process of its own:
    TRITON_INTERPRET=1 python linear_problem.py    prints a JSON list of [case, relative errors by output]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import interpreter
import torch
from torch import Tensor

from pst_kernels import functional, reference
from pst_kernels.masks.packing import pack_mask
from pst_kernels.operands import Factors, MaskedWeight, Scales

OUTPUTS = ("y", "dx", "dU", "dV", "dA", "dB", "dR", "dC")
LEARNED = ("x", "U", "V", "A", "B", "R", "C")
SCALES = {"beta": 0.7, "alpha1": 1.3, "alpha2": 0.9}


def operands_of(tensors: dict[str, Tensor], kept: Tensor) -> MaskedWeight:
    """M * W' of a problem's tensors, under a bool mask."""
    factors = Factors(*(tensors[name] for name in Factors._fields))
    return MaskedWeight(tensors["weight"], factors, pack_mask(kept), Scales(**SCALES))


def rested_gradients(given: dict[str, Tensor], through: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dU and dV of a step in which the scores rest, in float64."""
    x, gy, W, U, V = (given[name].double() for name in ("x", "gy", "weight", "U", "V"))
    updated = W + SCALES["beta"] * U @ V
    Q = gy.T @ x * given["kept"] * (1.0 + updated.abs() if through else 1.0)
    return gy @ (given["kept"] * updated), SCALES["beta"] * Q @ V.T, SCALES["beta"] * U.T @ Q


class Problem(NamedTuple):
    out: int
    columns: int
    tokens: int
    rank: int
    dtype: str = "float32"
    weight: str = ""  # dtype of W where it differs: the case of autocast
    factors: str = "float32"
    transposed: bool = False
    through: bool = True
    seed: int = 0

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The same numbers on every device."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, dtype: str = self.factors) -> Tensor:
            return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

        out, columns, rank = self.out, self.columns, self.rank
        weight = normal(out, columns, dtype=self.weight or self.dtype) * 0.3
        if self.transposed:
            weight = weight.t().contiguous().t()
        made = {
            "x": normal(self.tokens, columns, dtype=self.dtype), "weight": weight,
            "bias": normal(out, dtype=self.weight or self.dtype),
            "U": normal(out, rank), "V": normal(rank, columns) * 0.1, "A": normal(out, rank),
            "B": normal(rank, columns) * 0.1, "R": normal(out), "C": normal(columns),
            "kept": torch.rand((out, columns), generator=generator) > 0.5,
            "gy": normal(self.tokens, out, dtype=self.dtype),
        }  # fmt: skip
        return {name: tensor.to(device) for name, tensor in made.items()}

    def ready(self, exact: bool, device: str = "cpu") -> Callable[[], list[Tensor]]:
        """What computes y and the gradients, its tensors made: in float64 by reference.py, or by the ops."""
        given = self.tensors(device)
        if exact:
            given = {name: tensor.double() for name, tensor in given.items() if name != "kept"} | {
                "kept": given["kept"]
            }
        gy, kept = given.pop("gy"), given.pop("kept")
        function, mask = (reference.pst_linear, kept) if exact else (functional.pst_linear, pack_mask(kept))

        def run() -> list[Tensor]:
            learned = {name: given[name].detach().requires_grad_() for name in LEARNED}
            with torch.autocast(device, dtype=gy.dtype, enabled=bool(self.weight) and not exact):
                y = function(**given | learned, mask=mask, through_magnitude=self.through, **SCALES)
            y.backward(gy)
            return [y.detach(), *(tensor.grad for tensor in learned.values())]

        return run

    def solve(self, exact: bool, device: str = "cpu") -> list[Tensor]:
        return self.ready(exact, device)()

    def errors(self) -> dict[str, float]:
        """RMS error over RMS value for every output; infinite where anything is not finite."""
        return dict(zip(OUTPUTS, map(relative_error, self.solve(exact=False), self.solve(exact=True)), strict=True))

    def allowed(self, output: str) -> float:
        """W' and y are rounded to the dtype of x once each; sums are fp32, of bf16 pairs for 16-bit x."""
        rounding = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 5e-3}
        if output in ("y", "dx"):
            return rounding[self.dtype]
        return {"float32": 1e-6, "float16": 6e-4, "bfloat16": 5e-3}[self.factors] if self.factors != "float32" else 2e-5


def relative_error(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape or not torch.isfinite(value).all():
        return float("inf")
    if not exact.numel() or not exact.any():
        return float(value.double().abs().sum())
    return float((value.double() - exact).norm() / exact.norm())


INTERPRETED = [
    *(
        Problem(out, columns, tokens, rank, dtype)
        for dtype in ("float32", "float16", "bfloat16")
        for out, columns in ((1, 1), (7, 33), (129, 65), (96, 384))
        for tokens, rank in ((0, 8), (1, 5), (3, 16), (130, 8))
    ),
    Problem(70, 96, 3, 1), Problem(33, 65, 3, 64), Problem(96, 65, 3, 8, transposed=True),
    Problem(40, 64, 3, 8, through=False), Problem(1, 64, 3, 8, through=False),
    Problem(40, 64, 5, 8, "bfloat16", weight="float32"), Problem(40, 64, 5, 8, "float16", factors="float16"),
]  # fmt: skip

COMPILED = [  # one of each kind: as shipped, for the emulator and for GPUs
    Problem(128, 128, 40, 8, "bfloat16"),
    Problem(128, 128, 7, 16, "float16", factors="float16"),
    Problem(64, 96, 3, 8, "float32"),
    Problem(129, 65, 3, 5, "bfloat16"),
    Problem(128, 64, 20, 8, "bfloat16", weight="float32"),
    Problem(64, 128, 17, 8, "bfloat16", transposed=True, through=False),
]

if __name__ == "__main__":
    interpreter.mend()
    json.dump([[problem._asdict(), problem.errors()] for problem in INTERPRETED], sys.stdout)
