"""The products with packed weights as they are shipped, compiled for sm_80 and sm_90, executed by the PTX emulator."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_problem import COMPILED, Problem

from pst_kernels import SparseLinear, ops
from pst_kernels.masks.chunks import CHUNK
from pst_kernels.masks.packing import pack_mask
from pst_kernels.triton import sparse_matmul
from pst_kernels.triton.tiles import choice, tables, targets

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("problem", COMPILED, ids=str)
def test_equals_float64(emulator, arch: int, problem: Problem) -> None:
    with emulator.emulate(arch) as session:
        errors = problem.errors()
    assert problem.wrong(errors) == {}
    launches = {name: stats.launches for name, stats in session.stats.items()}
    assert launches.pop("words_kernel") == 1  # for both products, where they need them
    launches.pop("add_sums_kernel", None)
    few = problem.tokens <= tables.SPARSE_TOKENS
    weights = problem.out * problem.columns
    listed = choice.listed_matmul(problem.tokens, problem.tensors()[2].weight.numel(), weights)
    assert launches.pop("listed_matmul_kernel", 0) == listed
    assert launches == {"sparse_matmul_kernel" if few else "expand_kernel": 2 - listed}


def test_words_and_the_written_out_weight_are_exact(emulator, arch: int) -> None:
    for shape in ((37, 300), (3, 129), (1, 1)):
        layer = Problem(*shape, 1, kept=0.4).tensors()[2]
        with emulator.emulate(arch):
            words = sparse_matmul.words_of(layer.offsets, layer.pointers, *shape)
            found = sparse_matmul.expanded(*layer.lists[:3], shape, torch.bfloat16)
        assert torch.equal(words, pack_mask(layer.to_dense() != 0))
        assert torch.equal(found, layer.to_dense())


@pytest.mark.parametrize("form", ["tiles", "lists"])
def test_program_order_changes_no_bit(emulator, arch: int, form: str) -> None:
    """The depth shared among programs in both directions: the same bits, and right."""
    problem = Problem(69, 300, 8) if form == "tiles" else Problem(37, 1100, 2, kept=0.1)
    results = []
    for order in ("forward", "reversed", "shuffled"):
        with emulator.emulate(arch, order) as session:
            results.append(problem.solve())
        assert session.stats["add_sums_kernel"].launches == 2
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kept", [0.1, 0.5])
def test_it_reads_what_the_format_holds(emulator, arch: int, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, at 8 tokens: besides x, at most 1.15 times the bits and the kept values, in both directions."""
    monkeypatch.setattr(choice, "listed_matmul", lambda *given: False)
    out, columns = 64, 256
    x, gy, _ = Problem(out, columns, 8).tensors()
    layer = SparseLinear.from_dense(torch.randn(out, columns).bfloat16(), None, torch.rand(out, columns) < kept)
    lists, values = (layer.weight.detach(), layer.offsets, layer.pointers), 2 * layer.weight.numel()
    tile = tables.SPARSE_MATMUL[f"sm_{arch}"]["half"][0][1]
    down, across = out // tile.rows, columns // tile.depth
    for transposed in (False, True):
        with emulator.emulate(arch) as session:
            if transposed:
                sparse_matmul.sparse_input_gradient(gy, *lists, columns)
            else:
                sparse_matmul.sparse_forward(x, *lists, None, out)
        of_x = 2 * (across * gy.numel() if transposed else down * x.numel())  # programs that read the same part of x
        same = 4 * (32 * tile.warps - 1) * down * across  # a tile's pointer: all threads ask for the same 4 bytes
        read = session.stats["sparse_matmul_kernel"].load_bytes - of_x - same
        size = out * columns // 8 + values
        assert size <= read <= 1.15 * size, (transposed, read / size)


