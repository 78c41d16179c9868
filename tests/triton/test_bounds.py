"""No address outside a tensor: every shipped kernel on odd shapes, in the emulator, where each tensor lies between red
zones. That its checks are exact shows when a kernel is told of one row, column or token more than there is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dyadic import no_guess, problem
from oracle import grouped, masked_weight

from pst_kernels import cpu
from pst_kernels.operands import Needs

kernels = pytest.importorskip("pst_kernels.triton", reason="triton is not installed")
select = pytest.importorskip("pst_kernels.triton.select")

from block_problem import Problem as BlockProblem  # noqa: E402
from linear_problem import Problem, operands_of  # noqa: E402
from sparse_problem import Problem as PackedProblem  # noqa: E402

from pst_kernels.triton import block_gradients, block_matmul, gradients, listed_matmul, matmul, sparse_matmul  # noqa: E402
from pst_kernels.triton.tiles import tables, targets  # noqa: E402
from pst_kernels.triton.tools import machine_code as shipping  # noqa: E402

SELECTION = {
    "scores_kernel": ("rows", "columns"),
    "gather_kernel": ("n_i", "n_j"),
    "radix_histogram_kernel": ("n_i", "n_j"),
    "mask_kernel": ("n_i", "n_j"),
    "masked_weight_kernel": ("n_i", "n_j"),
}
LINEAR = {
    "split_factors_kernel": ("rows", "columns"),
    "masked_matmul_kernel": ("tokens", "rows", "depth"),
    "factor_gradients_kernel": ("tokens", "rows", "columns"),
    "many_ranks_kernel": ("tokens", "rows", "columns"),
    "add_partials_kernel": ("rows", "columns", "row_partials", "column_partials"),
}
BLOCKS = {
    "list_blocks_kernel": ("across",),
    "order_lists_kernel": ("across",),
    "block_matmul_kernel": ("tokens", "rows", "depth"),
    "block_gradients_kernel": ("tokens", "rows", "columns"),
    "add_block_partials_kernel": ("rows", "columns", "split_k"),
}
PACKED = {
    "words_kernel": ("rows", "words"),
    "sparse_matmul_kernel": ("tokens", "rows", "columns"),
    "listed_matmul_kernel": ("tokens", "rows", "chunks"),
    "add_sums_kernel": ("numel", "splits"),
    "expand_kernel": ("rows", "columns"),
}


ARCHITECTURE = 80  # where it is not a test's parameter


@pytest.fixture
def architecture() -> int:
    return ARCHITECTURE


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", f"sm_{architecture}")


def run_selection(rows: int, columns: int, transposed: bool = False) -> None:
    """All passes: a bracket above all scores, where there is not room for all of them, leads to the radix passes."""
    tensors = problem(rows, columns, 5)
    if transposed:
        tensors[0] = tensors[0].T.contiguous().T
    kernels.scores(*grouped(tensors, (1.0, 1.0, 1.0)))
    guess, num_pruned = torch.tensor([9.0, 0.1, 0.5, 0.01]), torch.tensor(rows * columns // 2)
    masked = torch.empty(rows, columns, dtype=torch.bfloat16)
    bits = kernels.prune_mask(*grouped(tensors, (1.0, 1.0, 1.0)), num_pruned, guess, masked)
    assert torch.equal(bits, cpu.prune_mask(*grouped(tensors, (1.0, 1.0, 1.0)), num_pruned, no_guess()))
    kernels.masked_weight(masked_weight(tensors, bits), torch.float32)


def run_linear(rows: int, columns: int, tokens: int = 3, transposed: bool = False, rank: int = 5) -> None:
    given = Problem(rows, columns, tokens, rank, "bfloat16", transposed=transposed).tensors()
    gy, x, operands = given["gy"], given["x"], operands_of(given, given["kept"])
    matmul.linear_forward(x, operands, given["bias"])
    gradients.linear_backward(gy, x, operands, True, Needs(True, True))
    for through in (True, False):
        gradients.rested_backward(gy, x, operands, through, Needs(False, True))


def run_blocks(rows: int, columns: int, size: int, tokens: int = 3, transposed: bool = False) -> None:
    """With the last row and the last column of blocks kept, where there is an outside to reach."""
    problem = BlockProblem(rows, columns, tokens, 5, size, "bfloat16", kept=0.5, transposed=transposed)
    flags = problem.flags()
    flags[-1] = True
    flags[:, -1] = True
    given = problem.tensors()
    kept = flags.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
    gy, x, operands = given["gy"], given["x"], operands_of(given, kept)
    block_matmul.block_forward(x, operands, given["bias"], size)
    block_gradients.block_backward(gy, x, operands, size, False, True, Needs(True, True))


def run_packed(rows: int, columns: int) -> None:
    """With everything kept, so that there is no room behind the last weight."""
    x, gy, layer = PackedProblem(rows, columns, 3, kept=1.0).tensors()
    lists = layer.weight.detach(), layer.offsets, layer.pointers
    sparse_matmul.sparse_forward(x, *lists, layer.bias.detach(), rows)
    platform = targets.platform(x.device)
    listed_matmul.listed_matmul(x, *lists, layer.bias.detach(), rows, platform)
    sparse_matmul.sparse_input_gradient(gy, *lists, columns)
    sparse_matmul.expanded(*lists, (rows, columns), torch.float32)


def change_arguments(emulator, monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[dict], None]) -> None:
    original = emulator.launching.launch

    def launch(fn, grid, args, *rest, **options):
        if fn.fn.__name__ == kernel:
            change(args)
        return original(fn, grid, args, *rest, **options)

    monkeypatch.setattr(emulator.launching, "launch", launch)


def outside(kernel: str) -> str:
    return rf"outside (every tensor|memory) in {kernel}\b"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (33, 65)])
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_stays_inside(
    emulator, monkeypatch, architecture: int, shape: tuple[int, int], transposed: bool
) -> None:
    monkeypatch.setattr(select, "capacity_of", lambda numel: max(1, numel // 16))
    with emulator.emulate(architecture) as session:
        run_selection(*shape, transposed)
        run_linear(*shape, transposed=transposed)
        run_linear(*shape, transposed=transposed, rank=9)
        run_blocks(*shape, 16, transposed=transposed)
        run_packed(*shape)
    files = tuple(name for name in shipping.KERNEL_FILES if name != "group_mask")  # it is in test_group_emulated.py
    every = {binary.kernel.__name__ for binary in shipping.shipped(f"sm_{architecture}", files)}
    missing = {"radix_histogram_kernel"} if shape == (1, 1) else set()
    missing |= {"add_sums_kernel"} if shape[0] < 33 else set()  # one tile has no depth to share
    assert set(session.stats) == every - missing
    assert {*SELECTION, *LINEAR, *BLOCKS, *PACKED, "bracket_kernel", "refine_kernel"} == every


@pytest.mark.parametrize(("kernel", "extent"), [(name, extent) for name in SELECTION for extent in SELECTION[name]])
def test_one_more_is_noticed_in_selection(emulator, monkeypatch, kernel: str, extent: str) -> None:
    monkeypatch.setattr(select, "capacity_of", lambda numel: numel // 16)
    change_arguments(emulator, monkeypatch, kernel, lambda args: args.update({extent: args[extent] + 1}))
    with emulator.emulate(ARCHITECTURE), pytest.raises(emulator.MemoryFault, match=outside(kernel)):
        run_selection(33, 65)


@pytest.mark.parametrize(("kernel", "extent"), [(name, extent) for name in LINEAR for extent in LINEAR[name]])
def test_one_more_is_noticed_in_the_linear(emulator, monkeypatch, kernel: str, extent: str) -> None:
    change_arguments(emulator, monkeypatch, kernel, lambda args: args.update({extent: args[extent] + 1}))
    with emulator.emulate(ARCHITECTURE), pytest.raises(emulator.MemoryFault, match=outside(kernel)):
        run_linear(33, 65, rank=9 if kernel == "many_ranks_kernel" else 5)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(("kernel", "extent"), [(name, extent) for name in BLOCKS for extent in BLOCKS[name]])
def test_one_more_is_noticed_with_blocks(emulator, monkeypatch, kernel: str, extent: str, size: int) -> None:
    change_arguments(emulator, monkeypatch, kernel, lambda args: args.update({extent: args[extent] + 1}))
    with emulator.emulate(ARCHITECTURE), pytest.raises(emulator.MemoryFault, match=outside(kernel)):
        run_blocks(65, 65, size)


@pytest.mark.parametrize(("kernel", "extent"), [(name, extent) for name in PACKED for extent in PACKED[name]])
def test_one_more_is_noticed_with_packed_weights(emulator, monkeypatch, kernel: str, extent: str) -> None:
    change_arguments(emulator, monkeypatch, kernel, lambda args: args.update({extent: args[extent] + 1}))
    with emulator.emulate(ARCHITECTURE), pytest.raises(emulator.MemoryFault, match=outside(kernel)):
        run_packed(33, 130)


def test_one_candidate_more_is_noticed(emulator, monkeypatch) -> None:
    """Where the room for candidates is full."""
    monkeypatch.setattr(select, "capacity_of", lambda numel: numel)

    def change(args: dict) -> None:
        args["p_state"][select.COUNT.value] += 1
        args["capacity"] += 1

    change_arguments(emulator, monkeypatch, "refine_kernel", change)
    with emulator.emulate(ARCHITECTURE), pytest.raises(emulator.MemoryFault, match=outside("refine_kernel")):
        run_selection(33, 65)


def test_a_sample_stays_inside(emulator, monkeypatch) -> None:
    """Its places are random, so only being told of a sixteenth more weights than there are must be noticed."""
    monkeypatch.setattr(select, "capacity_of", lambda numel: 9000)
    arguments = [*grouped(problem(129, 131, 5)), torch.tensor(9000), no_guess()]
    with emulator.emulate(ARCHITECTURE):
        state = select.threshold(*arguments)
    assert select.route(state) == "sample"
    change_arguments(
        emulator, monkeypatch, "bracket_kernel", lambda args: args.update(numel=args["numel"] + args["numel"] // 16)
    )
    arguments[-1] = no_guess()
    fault = outside("bracket_kernel") + ": ld"
    with emulator.emulate(ARCHITECTURE), pytest.raises(emulator.MemoryFault, match=fault):
        select.threshold(*arguments)


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_widest_tile_stays_inside(emulator, architecture: int) -> None:
    """More than one tile either way, the last of them part empty."""
    assert tables.GRADIENTS[f"sm_{architecture}"]["half"].rows < 160
    with emulator.emulate(architecture):
        run_linear(160, 192, tokens=131)
