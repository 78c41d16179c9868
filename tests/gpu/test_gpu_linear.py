"""The masked linear and its gradients against reference.py in float64 on the same device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_problem import (
    COMPILED,
    INTERPRETED,
    OUTPUTS,
    SCALES,
    Problem,
    operands_of,
    relative_error,
    rested_gradients,
)
from places import TORCH, Place, same_bits
from torch import Tensor

from pst_kernels import functional, ops
from pst_kernels.masks.packing import pack_mask

TINY = Problem(33, 40, 3, 3, "bfloat16")
LARGE = [
    Problem(1024, 1024, 500, 8, "bfloat16"),
    Problem(1024, 1024, 500, 8, "bfloat16", transposed=True),
    Problem(1024, 1024, 500, 8, "float16", factors="float16"),
    Problem(1024, 1024, 500, 8, "bfloat16", weight="float32"),
    Problem(1000, 1003, 507, 8, "bfloat16"),
    Problem(4096, 1024, 2048, 8, "bfloat16"),  # M * W' first, then the library's product
    Problem(768, 3072, 1000, 16, "float16"),
    Problem(2048, 1024, 300, 64, "bfloat16"),
    Problem(3072, 768, 1024, 8, "float32"),
    Problem(1024, 1024, 8192, 8, "bfloat16"),  # G by the library
]
MANY_TOKENS = 512  # from here on the library makes G, rounded to the dtype of x


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(TINY, marks=pytest.mark.emulated), *COMPILED, *INTERPRETED,
        *(pytest.param(problem, marks=pytest.mark.large) for problem in LARGE),
    ],
    ids=str,
)  # fmt: skip
def test_equals_float64(gpu: Place, problem: Problem) -> None:
    found = gpu.twice(problem.ready(exact=False, device=gpu.device))
    errors = dict(zip(OUTPUTS, map(relative_error, found, problem.solve(exact=True, device=gpu.device)), strict=True))
    assert {name: error for name, error in errors.items() if not error <= allowed(gpu, problem, name)} == {}


def allowed(gpu: Place, problem: Problem, output: str) -> float:
    g_is_rounded = gpu.kind == TORCH or problem.tokens >= MANY_TOKENS
    rounding = Problem.allowed(problem, "y") if g_is_rounded else 0.0
    longer_sums = 4.0 if problem in LARGE else 1.0
    return longer_sums * max(rounding, problem.allowed(output))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize(
    "shape", [(129, 65, 20, 8), (128, 128, 20, 16), pytest.param((512, 1024, 600, 8), marks=pytest.mark.large)], ids=str
)
def test_gradients_while_the_scores_rest(
    gpu: Place, dtype: str, through: bool, shape: tuple[int, int, int, int]
) -> None:
    problem = Problem(*shape, dtype)
    given = problem.tensors(gpu.device)
    operands = operands_of(given, given["kept"]).flat

    def run() -> list[Tensor]:
        return list(ops.rested_backward(given["gy"], given["x"], *operands, through, True, True))

    for name, value, exact in zip(("dx", "dU", "dV"), gpu.twice(run), rested_gradients(given, through), strict=True):
        assert relative_error(value, exact) <= allowed(gpu, problem, name), name


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "stride 0": lambda gy: gy[:1, :1].expand(gy.shape),
    "transposed": lambda gy: gy.t().contiguous().t(),
    "with gaps": lambda gy: torch.cat([gy, gy], 1)[:, : gy.shape[1]],
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("strides", GRADIENTS)
def test_gradients_of_any_strides(gpu: Place, strides: str, dtype: str) -> None:
    given = Problem(70, 96, 5, 8, dtype).tensors(gpu.device)
    gy, mask = GRADIENTS[strides](given.pop("gy")), pack_mask(given.pop("kept"))
    found = gpu.twice(lambda: _step(given, mask, gy))
    assert same_bits(found, _step(given, mask, gy.clone(memory_format=torch.contiguous_format)))


def _step(given: dict[str, Tensor], mask: Tensor, gy: Tensor) -> list[Tensor]:
    learned = {name: given[name].detach().requires_grad_() for name in ("x", "U", "V", "A", "B", "R", "C")}
    y = functional.pst_linear(**given | learned, mask=mask, **SCALES)
    y.backward(gy.view(y.shape) if gy.is_contiguous() else gy)
    return [y.detach(), *(tensor.grad for tensor in learned.values())]


@pytest.mark.parametrize("strides", ["transposed", "every second", "three dimensions", "one row many times"])
def test_inputs_of_any_strides(gpu: Place, strides: str) -> None:
    given = Problem(70, 96, 6, 8, "bfloat16").tensors(gpu.device)
    gy, mask, x = given.pop("gy"), pack_mask(given.pop("kept")), given.pop("x")
    if strides == "transposed":
        x = x.t().contiguous().t()
    elif strides == "every second":
        x = torch.stack([x, x], 1)[:, 0]
    elif strides == "one row many times":
        x = x[:1].expand(x.shape)
    else:
        x = x.view(2, 3, 96)
    found = gpu.twice(lambda: _step({**given, "x": x}, mask, gy))
    plain = _step({**given, "x": x.reshape(6, 96).contiguous()}, mask, gy)
    assert found[0].shape == (*x.shape[:-1], 70)
    assert same_bits([tensor.view(plain[i].shape) for i, tensor in enumerate(found)], plain)


@pytest.mark.parametrize("needed", ["x", "U", "C"])
def test_only_what_is_needed(gpu: Place, needed: str) -> None:
    """The same bits where only one gradient is asked for, and no other."""
    given = Problem(70, 96, 5, 8, "bfloat16").tensors(gpu.device)
    gy, mask = given.pop("gy"), pack_mask(given.pop("kept"))
    names = ("y", "x", "U", "V", "A", "B", "R", "C")
    every = dict(zip(names, _step(given, mask, gy), strict=True))

    def alone() -> list[Tensor]:
        one = given[needed].detach().requires_grad_()
        functional.pst_linear(**given | {needed: one}, mask=mask, **SCALES).backward(gy)
        return [one.grad]

    assert same_bits(gpu.twice(alone), [every[needed]])
