"""The compiled code that makes the masks of a whole table, executed by the PTX emulator, against a layer at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from dyadic import exact_scores, guess_at, problem
from emulator import Session

kernels = pytest.importorskip("pst_kernels.triton", reason="triton is not installed")
select = pytest.importorskip("pst_kernels.triton.select")

from group_problem import alone, assert_same, layer_of, poisoned, rounding, strided, transposed  # noqa: E402

from pst_kernels import reference  # noqa: E402
from pst_kernels.masks import packing  # noqa: E402
from pst_kernels.operands import Factors, Scales  # noqa: E402
from pst_kernels.triton import group_row, sweep  # noqa: E402
from pst_kernels.triton.group_layer import LayerTensors  # noqa: E402
from pst_kernels.triton.group_mask import prune_masks  # noqa: E402
from pst_kernels.triton.group_table import MaskTable  # noqa: E402
from pst_kernels.triton.tools import machine_code  # noqa: E402

SCALES = (0.5, -2.0, 1.5)
TIGHT = (97 * 33, 97 * 35)  # numbers of weights of which only 512 can be collected


@contextlib.contextmanager
def emulated(emulator, table: MaskTable, arch: int, order: str = "forward") -> Iterator[Session]:
    with contextlib.ExitStack() as stack:
        for group in table.groups:
            tensors = [tensor for layer in group.members for tensor in layer.tensors]
            stack.enter_context(emulator.behind(group.rows, tensors))
        yield stack.enter_context(emulator.emulate(arch, order))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs for each layer that is searched, several bands, and little room for candidates."""
    monkeypatch.setattr(sweep, "programs_wanted", lambda device: 3)
    monkeypatch.setattr(sweep, "MOST_ROWS", 32)
    room = select.capacity_of
    monkeypatch.setattr(select, "capacity_of", lambda numel: 512 if numel in TIGHT else room(numel))


def routes(table: MaskTable) -> list[tuple[int, str]]:
    """By number of weights."""
    return [
        (layer.weight.numel(), select.route(state))
        for group in table.groups
        for layer, state in zip(group.members, group.state, strict=True)
    ]


