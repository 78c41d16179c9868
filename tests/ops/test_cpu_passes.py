"""The compiled passes: against the reference in float64, the same bits on any number of threads, and when they run."""

from __future__ import annotations

import ast
import concurrent.futures
import importlib
import logging
import math
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from oracle import SCALES, grouped, make_problem, masked_weight, relative_error

from pst_kernels import cpu, functional, notices, reference
from pst_kernels.cpu import compiled, row_blocks, scratch
from pst_kernels.cpu.compiled import arguments, jit, kernels, launch, row_loops, threads
from pst_kernels.cpu.compiled.__main__ import compile_all
from pst_kernels.masks import packing
from pst_kernels.operands import Needs

SHAPES = [(1, 1), (7, 33), (129, 65), (96, 384), (5, 1000), (1100, 90)]  # the last: more rows than one group of G
RANKS = [1, 8, 9]
ARGUMENTS = tuple(SCALES.values())


@pytest.fixture(autouse=True)
def always_compiled(monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", "numba")


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def no_guess():
    return functional.new_guess()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("through_magnitude", [True, False])
def test_values_and_gradients(shape, rank, through_magnitude):
    """fp32 rounding is all that parts them from the reference."""
    options = SCALES | {"through_magnitude": through_magnitude}
    exact = make_problem(*shape, rank=rank, score_rank=max(1, rank - 1)).requires_grad()
    single = exact.to(torch.float32)
    leaves = [factor.detach().requires_grad_() for factor in single.factors]
    packed = functional.prune_mask(single.weight, *leaves, shape[0] * shape[1] // 2, **SCALES)
    x = torch.randn(6, shape[1], dtype=torch.float64, requires_grad=True)
    x32 = x.detach().float().requires_grad_()
    ours = functional.pst_linear(x32, single.weight, None, *leaves, packed, **options)
    mask = functional.unpack_mask(packed, shape[1])
    theirs = reference.pst_linear(x, exact.weight, None, *exact.factors, mask, **options)
    assert relative_error(ours, theirs) < 1e-6
    gy = torch.randn(theirs.shape, dtype=torch.float64)
    values = torch.autograd.grad(ours, (x32, *leaves), gy.float())
    expected = torch.autograd.grad(theirs, (x, *exact.factors), gy)
    for value, right in zip(values, expected, strict=True):
        assert value.shape == right.shape
        assert relative_error(value, right) < 2e-6


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_on_either_side(weight_dtype, dtype):
    """M * W' is W' in fp32 rounded once, whichever pass writes it; G is read as it is."""
    weight, factors = make_problem(70, 150, weight_dtype=weight_dtype, factor_dtype=torch.float32)
    masked = torch.full(weight.shape, 7.0, dtype=dtype)
    count = torch.tensor(8_000)
    mask = cpu.prune_mask(*grouped((weight, *factors), ARGUMENTS), count, no_guess(), masked)
    assert torch.equal(mask, cpu.prune_mask(*grouped((weight, *factors), ARGUMENTS), count, no_guess()))
    assert torch.equal(masked, cpu.masked_weight(masked_weight((weight, *factors), mask, ARGUMENTS), dtype))
    updated = weight.double() + SCALES["beta"] * factors[0].double() @ factors[1].double()
    exact = torch.where(functional.unpack_mask(mask, 150), updated, 0.0)
    torch.testing.assert_close(masked.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    gy, x = torch.randn(40, 70).to(dtype), torch.randn(40, 150).to(dtype)
    found, whole = (
        cpu.linear_backward(gy, x, masked_weight(tensors, mask, ARGUMENTS), True, Needs(False, True))
        for tensors in ((weight, *factors), (weight.double(), *(f.double() for f in factors)))
    )
    for value, right in zip(found[1:], whole[1:], strict=True):
        assert relative_error(value, right) < (2e-6 if dtype == torch.float32 else 1e-2)  # G is a bf16 product


def test_the_same_bits_on_any_number_of_threads(set_threads, monkeypatch):
    """PyTorch's threads, Python's own, or none: a task's results depend on nothing else."""
    weight, factors = make_problem(700, 300, weight_dtype=torch.float32, factor_dtype=torch.float32)
    gy, x = torch.randn(32, 700), torch.randn(32, 300)

    def everything():
        masked = torch.empty(700, 300)
        mask = cpu.prune_mask(*grouped((weight, *factors), ARGUMENTS), torch.tensor(150_000), no_guess(), masked)
        with monkeypatch.context() as patched:  # the library's own product may differ with the threads
            patched.setattr(torch, "mm", lambda left, right, out: out.copy_(left.double() @ right.double()))
            operands = masked_weight((weight, *factors), mask, ARGUMENTS)
            gradients = launch.factor_gradients(gy, x, operands, True, masked, row_blocks.GEMM_ROWS, scratch.get)
        return mask, masked, cpu.scores(*grouped((weight, *factors), ARGUMENTS)), *gradients

    set_threads(1)
    alone = everything()
    for number in (2, 3, 8):
        set_threads(number)
        assert all(map(torch.equal, everything(), alone))
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    assert all(map(torch.equal, everything(), alone))


def test_passes_of_several_python_threads_at_once(set_threads):
    set_threads(2)
    problems = [make_problem(200, 180, seed=i).to(torch.float32) for i in range(4)]

    def mask(problem):
        return cpu.prune_mask(*grouped((problem.weight, *problem.factors), ARGUMENTS), torch.tensor(30_000), no_guess())

    alone = list(map(mask, problems))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(mask, problems * 10))
    assert all(map(torch.equal, together, alone * 10))


@pytest.mark.parametrize("num_pruned", [1, 5_000, 20_000, 29_999, 30_000])
def test_more_ties_than_there_is_room_for(num_pruned):
    """The first pass only counts them; the second has room for all."""
    weight, factors = torch.full((100, 300), 0.5), [torch.zeros(f.shape) for f in make_problem(100, 300).factors]
    masked = torch.full((100, 300), 7.0)
    guess = torch.tensor([0.5, 1.0, num_pruned / 30_000, 0.01])
    mask = cpu.prune_mask(*grouped((weight, *factors)), torch.tensor(num_pruned), guess, masked)
    kept = functional.unpack_mask(mask, 300).flatten()
    assert torch.equal(kept, torch.arange(30_000) >= num_pruned)
    assert torch.equal(masked.flatten(), kept * 0.5)


@pytest.mark.parametrize("share_of_ties", [0.1, 0.3, 0.6])
def test_ties_on_both_sides_of_the_room(share_of_ties):
    weight, factors = torch.rand(200, 400) + 1.0, [torch.zeros(f.shape) for f in make_problem(200, 400).factors]
    weight[torch.rand(200, 400) < share_of_ties] = 0.5
    ties = int((weight == 0.5).sum())
    guess = torch.tensor([0.5, 1e-3, 0.5, 0.01])
    mask = cpu.prune_mask(*grouped((weight, *factors)), torch.tensor(ties - 3), guess)
    expected = weight > 0.5
    expected.view(-1)[(weight == 0.5).flatten().nonzero()[-3:]] = True
    assert torch.equal(functional.unpack_mask(mask, 400), expected)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 250])
