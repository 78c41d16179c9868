"""The compiled code of scores, threshold, mask and masked weight, executed by the PTX emulator."""

from __future__ import annotations

import pytest
import torch
from dyadic import exact_scores, guess_at, no_guess, problem
from oracle import grouped, masked_weight

from pst_kernels import cpu, reference
from pst_kernels.masks import packing

kernels = pytest.importorskip("pst_kernels.triton", reason="triton is not installed")
mask_module = pytest.importorskip("pst_kernels.triton.mask")
select = pytest.importorskip("pst_kernels.triton.select")

SCALES = (1.0, 1.0, 1.0)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masks_equal_the_fallback_bit_for_bit(emulator, arch: int, dtype: torch.dtype) -> None:
    tensors = problem(65, 129, 8, dtype)
    num_pruned = torch.tensor(5000)
    with emulator.emulate(arch):
        mask = kernels.prune_mask(*grouped(tensors, SCALES), num_pruned, no_guess())
        masked = kernels.masked_weight(masked_weight(tensors, mask), torch.float32)
        scores = kernels.scores(*grouped(tensors, SCALES))
    assert torch.equal(mask, cpu.prune_mask(*grouped(tensors, SCALES), num_pruned, no_guess()))
    assert int((~packing.unpack_mask(mask, 129)).sum()) == 5000
    assert torch.equal(scores.double(), exact_scores(tensors))
    assert torch.equal(masked, cpu.masked_weight(masked_weight(tensors, mask), torch.float32))


@pytest.mark.parametrize("kind", ["transposed", "rank 5", "rank 19", "rank 40", "bf16 factors"])
def test_other_layouts(emulator, kind: str) -> None:
    rank = int(kind.split()[1]) if kind.startswith("rank") else 8
    tensors = problem(40, 70, rank, factor=torch.bfloat16 if kind == "bf16 factors" else torch.float32)
    if kind == "transposed":
        tensors[0] = tensors[0].T.contiguous().T
    with emulator.emulate(90):
        mask = kernels.prune_mask(*grouped(tensors, SCALES), torch.tensor(1500), no_guess())
        masked = kernels.masked_weight(masked_weight(tensors, mask), torch.float32)
    assert torch.equal(mask, cpu.prune_mask(*grouped(tensors, SCALES), torch.tensor(1500), no_guess()))
    assert torch.equal(masked, cpu.masked_weight(masked_weight(tensors, mask), torch.float32))


@pytest.mark.parametrize(("route", "arch"), [("guess", 80), ("sample", 90), ("radix", 80), ("ties", 80)])
def test_routes_in_any_order_of_blocks(emulator, many_programs, monkeypatch, route: str, arch: int) -> None:
    if route == "sample":
        tensors, k = problem(64, 288, 1), 9000  # just more than there is room to collect
    else:
        monkeypatch.setattr(select, "capacity_of", lambda numel: 512)
        tensors, k = problem(24, 96, 1), 1100
    if route == "ties":
        for factor in tensors[1:]:
            factor.zero_()
        tensors[0] = torch.full_like(tensors[0], 0.5)
    scores = exact_scores(tensors)
    start = guess_at(scores, k, 0.02) if route == "guess" else no_guess()
    if route in ("radix", "ties"):  # above all scores, or on all of them
        start = torch.tensor([9.0 if route == "radix" else 0.5, 0.1, k / scores.numel(), 0.01])
    results = []
    for order in ("forward", "reversed", "shuffled"):
        guess = start.clone()
        with emulator.emulate(arch, order):
            state = select.threshold(*grouped(tensors, SCALES), torch.tensor(k), guess)
            mask = mask_module.mask_from(state, *grouped(tensors, SCALES))
        assert select.route(state) == {"ties": "radix"}.get(route, route)
        results.append((state[select.KEY.value], state[select.INDEX.value], guess, mask))
    assert torch.equal(results[0][3], packing.pack_mask(reference.prune_mask(scores, k)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_mask_and_masked_weight_in_one_pass(emulator, dtype: torch.dtype) -> None:
    tensors = problem(33, 70, 8, dtype)
    masked = torch.full((33, 70), torch.nan, dtype=dtype)
    with emulator.emulate(90):
        state = select.threshold(*grouped(tensors, SCALES), torch.tensor(1100), no_guess())
        mask = mask_module.mask_from(state, *grouped(tensors, SCALES), masked=masked)
    assert torch.equal(mask, cpu.prune_mask(*grouped(tensors, SCALES), torch.tensor(1100), no_guess()))
    assert torch.equal(masked, cpu.masked_weight(masked_weight(tensors, mask), dtype))


@pytest.mark.parametrize("arch", [90])
def test_kth_value(emulator, arch: int) -> None:
    scores = torch.randn(3000)
    scores[::7], scores[1::11], scores[2::13] = 0.5, torch.nan, -0.0
    order = torch.argsort(scores, stable=True)
    for k in (1, 1800, 2990):
        with emulator.emulate(arch):
            _, index = kernels.kth_value(scores, k)
        assert index.item() == order[k - 1].item()


@pytest.mark.slow
def test_bytes_per_weight(emulator) -> None:
    """512 x 1024 in bf16 with fp32 factors of rank 8 + 8, every lane's load counted: about one read of W each, and the
    left factors once for 512 columns.
    """
    tensors = problem(512, 1024, 8)
    tensors[0] = (torch.randn(512, 1024) * 0.05).bfloat16()
    numel, k = tensors[0].numel(), 262144
    scores = exact_scores(tensors)
    with emulator.emulate(90) as session:
        state = select.threshold(*grouped(tensors, SCALES), torch.tensor(k), guess_at(scores, k, 0.001))
    assert select.route(state) == "guess"
    assert int(state[select.INDEX.value]) == torch.argsort(scores.flatten(), stable=True)[k - 1]
    assert sum(s.load_bytes + s.store_bytes for s in session.stats.values()) / numel <= 2.5
    masked = torch.full((512, 1024), torch.nan, dtype=torch.bfloat16)
    with emulator.emulate(90) as session:
        mask = mask_module.mask_from(state, *grouped(tensors, SCALES), masked=masked)
    assert sum(s.load_bytes + s.store_bytes for s in session.stats.values()) / numel <= 4.5
    assert torch.equal(mask, packing.pack_mask(reference.prune_mask(scores, k)))
    with emulator.emulate(90) as session:
        again = kernels.masked_weight(masked_weight(tensors, mask), torch.bfloat16)
    assert sum(s.load_bytes + s.store_bytes for s in session.stats.values()) / numel <= 4.3
    assert torch.equal(again, masked)
