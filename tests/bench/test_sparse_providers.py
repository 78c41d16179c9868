"""The providers of structured sparsity: checked like all others, and run when they are asked for."""

import dataclasses

import pytest
import torch
from torch import nn

import pst_kernels as pst
from bench import __main__ as command
from bench.baselines.torch_bsr import TorchBSR
from bench.speed import cases, ceilings, check, measure, modes, run, sparse_providers
from bench.speed.providers import DENSE, all_providers
from bench.tables import rows as results

PROVIDERS = {provider.name: provider for provider in sparse_providers.sparse_providers()}
USUAL = [provider.name for provider in all_providers("cpu")]
BLOCKS, GROUPS, MERGED, BSR = PROVIDERS
WHOLE, RAGGED = cases.Shape("whole", 256, 320), cases.Shape("ragged", 150, 200)


def case(mode, shape=WHOLE):
    return cases.Case(mode, shape, 0 if mode == "mask" else 12, torch.float32)


def test_the_names():
    assert list(PROVIDERS) == ["PST block:64", "PST 2:4", "PST block:64, merged", "torch BSR, block:64"]
    assert [provider.steps for provider in PROVIDERS.values()] == [16, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in PROVIDERS
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        if (name, dtype) != (BSR, torch.bfloat16)  # torch's BSR product on a CPU has none
    ],
)
def test_every_provider_passes_its_check(name, dtype):
    shapes = (WHOLE,) if name == BSR else (WHOLE, RAGGED)  # torch takes whole blocks alone
    for shape in shapes:
        assert check.check_layer(PROVIDERS[name], shape, dtype, "cpu") == check.OK


def test_a_matrix_that_is_checked_in_part_is_cut_between_blocks():
    shape = cases.BY_NAME["BERT-base up"]
    assert shape.numel > check.MOST_WEIGHTS
    assert check.check_layer(PROVIDERS[BSR], shape, torch.float32, "cpu") == check.OK


@pytest.mark.parametrize("name", [BLOCKS, GROUPS])
def test_a_whole_model_and_steps_are_checked(name):
    assert run._check_model(PROVIDERS[name], "cpu") == check.OK
    assert check.check_steps(PROVIDERS[name], lambda layer: modes.adamw(layer, "default"), "cpu") == check.OK


def wrong(name, **changes):
    return dataclasses.replace(PROVIDERS[name], **changes)


def layer_of(name, break_it):
    def layer(linear):
        made = PROVIDERS[name].layer(linear)
        break_it(made)
        return made

    return layer


def scale_output(layer):
    layer.register_forward_hook(lambda module, inputs, output: 1.01 * output)


def test_a_broken_provider_is_told():
    for name in PROVIDERS:
        found = check.check_layer(wrong(name, layer=layer_of(name, scale_output)), WHOLE, torch.float32, "cpu")
        assert found.startswith("y is off by 1.0e-02"), name
    unlike = lambda layer: layer.mask.roll(64, 1)  # noqa: E731
    found = check.check_layer(wrong(BLOCKS, mask=unlike), WHOLE, torch.float32, "cpu")
    assert "differs from that of a stable sort" in found
    found = check.check_layer(wrong(GROUPS, mask=lambda layer: layer.mask | True), WHOLE, torch.float32, "cpu")
    assert found == f"the mask prunes 0 weights instead of {256 * 320 // 2}"
    no_magnitude = pst.PSTConfig(pattern="block:64", sparsity=0.9, through_magnitude=False)
    other = wrong(BLOCKS, layer=lambda linear: pst.PSTLinear.from_linear(linear, no_magnitude))
    assert check.check_layer(other, WHOLE, torch.float32, "cpu").startswith("the gradient of pst_U is off")


def test_a_mask_that_is_never_made_again_is_told():
    config = pst.PSTConfig(pattern="block:64", sparsity=0.9, mask_interval=10_000)
    never = wrong(BLOCKS, layer=lambda linear: pst.PSTLinear.from_linear(linear, config))
    found = check.check_steps(never, lambda layer: modes.adamw(layer, "default"), "cpu")
    assert "after steps of AdamW (fused=None) the mask is stale at" in found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "backward", "step", "mask"])