def test_lists_are_read_once(emulator, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 8 tokens and a tenth kept: what lies anywhere in memory and is looked at, beside x, is at most 1.15 times the
    bits and the kept values. Lanes past a run's end look at what their neighbours read anyway.
    """
    out, columns = 64, 1024
    layer = SparseLinear.from_dense(torch.randn(out, columns).bfloat16(), None, torch.rand(out, columns) < 0.1)
    lists = [layer.weight.detach(), layer.offsets, layer.pointers]
    seen: list[set[int]] = [set(), set(), set()]
    check = emulator.block.Block.check

    def noting(block, address, size, mask, space, instruction) -> None:
        places = (address if mask is None else address[mask]).ravel()
        for tensor, found in zip(lists, seen, strict=True):
            begin, _ = block.memory.places[tensor.untyped_storage().data_ptr()]
            found.update(int(a) for a in places if space == "global" and begin <= a < begin + tensor.nbytes)
        check(block, address, size, mask, space, instruction)

    monkeypatch.setattr(emulator.block.Block, "check", noting)
    with emulator.emulate(arch) as session:
        sparse_matmul.sparse_forward(torch.randn(8, columns).bfloat16(), *lists, None, out)
    assert session.stats["listed_matmul_kernel"].launches == 1
    assert [len(found) for found in seen] == [tensor.numel() for tensor in lists]
    assert sum(tensor.nbytes for tensor in lists) <= 1.15 * (out * columns // 8 + lists[0].nbytes)


def test_lists_take_few_tokens_of_few_weights() -> None:
    weights = 100 * 128
    assert choice.listed_matmul(8, 1600, weights)
    assert not choice.listed_matmul(8, 1601, weights)
    assert choice.listed_matmul(1, 12800, weights)
    assert not choice.listed_matmul(9, 0, weights)


def test_sums_are_few_beside_the_weights_of_a_large_layer() -> None:
    """8 tokens, 4096 x 4096, nine tenths pruned: with y's sums, written and read, 1.15 of the format's size."""
    side, tokens = 4096, 8
    kept, size = side * side // 10, side * side // 8 + 2 * (side * side // 10)
    for name in targets.TARGETS:
        tile, lists = tables.SPARSE_MATMUL[name]["half"][0][1], tables.LISTED_MATMUL
        forms = {
            "tiles": (tile.rows, tile.depth, size + 4 * side * side // (tile.rows * tile.depth)),
            "lists": (lists.rows, lists.chunks * CHUNK, 3 * kept + 4 * side * side // CHUNK),
        }
        for form, (rows, depth, read) in forms.items():
            splits = -(-side // (depth * choice.steps_per_split(name, side // rows, side, depth)))
            sums = 2 * 4 * tokens * side * splits if splits > 1 else 0
            assert read + sums <= 1.15 * size, (name, form, splits)


def test_a_layer_runs_it_and_its_gradients(emulator, arch: int) -> None:
    x, gy, layer = Problem(37, 150, 8, "float32").tensors()
    x, dense, bias = x.view(1, 8, 150).requires_grad_(), layer.to_dense().double(), layer.bias.detach().double()
    with emulator.emulate(arch) as session:
        layer(x).backward(gy.view(1, 8, 37))
        with torch.no_grad():
            y = layer(x)
    assert session.stats["sparse_matmul_kernel"].launches == 3
    assert session.stats["words_kernel"].launches == 1
    torch.testing.assert_close(y[0].double(), x.detach()[0].double() @ dense.T + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad[0].double(), gy.double() @ dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, gy.sum(0))


def test_new_places_have_new_words(emulator, arch: int) -> None:
    """Also where another state dict is copied into the same tensors."""
    first, second = (Problem(5, 40, 1, "float32").tensors()[2] for _ in range(2))
    moved = 39 - second.offsets.flip(0)  # the same number of weights elsewhere
    kept = torch.zeros(5, 40, dtype=torch.bool)
    kept[(second.lists.places()[0], 39 - second.lists.places()[1])] = True
    second = SparseLinear.from_dense(torch.randn(5, 40), None, kept)
    assert moved.shape == second.offsets.shape
    first.bias = None
    with emulator.emulate(arch):
        before = sparse_matmul.expanded(*first.lists[:3], (5, 40), torch.float32)
        first.load_state_dict(second.state_dict())
        after = sparse_matmul.expanded(*first.lists[:3], (5, 40), torch.float32)
    assert not torch.equal(before != 0, after != 0)
    assert torch.equal(after, second.to_dense())


def test_other_dtypes_are_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    from pst_kernels import notices

    notices.say_once.cache_clear()
    layer = SparseLinear.from_dense(torch.eye(4, dtype=torch.float64), None)
    for _ in range(2):
        x = torch.randn(3, 4, dtype=torch.float64)
        assert torch.equal(layer(x), x)
    assert [record.message for record in caplog.records if "as a dense layer" in record.message][1:] == []
    assert "torch.float64 on cpu as a dense layer" in caplog.text


def test_opcheck(emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")
    x, gy, layer = Problem(12, 140, 3).tensors()
    lists, tests = (layer.weight.detach(), layer.offsets, layer.pointers), ("test_schema", "test_faketensor")
    with emulator.emulate(90):
        torch.library.opcheck(ops.sparse_forward, (x, *lists, layer.bias.detach(), 12), test_utils=tests)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(ops.sparse_backward, (gy, x, *lists, 140, *needs), test_utils=tests)