def layers_of_all_routes() -> list[LayerTensors]:
    """Of one kind."""
    hit, missed, overflowed, sampled = (problem(*shape, 1) for shape in ((97, 33), (97, 33), (97, 35), (64, 289)))
    at = {name: guess_at(exact_scores(t), 1100, 0.02) for name, t in (("hit", hit), ("missed", missed))}
    at["missed"][0] += 9.0
    wide = guess_at(exact_scores(overflowed), 1500, 0.025)
    wide[1] *= 100.0
    ties = problem(97, 33, 1)
    for factor in ties[1:]:
        factor.zero_()
    ties[0] = torch.full_like(ties[0], 0.5)
    few = problem(97, 35, 1)  # ties of three values, more of each than can be collected
    for factor in few[1:]:
        factor.zero_()
    few[0] = torch.randint(1, 4, (97, 35)).to(few[0].dtype)
    return [
        layer_of(hit, 1100, at["hit"]),
        layer_of(missed, 1100, at["missed"]),
        layer_of(sampled, 9000),
        layer_of(problem(33, 65, 1), 700, scales=SCALES),
        layer_of(overflowed, 1500, wide),
        layer_of(problem(97, 33, 1), 0, at["hit"]),
        layer_of(ties, 1700, torch.tensor([0.5, 0.1, 0.5, 0.01])),
        layer_of(few, 1234, torch.tensor([torch.inf, 0.1, 0.5, 0.01])),
        layer_of(problem(97, 35, 1), 97 * 35, torch.tensor([1.0, 0.1, 0.99, 0.01])),
        layer_of(problem(1, 1, 1), 1),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_every_route_in_any_order_of_programs(emulator, small: None, arch: int) -> None:
    layers = layers_of_all_routes()
    with emulator.emulate(arch):
        want = [alone(layer) for layer in layers]
    for layer, other in zip(layers, want, strict=True):
        if layer.scales == (1.0, 1.0, 1.0):
            exact = exact_scores([layer.weight, *layer.factors])
            assert torch.equal(other.mask, packing.pack_mask(reference.prune_mask(exact, int(layer.num_pruned))))
    for order in ("reversed", "shuffled"):  # the layouts below take the programs in order
        given = [poisoned(layer) for layer in layers]
        table = MaskTable(given)
        with emulated(emulator, table, arch, order) as session:
            prune_masks(table)
        assert len(table.groups) == 1
        assert {
            (97 * 33, "guess"),
            (97 * 33, "radix"),
            (97 * 35, "radix"),
            (64 * 289, "sample"),
            (1, "everything"),
        } <= {*routes(table)}
        assert session.stats["group_gather_kernel"].launches == 1
        for layer, other in zip(given, want, strict=True):
            assert_same(layer, other)


KINDS = {
    "aligned": (80, lambda: [problem(48, 64, 8), problem(33, 528, 8)], torch.bfloat16),
    "one of each": (90, lambda: [problem(40, 70, 5), transposed(problem(40, 70, 5))], torch.float32),
    "transposed": (90, lambda: [transposed(problem(48, 64, 8)), transposed(problem(80, 32, 8))], torch.bfloat16),
    "strided": (80, lambda: [strided(problem(40, 33, 5, torch.float16)), problem(9, 33, 5, torch.float16)], None),
    "rank 19": (80, lambda: [problem(40, 70, 19, factor=torch.bfloat16) for _ in range(2)], torch.float16),
    "rounding": (90, lambda: [rounding(40, 70, 8), rounding(70, 40, 8)], torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_layouts(emulator, small: None, kind: str) -> None:
    arch, make, masked = KINDS[kind]
    first, second = make()
    given = [
        layer_of(first, first[0].numel() // 3, masked=masked, scales=SCALES),
        layer_of(second, second[0].numel() // 2),
    ]
    with emulator.emulate(arch):
        want = [alone(layer) for layer in given]
    table = MaskTable(given)
    with emulated(emulator, table, arch):
        prune_masks(table)
    assert len(table.groups) == (2 if kind in ("one of each", "strided") else 1)
    for layer, other in zip(given, want, strict=True):
        assert_same(layer, other)


@pytest.mark.parametrize("fault", ["N_I", "N_J", "CAPACITY"])
def test_one_more_is_noticed(emulator, small: None, fault: str) -> None:
    """What lies behind a table lies between red zones. A guess that is too wide fills the room for candidates."""
    table = MaskTable([layer_of(problem(97, 33, 1), 1100, torch.tensor([0.5, 1e3, 1100 / 3201, 0.01]))])
    table.groups[0].rows[0, getattr(group_row, fault).value] += 1
    outside = r"outside (every tensor|memory) in group_gather_kernel"
    with emulated(emulator, table, 80), pytest.raises(emulator.MemoryFault, match=outside):
        prune_masks(table)


def bytes_of(session: Session) -> int:
    return sum(stats.load_bytes + stats.store_bytes for stats in session.stats.values())


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 16])
def test_bytes_per_weight(emulator, monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Of bf16 weights with fp32 factors of rank 8 + 8, every lane's load counted: no more than a layer at a time."""
    monkeypatch.setattr(sweep, "programs_wanted", lambda device: programs)
    rows, columns = 128, 512
    layers, numel = [], 2 * rows * columns
    for _ in range(2):
        tensors = problem(rows, columns, 8)
        tensors[0] = (torch.randn(rows, columns) * 0.05).bfloat16()
        guess = guess_at(exact_scores(tensors), numel // 4, 0.001)
        layers.append(layer_of(tensors, numel // 4, guess, masked=torch.bfloat16))
    with emulator.emulate(90) as session:
        want = [alone(layer) for layer in layers]
    a_layer_at_a_time = bytes_of(session) / numel
    table = MaskTable(layers)
    with emulated(emulator, table, 90) as session:
        prune_masks(table)
    print(programs, "programs wanted:", bytes_of(session) / numel, "B a weight; a layer at a time", a_layer_at_a_time)
    assert [route for _, route in routes(table)] == ["guess"] * 2
    assert bytes_of(session) / numel <= a_layer_at_a_time
    for layer, other in zip(layers, want, strict=True):
        assert_same(layer, other)


@pytest.mark.parametrize("layers", [24, 96])
def test_launches_do_not_grow_with_layers(layers: int) -> None:
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    given = []
    for n in range(layers):
        weight, *factors = (torch.empty_like(t, device="meta") for t in problem(*shapes[n % 6], 8))
        mask = torch.empty((weight.shape[0], weight.shape[1] // 32), dtype=torch.int32, device="meta")
        pruned, guess = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(4, device="meta")
        masked = torch.empty_like(weight) if n % 2 else None
        given.append(LayerTensors(weight, Factors(*factors), Scales(), pruned, guess, mask, masked))
    table = MaskTable(given)
    with machine_code.recorded(machine_code.gpu_target("sm_90")) as launches:
        prune_masks(table)
    assert [kernel.__name__ for kernel, *_ in launches] == [
        "group_bracket_kernel", "group_gather_kernel", "group_refine_kernel", *["group_radix_kernel"] * 4,
        "group_collect_kernel", "group_mask_kernel",
    ]  # fmt: skip
    assert table.matches(given)