def test_packed_words(columns):
    """`pack` and `unpack` follow packing.py, padding bits included."""
    kept = torch.rand(9, columns) > 0.5
    packed = packing.pack_mask(kept)
    flags = np.zeros(32 * packed.shape[1], np.uint8)
    for row, words in zip(kept, packed.view(torch.uint32).numpy(), strict=True):
        row_loops.unpack(words, flags)
        assert np.array_equal(flags[:columns], row.numpy())
        assert not flags[columns:].any()
        again = np.zeros_like(words)
        row_loops.pack(flags, again)
        assert np.array_equal(again, words)


def test_bf16_rounding():
    """To nearest even, as PyTorch's; NaN and infinities stay what they are."""
    values = torch.cat([torch.randn(4096) * 10.0**e for e in (-41, -38, 0, 38)])
    halfway = (torch.arange(4096, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    values = torch.cat([values, halfway, torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4e38])])
    bits = np.empty(values.numel(), np.uint16)
    row_loops.narrow(values.numpy(), bits)
    expected = values.to(torch.bfloat16)
    found = torch.from_numpy(bits).view(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    wide = np.empty(values.numel(), np.float32)
    row_loops.widen(bits, wide)
    assert torch.equal(torch.from_numpy(wide).nan_to_num(), expected.float().nan_to_num())


def test_tasks_cover_all_rows_once():
    for out, columns in ((1, 1), (7, 10), (300, 1000), (3072, 768), (50_257, 8)):
        rows = arguments.rows_per_task(out, columns)
        assert 1 <= rows <= out
        sums = arguments.rows_per_reduction_task(out, launch.TASKS)
        assert sums % row_loops.GROUP == 0
        assert -(-out // sums) <= launch.TASKS


def test_machine_code_is_kept_by_the_sources_of_the_whole_folder():
    """Numba alone would go by the file of a function, and use what was compiled before another file changed."""
    for compiled_pass in (kernels.prune, kernels.gradients):
        assert jit.cache_folder() in Path(compiled_pass._cache.cache_path).parents
    assert str(jit.cache_folder()) != numba.config.CACHE_DIR  # other users of Numba keep theirs


def test_all_passes_can_be_compiled_ahead():
    """What has a pass is among the modules that the command imports."""
    names = compile_all()
    files = Path(compiled.__file__).parent.glob("*.py")
    with_passes = {path.stem for path in files if "@whole_pass" in path.read_text()}
    assert with_passes
    assert {f"pst_kernels.cpu.compiled.{stem}" for stem in with_passes} <= {*names} <= {*sys.modules}


def test_no_two_compiled_functions_have_one_name():
    """Code that is kept on disk calls others by name and a number that each process gives anew."""
    found: dict[str, int] = {}
    for path in Path(compiled.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"pst_kernels.cpu.compiled.{path.stem}".removesuffix(".__init__"))
        for value in vars(module).values():
            function = getattr(value, "py_func", getattr(value, "_pyfunc", None))
            if function is not None:
                name = f"{function.__module__}.{function.__qualname__}"
                assert found.setdefault(name, id(function)) == id(function), name
    assert len(found) > 40
    assert not any("<locals>" in name for name in found)


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (torch.ones(4, 4, dtype=torch.float64), None),
        (torch.ones(4, 4, dtype=torch.float16), None),
        (torch.ones(4, 4), torch.float16),
        (torch.ones(4, 3).T, None),
        (torch.ones(4, 0), None),
        (torch.ones(4, 4, device="meta"), None),
    ],
    ids=["float64", "fp16", "fp16 result", "transposed", "empty", "another device"],
)
def test_what_is_left_to_pytorch(weight, dtype):
    assert compiled.passes_for(weight, dtype) is None
    assert compiled.passes_for(torch.ones(4, 4), torch.bfloat16) is launch