def test_rows_of_a_case(mode):
    everyone = [*all_providers("cpu"), *PROVIDERS.values()]
    options = run.Options(seconds=0.0, min_rounds=2, adamw="default", providers=everyone, say=pytest.fail)
    rows = {row.provider: row for row in run.run_case(case(mode), options)}
    expected = {
        "forward": [*USUAL, *PROVIDERS],
        "mask": [n for n in [*USUAL, BLOCKS, GROUPS] if n not in (DENSE, "LoRA")],
    }
    assert list(rows) == expected.get(mode, [*USUAL, BLOCKS, GROUPS])
    assert all(row.check == check.OK and row.ratio > 0 for row in rows.values())
    if mode == "forward":  # the stored blocks, their indices and the bias: a tenth of the weight
        kept = 20 - int(20 * 0.9)
        assert rows[MERGED].parameter_bytes == 4 * (kept * 64 * 64 + 256) + 8 * (5 + kept)


def test_a_step_of_blocks_is_the_mean_over_an_interval():
    task = modes.layer_task(PROVIDERS[BLOCKS], case("step"), "cpu", "default")
    made = []
    task.module.register_forward_hook(lambda module, inputs, output: made.append(1))
    seconds = iter([0.0, 32.0])
    task.run()
    assert len(made) == task.steps == 16
    assert modes.layer_task(PROVIDERS[GROUPS], case("step"), "cpu", "default").steps == 1
    assert modes.layer_task(PROVIDERS[BLOCKS], case("forward"), "cpu", "default").steps == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.time, "perf_counter", lambda: next(seconds))
        assert measure.timer(lambda: None, None, "cpu", 16)() == 2.0


def test_a_mask_case_makes_a_new_mask_each_time():
    """Blocks keep theirs for 16 steps: without force nothing would be timed."""
    task = modes.layer_task(PROVIDERS[BLOCKS], case("mask"), "cpu", "default")
    layer = task.module
    layer.pst_mask.zero_()
    task.run()
    assert int(layer.mask.sum()) == 2 * 64 * 64


@pytest.mark.slow
def test_they_run_when_asked_for_and_not_in_the_quick_benchmark(monkeypatch, tmp_path):
    def names(**settings):
        return [provider.name for provider in run.Options(**settings).providers]

    assert names() == USUAL
    assert names(everyone=True) == [*USUAL, *PROVIDERS]
    assert names(only=[BLOCKS]) == [DENSE, BLOCKS]
    assert names(only=["LoRA"], everyone=True) == [DENSE, "LoRA"]
    with pytest.raises(ValueError, match=r"PST block:32: not known; there are dense, .*PST block:64, PST 2:4, .*BSR"):
        run.Options(only=["PST block:32"])

    limits = ceilings.Ceilings(dict.fromkeys(cases.DTYPES, 1e11), 1e10)
    monkeypatch.setattr(ceilings, "measured", lambda *_: limits)
    for kind in ("quick", "full"):
        monkeypatch.setattr(cases, kind, lambda *_: [case("forward")])
    arguments = ["--seconds", "0.1", "--output", str(tmp_path)]
    found = {}
    for name, more in {"quick": ["--quick"], "full": [], "asked": ["--quick", "--providers", BSR]}.items():
        assert command.main([*arguments, *more]) == 0
        found[name] = [row.provider for row in results.read_csv(tmp_path / results.CSV_NAME)]
        (tmp_path / results.CSV_NAME).unlink()
    assert found == {"quick": USUAL, "full": [*USUAL, *PROVIDERS], "asked": [DENSE, BSR]}


def test_torchs_product_is_of_the_same_blocks():
    base = nn.Linear(320, 256)
    ours, torchs = PROVIDERS[MERGED].layer(base), PROVIDERS[BSR].layer(base)
    assert type(torchs) is TorchBSR
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    assert torch.equal(torchs.to_dense() != 0, pst.PSTLinear.from_linear(base, pst.PSTConfig(pattern="block:64")).mask)
    x = torch.randn(2, 5, 320)
    torch.testing.assert_close(torchs(x), nn.functional.linear(x, ours.to_dense(), base.bias))
    with pytest.raises(ValueError, match="no part in mode model"):
        PROVIDERS[BSR].model(nn.Linear(2, 2))
