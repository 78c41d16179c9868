"""Every bad input, with its exception and what the message must say: the argument, its value, what is allowed or what
to do. Checkpoints that do not fit have their own table in test_checkpoint_errors.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst
from pst_kernels import env, functional
from pst_kernels.files import read_json


class Case(NamedTuple):
    call: Callable[[], object]
    error: type[Exception]
    says: tuple[str, ...]  # regular expressions, each of which the message must hold


def config(**settings) -> Callable[[], object]:
    return lambda: pst.PSTConfig(**settings)


FRACTION = r"\[0, 1\)"
CONFIG = {
    **{
        f"sparsity {value}": Case(config(sparsity=value), ValueError, (r"^sparsity must", FRACTION, f"got {value}"))
        for value in (1.0, -0.1, 1, math.nan, math.inf, -math.inf)
    },
    **{
        f"sparsity {value!r}": Case(config(sparsity=value), TypeError, (r"^sparsity must", FRACTION, f"got {value!r}"))
        for value in (True, "0.9", None, {})
    },
    "initial above final": Case(
        config(initial_sparsity=0.5, sparsity=0.4), ValueError,
        (r"^initial_sparsity=0\.5", r"sparsity=0\.4", "start at or below"),
    ),
    "initial NaN": Case(config(initial_sparsity=math.nan), ValueError, ("^initial_sparsity must", FRACTION, "got nan")),
    **{
        f"{name} {value}": Case(config(**{name: value}), error, (rf"^{name} must", "at least 1", f"got {value!r}"))
        for name in ("weight_rank", "score_rank", "mask_interval")
        for value, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("8", TypeError))
    },
    **{
        f"{name} {value}": Case(config(**{name: value}), error, (rf"^{name} must", "finite number", f"got {value!r}"))
        for name in ("beta", "alpha1", "alpha2")
        for value, error in ((math.nan, ValueError), (math.inf, ValueError), ("1", TypeError), (False, TypeError))
    },
    **{
        f"{name} {value}": Case(config(**{name: value}), error, (rf"^{name} must", r"in \[0, 1\]", f"got {value!r}"))
        for name in ("warmup", "cooldown")
        for value, error in ((-0.1, ValueError), (1.5, ValueError), (math.nan, ValueError), ("0.1", TypeError))
    },
    "warmup and cooldown": Case(
        config(warmup=0.6, cooldown=0.5), ValueError, (r"warmup=0\.6", r"cooldown=0\.5", "more than 1; lower one"),
    ),
    "through_magnitude": Case(config(through_magnitude=1), TypeError, ("^through_magnitude", "True or False", "got 1")),
    "train_bias": Case(config(train_bias="no"), TypeError, ("^train_bias", "True or False", "got 'no'")),
    "pattern": Case(config(pattern="4:2"), ValueError, ("pattern='4:2'", "use one of 'unstructured'")),
    "adapter_dtype name": Case(
        config(adapter_dtype="int8"), ValueError,
        ("adapter_dtype='int8'", "use one of float32"),
    ),
    "adapter_dtype": Case(config(adapter_dtype=torch.int8), ValueError, ("adapter_dtype=torch.int8", "bfloat16")),
    "adapter_dtype None": Case(config(adapter_dtype=None), ValueError, ("adapter_dtype=None", "use one of float32")),
    "regex": Case(config(target_modules="(query"), ValueError, (r"target_modules='\(query'", "pass a list")),
    "targets": Case(config(target_modules=7), TypeError, ("^target_modules must", "list of suffixes", "got 7")),
    "targets of numbers": Case(config(target_modules=[7]), TypeError, ("^target_modules must", r"got \[7\]")),
    "exclude": Case(config(exclude_modules=7), TypeError, ("^exclude_modules must", "regular expression", "got 7")),
    "exclude regex": Case(config(exclude_modules="["), ValueError, (r"exclude_modules='\['", "pass a list")),
    "one name to save": Case(
        config(modules_to_save="classifier"), TypeError,
        ("^modules_to_save must", "list of names", r"use \['classifier'\]"),
    ),
    "number to save": Case(config(modules_to_save=7), TypeError, ("^modules_to_save must", "list of names", "got 7")),
    "numbers to save": Case(config(modules_to_save=[7]), TypeError, ("^modules_to_save must", r"got \[7\]")),
    "unknown setting": Case(
        lambda: pst.PSTConfig.from_dict({"sparsty": 0.5}), ValueError, ("'sparsty' is not", "did you mean 'sparsity'"),
    ),
    "strange setting": Case(
        lambda: pst.PSTConfig.from_dict({"xyz": 0.5}), ValueError,
        ("'xyz' is not", "known are sparsity, initial_sparsity"),
    ),
    "callable in a file": Case(
        lambda: pst.PSTConfig(target_modules=lambda m, n: True).to_dict(), TypeError,
        ("^target_modules is a callable", "use a regular expression or a list"),
    ),
}  # fmt: skip


def fresh_layer(**settings) -> pst.PSTLinear:
    return pst.PSTLinear(24, 40, config=pst.PSTConfig(**settings))


def set_sparsity(value) -> Callable[[], object]:
    return lambda: setattr(fresh_layer(), "sparsity", value)


LAYER = {
    "sparsity 1": Case(set_sparsity(1.0), ValueError, ("^sparsity must", FRACTION, r"got 1\.0", "0.9 keeps")),
    "sparsity -1": Case(set_sparsity(-1), ValueError, ("^sparsity must", FRACTION, "got -1")),
    "sparsity NaN": Case(set_sparsity(math.nan), ValueError, ("^sparsity must", FRACTION, "got nan")),
    "sparsity True": Case(set_sparsity(True), TypeError, ("^sparsity must", FRACTION, "got True of type bool")),
    "sparsity string": Case(set_sparsity("0.9"), TypeError, ("^sparsity must", FRACTION, "got '0.9' of type str")),
    "features": Case(
        lambda: fresh_layer()(torch.randn(2, 23)), ValueError,
        ("^x has 23 features", r"\(40, 24\) takes 24"),
    ),
    "dtype": Case(
        lambda: fresh_layer()(torch.randn(2, 24).half()), TypeError,
        ("^x is torch.float16 but weight is torch.float32", r"cast x with x\.to\(torch.float32\), or"),
    ),
    "integer input": Case(
        lambda: fresh_layer()(torch.ones(2, 24, dtype=torch.int64)), TypeError, ("^x is torch.int64", r"x\.to\("),
    ),
    "device": Case(
        lambda: fresh_layer()(torch.randn(2, 24, device="meta")), ValueError,
        ("^weight is on cpu but x is on meta", "move the layer or the input"),
    ),
    "factor device": Case(
        lambda: moved_factor(fresh_layer())(torch.randn(2, 24)), ValueError,
        ("is on meta but weight is on cpu", "move"),
    ),
    "not a linear": Case(
        lambda: pst.PSTLinear.from_linear(nn.Conv2d(1, 1, 1)), TypeError,
        ("^linear must be an nn.Linear", "got Conv2d"),
    ),
    "not a Conv1D": Case(
        lambda: pst.PSTConv1D.from_linear(nn.Linear(2, 3)), TypeError,
        ("^conv must be a transformers Conv1D", "got Linear"),
    ),
    "config": Case(
        lambda: pst.PSTLinear(3, 4, config={"sparsity": 0.5}), TypeError, ("^config must be a PSTConfig", "got dict"),
    ),
}  # fmt: skip


def moved_factor(layer: pst.PSTLinear) -> pst.PSTLinear:
    layer.pst_B = nn.Parameter(layer.pst_B.to("meta"))
    return layer


def factors(**changes) -> list[torch.Tensor]:
    """weight, U, V, A, B, R, C of a (6, 5) problem, some of them replaced."""
    shapes = {"weight": (6, 5), "U": (6, 2), "V": (2, 5), "A": (6, 3), "B": (3, 5), "R": (6,), "C": (5,)}
    return [changes.get(name, torch.zeros(shape)) for name, shape in shapes.items()]


def linear(x=None, mask=None, **changes) -> Callable[[], object]:
    def call():
        weight, *rest = factors(**changes)
        given = torch.zeros(6, 1, dtype=torch.int32) if mask is None else mask
        return functional.pst_linear(torch.zeros(2, 5) if x is None else x, weight, None, *rest, given)

    return call


def wrong_factor(name: str, shape: tuple, expected: str) -> Case:
    call: Callable[[], object] = lambda: functional.scores(*factors(**{name: torch.zeros(shape)}))  # noqa: E731
    return Case(call, ValueError, (rf"^{name} must have shape {expected}", r"for weight \(6, 5\)", "got "))


FUNCTIONAL = {
    "U": wrong_factor("U", (5, 2), r"\(6, 2\)"),
    "V": wrong_factor("V", (2, 6), r"\(2, 5\)"),
    "A": wrong_factor("A", (6, 2), r"\(6, 3\)"),
    "B": wrong_factor("B", (3, 6), r"\(3, 5\)"),
    "R": wrong_factor("R", (6, 1), r"\(6,\)"),
    "C": wrong_factor("C", (1, 5), r"\(5,\)"),
    "weight": Case(
        lambda: functional.scores(*factors(weight=torch.zeros(5))), ValueError,
        ("^weight must be 2-d", r"got shape \(5,\)"),
    ),
    "weight dtype": Case(
        lambda: functional.scores(*factors(weight=torch.zeros(6, 5, dtype=torch.int8))), TypeError,
        ("^weight must be one of float32, float16, bfloat16 or float64", "got torch.int8"),
    ),
    "factor dtype": Case(
        lambda: functional.scores(*factors(R=torch.zeros(6, dtype=torch.int64))), TypeError,
        ("^R must be one of", "int64"),
    ),
    "factor device": Case(
        lambda: functional.scores(*factors(C=torch.zeros(5, device="meta"))), ValueError,
        ("^C is on meta but weight is on cpu", "move them to one device"),
    ),
    **{
        f"num_pruned {value}": Case(
            lambda value=value: functional.prune_mask(*factors(), value), ValueError,
            (r"^num_pruned must be in \[0, 30\]", f"got {value}"),
        )
        for value in (-1, 31)
    },
    **{
        f"k {value}": Case(
            lambda value=value: functional.kth_value(torch.zeros(30), value), ValueError,
            (r"^k must be in \[1, 30\]", f"got {value}"),
        )
        for value in (0, -1, 31)
    },
    "k 2.5": Case(lambda: functional.kth_value(torch.zeros(30), 2.5), TypeError, (r"^k must be a whole number", "2.5")),
    "num_pruned 2.5": Case(
        lambda: functional.prune_mask(*factors(), 2.5), TypeError, (r"^num_pruned must be a whole number", "2.5"),
    ),
    "num_pruned as a float tensor": Case(
        lambda: functional.prune_mask(*factors(), torch.tensor(2.5)), TypeError,
        (r"^num_pruned must be an int or a 0-d int64 tensor", "float32", "torch.tensor"),
    ),
    "num_pruned as too large a tensor": Case(
        lambda: functional.prune_mask(*factors(), torch.tensor(99)), ValueError, (r"^num_pruned must be in", "99"),
    ),
    "no scores": Case(lambda: functional.kth_value(torch.zeros(0), 1), ValueError, ("^k must be in", "for 0 scores")),
    "scores dtype": Case(
        lambda: functional.kth_value(torch.zeros(3).half(), 1), TypeError,
        ("^scores must be float32", "use scores.float()"),
    ),
    "x features": Case(linear(x=torch.zeros(2, 6)), ValueError, ("^x has 6 features", r"\(6, 5\) takes 5")),
    "x dtype": Case(
        linear(x=torch.zeros(2, 5).double()), TypeError,
        ("^x is torch.float64", "weight is torch.float32"),
    ),
    "mask shape": Case(
        linear(mask=torch.zeros(6, 2, dtype=torch.int32)), ValueError,
        ("^mask must be packed", r"\(6, 1\)", "prune_mask"),
    ),
    "mask dtype": Case(linear(mask=torch.zeros(6, 5).bool()), ValueError, ("^mask must be packed", "got torch.bool")),
    "mask device": Case(
        linear(mask=torch.zeros(6, 1, dtype=torch.int32, device="meta")), ValueError, ("^mask is on meta", "move"),
    ),
    "trainable weight": Case(
        linear(weight=torch.zeros(6, 5, requires_grad=True)), ValueError,
        ("^weight requires grad", r"requires_grad_\(False\)"),
    ),
    "unpack dtype": Case(
        lambda: functional.unpack_mask(torch.zeros(6, 5), 5), TypeError, ("^packed must be", "got torch.float32"),
    ),
    "unpack width": Case(
        lambda: functional.unpack_mask(torch.zeros(6, 2, dtype=torch.int32), 5), ValueError,
        ("^in_features=5 needs 1 words", r"\(6, 2\)"),
    ),
}  # fmt: skip


def variable(name: str, value: str, read: Callable[[], object]) -> Callable[[], object]:
    def call():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            return read()

    return call


def without_triton() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PST_KERNELS_BACKEND", "triton")
        patch.setattr(env, "has_triton", lambda: False)
        return fresh_layer()(torch.zeros(2, 24))


ENVIRONMENT = {
    "backend": Case(
        variable("PST_KERNELS_BACKEND", "cuda", env.backend), ValueError,
        ("^PST_KERNELS_BACKEND='cuda' is not known", "one of auto, triton, torch, or unset"),
    ),
    "backend in a forward": Case(
        variable("PST_KERNELS_BACKEND", "cuda", lambda: fresh_layer()(torch.zeros(2, 24))), ValueError,
        ("^PST_KERNELS_BACKEND='cuda'", "auto, triton, torch"),
    ),
    "triton absent": Case(without_triton, ImportError, ("PST_KERNELS_BACKEND=triton", "not installed", "unset")),
    "architecture": Case(
        variable("PST_KERNELS_ARCH", "sm_75", env.architecture), ValueError,
        ("^PST_KERNELS_ARCH='sm_75'", "sm_80, sm_86"),
    ),
    "tuning": Case(
        variable("PST_KERNELS_TUNING", "/no/such.json", env.tuning_file), ValueError,
        ("^PST_KERNELS_TUNING='/no/such.json' is not a file", "pst-kernels tune", "unset"),
    ),
}  # fmt: skip

OTHERS = {
    "schedule of a dense model": Case(
        lambda: pst.SparsitySchedule(toys.plain(), 10), ValueError,
        ("Sequential has no PST layers", "call replace_linear"),
    ),
    **{
        f"total_steps {value!r}": Case(
            lambda value=value: pst.SparsitySchedule(pst.replace_linear(toys.plain()), value), error,
            ("^total_steps must", "at least 1", f"got {value!r}"),
        )
        for value, error in ((0, ValueError), (-5, ValueError), (2.5, TypeError), (True, TypeError), ("10", TypeError))
    },
    "step_count": Case(
        lambda: pst.SparsitySchedule(pst.replace_linear(toys.plain()), 10, -1), ValueError,
        ("^step_count must", "got -1"),
    ),
    "merging a dense model": Case(
        lambda: pst.merge_and_unload(toys.plain()), ValueError, ("has no PST layers", "call replace_linear"),
    ),
    "saving a dense model": Case(
        lambda: pst.save_pretrained(toys.plain(), "/tmp/never"), ValueError,
        ("has no PST layers", "call replace_linear"),
    ),
    "loading from nowhere": Case(
        lambda: pst.load_pretrained(toys.plain(), "/no/such/place"), FileNotFoundError,
        ("^/no/such/place has no pst_adapter.safetensors", "written by save_pretrained"),
    ),
    "config from nowhere": Case(
        lambda: pst.PSTConfig.from_pretrained("/no/such/place"), FileNotFoundError,
        ("/no/such/place/pst_config.json does not exist", "saved by PSTConfig.save_pretrained"),
    ),
    "two configs": Case(lambda: pst.merge_and_unload(mixed()), ValueError, ("^0 and 2 were converted with different",)),
    "unknown public name": Case(lambda: pst.PSTLiner, AttributeError, ("'pst_kernels' has no attribute 'PSTLiner'",)),
}  # fmt: skip


def mixed() -> nn.Module:
    model = pst.replace_linear(toys.plain(), pst.PSTConfig(target_modules=["0"], sparsity=0.5))
    return pst.replace_linear(model, pst.PSTConfig(target_modules=["0", "2"], sparsity=0.9))


def check(case: Case) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    assert type(caught.value) is case.error
    for pattern in case.says:
        caught.match(pattern)


TABLE = {
    f"{group}: {name}": case
    for group, cases in {
        "config": CONFIG, "layer": LAYER, "functional": FUNCTIONAL, "environment": ENVIRONMENT, "others": OTHERS,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE)
def test_bad_input(case):
    check(case)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is damaged .*expected a thing, save it again"),
        ("\xff\xfe", r"is damaged"),
        ("[1]", r"holds a list instead of an object; expected a thing"),
    ],
)
def test_bad_json(text, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path, "a thing")
    assert str(path) in str(caught.value)


def test_no_assert_in_the_package():
    import ast
    from pathlib import Path

    for path in Path(pst.__file__).parent.rglob("*.py"):
        found = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert not found, f"{path} asserts in lines {found}"