def test_the_variable(monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", "torch")
    assert compiled.passes_for(torch.ones(4, 4)) is None
    monkeypatch.setenv("PST_KERNELS_CPU", "cython")
    with pytest.raises(ValueError, match=r"PST_KERNELS_CPU='cython'.*auto, numba, torch"):
        compiled.passes_for(torch.ones(4, 4))


@pytest.fixture
def without_numba(monkeypatch):
    for name in [
        name for name in sys.modules if name.split(".")[0] == "numba" or name.startswith("pst_kernels.cpu.compiled.")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)  # an import of it fails
    monkeypatch.delattr(compiled, "launch")
    compiled._import.cache_clear()
    notices.say_once.cache_clear()
    yield
    compiled._import.cache_clear()
    notices.say_once.cache_clear()


@pytest.mark.usefixtures("without_numba")
def test_without_numba_it_says_so_once_and_goes_on(monkeypatch, caplog):
    monkeypatch.delenv("PST_KERNELS_CPU")
    weight, factors = make_problem(100, 90, weight_dtype=torch.float32, factor_dtype=torch.float32)  # not a small one
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        for _ in range(3):
            assert int((~functional.unpack_mask(functional.prune_mask(weight, *factors, 300), 90)).sum()) == 300
    (record,) = caplog.records
    assert "numba" in record.message
    assert "slower" in record.message


@pytest.mark.usefixtures("without_numba")
def test_an_explicit_request_without_numba_raises():
    with pytest.raises(ImportError, match=r"PST_KERNELS_CPU=numba, but .*install numba or unset"):
        compiled.passes_for(torch.ones(4, 4))


def test_the_folder_imports_nothing_of_the_package_that_it_lies_in():
    """What it needs of pst_kernels.cpu is handed to it."""
    for source in Path(compiled.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, source.name
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("pst_kernels.cpu") for name in names), source.name
