"""The benchmark itself: its baselines, its checks, what it measures, and what it writes."""

import argparse
import dataclasses
import math
import shutil
import subprocess

import pytest
import torch
from torch import nn

from bench import __main__ as command
from bench.baselines import LoRA, ReleasedPST
from bench.speed import cases, ceilings, check, compare, measure, modes, roofline, run
from bench.speed.providers import DENSE, RELEASED, Provider, all_providers
from bench.tables import rows as results
from bench.tables import table
from pst_kernels import cpu, env, reference
from pst_kernels.layers import kept as kept_weights

SMALL = cases.Shape("small", 56, 40)
PROVIDERS = {provider.name: provider for provider in all_providers("cpu")}
OURS = next(name for name, provider in PROVIDERS.items() if provider.ours)


def small_case(mode="step", dtype=torch.float32):
    return cases.Case(mode, SMALL, 0 if mode in ("mask", "threshold") else 12, dtype)


def options(*providers, **settings):
    settings = {"seconds": 0.0, "min_rounds": 2, "adamw": "default", "say": lambda message: None} | settings
    return run.Options(providers=list(providers or PROVIDERS.values()), **settings)


# Baselines and providers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_passes_its_check(name, dtype):
    for shape in (SMALL, cases.Shape("odd", 33, 129)):
        assert check.check_layer(PROVIDERS[name], shape, dtype, "cpu") == check.OK


def test_lora_starts_as_the_frozen_layer_and_trains_two_factors():
    linear = nn.Linear(40, 56)
    layer = LoRA.from_linear(linear, rank=4)
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), linear(x))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_released_pst_has_the_gradients_of_the_formulas():
    """Against the closed form, not autograd: D = G * W', Q = G * (M + |W'|)."""
    torch.manual_seed(0)
    layer = ReleasedPST.from_linear(nn.Linear(40, 56).double(), sparsity=0.5, beta=0.5, alpha1=2.0, alpha2=3.0)
    check.fill(layer)
    x, gy = torch.randn(9, 40, dtype=torch.float64), torch.randn(9, 56, dtype=torch.float64)
    mask = layer.mask().double()
    layer(x).backward(gy)
    U, V, A, B, R, C = (factor.detach() for factor in layer.factors)
    updated = layer.weight.detach() + 0.5 * U @ V
    G = gy.T @ x
    D, Q = G * updated, G * (mask + updated.abs())
    expected = [0.5 * Q @ V.T, 0.5 * U.T @ Q, 2.0 * D @ B.T, 2.0 * A.T @ D, 3.0 * D.sum(1), 3.0 * D.sum(0)]
    names = ["weight_U", "weight_V", "mask_scores_A", "mask_scores_B", "mask_scores_R", "mask_scores_C"]
    for name, gradient in zip(names, expected, strict=True):
        got = getattr(layer, name).grad.view(gradient.shape)
        torch.testing.assert_close(got, gradient, rtol=1e-12, atol=1e-12)
    assert int((mask == 0).sum()) == 56 * 40 // 2
    exact = reference.scores(layer.weight, U, V, A, B, R, C, beta=0.5, alpha1=2.0, alpha2=3.0)
    torch.testing.assert_close(layer.exact_scores(), exact)
    assert exact[mask == 0].max() <= exact[mask == 1].min()


@pytest.fixture
def as_if_large(monkeypatch):
    """A small layer keeps M * W', whose making would take longer than its product."""
    monkeypatch.setattr(kept_weights, "CPU_WEIGHTS", 0)


@pytest.mark.usefixtures("as_if_large")
def test_released_pst_keeps_three_copies_and_ours_one_bit_a_weight():
    kept = {}
    for name in (RELEASED, OURS):
        task = modes.layer_task(PROVIDERS[name], small_case(), "cpu", "default")
        kept[name] = measure.kept_bytes(task.forward, task.known())
    assert kept[OURS] == 4 * 56 * 2  # packed: two words of 32 columns a row
    assert kept[RELEASED] >= 3 * 4 * SMALL.numel


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_whole_model_is_converted_and_checked(name):
    assert run._check_model(PROVIDERS[name], "cpu") == check.OK
    model = PROVIDERS[name].model(modes.minilm("cpu", layers=2, vocabulary=50))
    kind = PROVIDERS[name].layer_type
    assert sum(isinstance(m, kind) for m in model.modules()) == 12 + (2 if name == DENSE else 0)  # pooler, classifier
    assert model.classifier.weight.requires_grad
    assert model.bert.embeddings.word_embeddings.weight.requires_grad == (name == DENSE)


def test_a_provider_runs_on_its_own_backend(monkeypatch):
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    seen = []
    task = modes.Task(lambda: seen.append(env.backend()), prepare=lambda: seen.append(env.backend()))
    inside = modes._under(PROVIDERS[OURS], task)
    inside.prepare()
    inside.run()
    assert seen == ["torch", "torch"]
    assert env.backend() == "triton"
    monkeypatch.delenv("PST_KERNELS_BACKEND")
    with PROVIDERS[OURS].active():
        assert env.backend() == "torch"
    assert env.backend() == "auto"


# The check fails when a provider is wrong


def broken(name, **changes) -> Provider:
    return dataclasses.replace(PROVIDERS[name], **changes)


def scaled_layer(name, factor):
    """The provider's layer with an output or a gradient off by `factor`."""

    def layer_of(linear):
        layer = PROVIDERS[name].layer(linear)
        layer.register_forward_hook(lambda module, inputs, output: output * factor)
        return layer

    return layer_of


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def wrong_gradient_layer(linear):
    layer = PROVIDERS[OURS].layer(linear)
    layer.register_forward_hook(lambda module, inputs, output: _WrongGradient.apply(output))
    return layer


def wrong_ties(layer):
    """Prunes among equal scores the higher index first."""
    scores = PROVIDERS[OURS].exact_scores(layer).detach()
    order = torch.argsort(-scores.flatten(), stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: scores.numel() - int(scores.numel() * 0.9)]] = True
    return mask.view(scores.shape)


BROKEN = {
    "output": (broken(OURS, layer=scaled_layer(OURS, 1.01)), "y is off by 1.0e-02"),
    "dense output": (broken(DENSE, layer=scaled_layer(DENSE, 1.01)), "y is off by 1.0e-02"),
    "gradient": (broken(OURS, layer=wrong_gradient_layer), "the gradient of x is off by 1.0e-02"),
    "nan": (broken(OURS, layer=scaled_layer(OURS, math.nan)), "y is off by nan"),
    "count": (broken(OURS, mask=lambda layer: layer.mask | True), "the mask prunes 0 weights instead of 2016"),
    "ties": (broken(OURS, mask=wrong_ties), "the mask differs from that of a stable sort at"),
    "order": (broken(RELEASED, mask=lambda layer: layer.mask().flip(0)), "a pruned score is"),
    "raises": (broken(OURS, layer=lambda linear: 1 / 0), "raised ZeroDivisionError"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_provider_is_told(what):
    provider, message = BROKEN[what]
    assert check.check_layer(provider, SMALL, torch.float32, "cpu").startswith(message)


@pytest.mark.slow
def test_a_broken_provider_gets_no_ratio():
    said = []
    provider = BROKEN["output"][0]
    rows = run.run_case(small_case(), options(PROVIDERS[DENSE], provider, PROVIDERS["LoRA"], say=said.append))
    by_name = {row.provider: row for row in rows}
    assert by_name[OURS].ratio is None
    assert by_name[OURS].check.startswith("y is off")
    assert by_name["LoRA"].ratio is not None
    assert len(said) == 1
    assert "no ratio is given" in said[0]
    assert table.REFUSED in table.markdown(rows)


def test_a_broken_reference_leaves_no_ratio_at_all():
    provider = BROKEN["dense output"][0]
    rows = run.run_case(small_case(), options(provider, PROVIDERS["LoRA"]))
    assert [row.ratio for row in rows] == [None, None]
    assert [row.check == check.OK for row in rows] == [False, True]


def test_a_step_that_skips_its_mask_refresh_is_told():
    """An optimizer may change factors so that a layer does not notice: then a step looks cheaper than it is."""

    class Silent(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.sub_(group["lr"] * p.grad)

    def silent(layer):
        return Silent([p for p in layer.parameters() if p.requires_grad], lr=1.0)

    never = broken(OURS, mask=lambda layer: torch.ones(64, 96, dtype=torch.bool))
    found = check.check_steps(never, silent, "cpu")
    assert "the mask is stale at" in found or "left the mask as it was" in found
    assert check.check_steps(PROVIDERS[OURS], lambda layer: modes.adamw(layer, "default"), "cpu") == check.OK
    assert check.check_steps(PROVIDERS[RELEASED], lambda layer: modes.adamw(layer, "fused"), "cpu") == check.OK


# Measuring


def test_quantiles():
    found = measure.quantiles([5.0, 1.0, math.nan, 3.0, 2.0, 4.0])
    assert dataclasses.astuple(found) == pytest.approx((1.8, 3.0, 4.2))
    assert math.isnan(measure.quantiles([math.nan]).median)


def test_ratios_are_of_the_same_round():
    """The machine gets slower and slower; a contestant that always takes twice as long has a ratio of just 2."""
    ours, dense = measure.Timing([2.0, 20.0, math.nan, 200.0]), measure.Timing([1.0, 10.0, 7.0, 100.0])
    ratio = ours.ratio_to(dense)
    assert (ratio.p20, ratio.median, ratio.p80) == (2.0, 2.0, 2.0)
    assert ours.rounds == 3


def test_rounds_are_interleaved_and_the_order_rotates():
    calls = []

    def contestant(name):
        return lambda: calls.append(name) or 0.0

    timings = measure.interleaved({n: contestant(n) for n in "abc"}, 0.0, min_rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(timing.seconds == [0.0, 0.0, 0.0] for timing in timings.values())


@pytest.mark.slow
def test_a_slow_contestant_rests_but_the_reference_does_not():
    timers = {"slow": lambda: 10.0, "fast": lambda: 0.1}
    timings = measure.interleaved(timers, 1.0, min_rounds=4, max_rounds=4, warmup=0)
    assert (timings["slow"].rounds, timings["fast"].rounds) == (1, 4)
    timings = measure.interleaved(timers, 1.0, reference="slow", min_rounds=4, max_rounds=4, warmup=0)
    assert (timings["slow"].rounds, timings["fast"].rounds) == (4, 4)


def test_kept_bytes_count_each_storage_once_and_not_what_is_known():
    x, w = torch.randn(100, 50, requires_grad=True), torch.randn(50, 50, requires_grad=True)
    assert measure.kept_bytes(lambda: x @ w, []) == 4 * (5000 + 2500)
    assert measure.kept_bytes(lambda: x @ w, [x, w]) == 0
    assert measure.kept_bytes(lambda: (x @ w).exp().sin(), [x, w]) == 4 * 5000  # exp's result, kept by both


def test_peak_bytes_count_what_lives_at_one_time():
    megabytes = 1 << 20

    def run_():
        a = torch.ones(megabytes, dtype=torch.uint8)
        b = torch.ones(2 * megabytes, dtype=torch.uint8)
        del a, b
        torch.ones(2 * megabytes, dtype=torch.uint8)

    assert measure.peak_bytes(run_, "cpu") == pytest.approx(3 * megabytes, rel=0.02)


def test_peak_bytes_count_numpy_and_buffers_that_a_thread_keeps(monkeypatch):
    monkeypatch.setattr(cpu.lists, "LEAST_PRUNED", 2.0)  # products are dense
    task = modes.layer_task(
        PROVIDERS[OURS], cases.Case("forward", cases.BY_NAME["BERT-base attention"], 8, torch.float32), "cpu", "default"
    )
    task.run()
    assert measure.peak_bytes(task.run, "cpu") >= 4 * 768 * 768  # the masked weight, made in a buffer that stays


def test_optimizer_bytes():
    linear = nn.Linear(30, 20, bias=False)
    optimizer = torch.optim.AdamW(linear.parameters())
    assert measure.optimizer_bytes(optimizer) == 0
    linear(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    assert measure.optimizer_bytes(optimizer) == 2 * 4 * 600 + 4  # two moments and a step counter


# Cases and runs


def test_a_machine_cuts_what_it_cannot_do():
    big = cases.Case("step", cases.BY_NAME["Llama-8B up"], 16384, torch.float32)
    speed = dict.fromkeys(cases.DTYPES, 1e11)
    assert "needs about" in cases.too_much(big, cases.Machine(1 << 30, speed, 1e9))
    assert "a dense step would take about 58 s, the limit is 4" in cases.too_much(
        big, cases.Machine(1 << 50, speed, 4.0)
    )
    assert cases.too_much(big, cases.Machine(1 << 50, speed, 60.0)) is None


def test_quick_is_part_of_the_full_grid():
    for device in ("cpu", "cuda"):
        assert set(cases.quick(device)) <= set(cases.full())
    assert set(cases.quick()) < set(cases.quick("cuda"))
    assert {case.mode for case in cases.quick()} == set(cases.MODES)


@pytest.mark.slow
@pytest.mark.usefixtures("as_if_large")
@pytest.mark.parametrize("mode", ["forward", "backward", "step", "mask", "threshold"])
def test_rows_of_a_case(mode):
    case = cases.Case(mode, SMALL, 0 if mode in ("mask", "threshold") else 12, torch.float32)
    rows = {row.provider: row for row in run.run_case(case, options())}
    if mode == "threshold":
        assert set(rows) == {modes.KTHVALUE, modes.PARTITION, RELEASED, modes.COLD, modes.WARM}
    else:
        assert set(rows) == ({RELEASED, OURS} if mode == "mask" else set(PROVIDERS))
    reference_name = {"mask": RELEASED, "threshold": modes.KTHVALUE}.get(mode, DENSE)
    for row in rows.values():
        assert row.check == check.OK
        assert row.rounds == 2 or row.provider != reference_name
        assert row.ratio_to == reference_name
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.p20_ms <= row.median_ms <= row.p80_ms
    assert rows[reference_name].ratio == 1.0
    if mode == "step":
        assert rows[DENSE].optimizer_bytes == 2 * 4 * (SMALL.numel + 56) + 8
        assert rows[OURS].trainable == 16 * (56 + 40) + 56 + 40
        assert rows[OURS].kept_bytes == 4 * 56 * 2
        assert rows[DENSE].kept_bytes == 0


def test_the_threshold_check_runs_the_real_thing(monkeypatch):
    case = small_case("threshold")
    task = modes.threshold_tasks(case, "cpu")[modes.COLD]
    monkeypatch.setattr(modes.functional, "kth_value", torch.kthvalue)  # right value, wrong index
    assert modes.check_threshold(modes.COLD, case, task, "cpu") != check.OK


def test_unknown_names_are_refused(capsys):
    with pytest.raises(ValueError, match=r"--providers PTS: not known; there are dense, LoRA"):
        run.Options(only=["PTS"])
    assert command.main(["--shapes", "Mamba"]) == 2
    assert "no case is left; shapes are BERT-base attention" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_csv_plots_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "quick", lambda device: [small_case("step"), small_case("mask")])
    limits = ceilings.Ceilings(dict.fromkeys(cases.DTYPES, 1e11), 1e10)
    monkeypatch.setattr(ceilings, "measured", lambda *_: limits)
    assert command.main(["--quick", "--adamw", "default", "--output", str(tmp_path)]) == 0
    rows = results.read_csv(tmp_path / results.CSV_NAME)
    assert len(rows) == len(PROVIDERS) + 2
    assert {path.name for path in tmp_path.glob("*.png")} == {"ratio_by_shape.png", "ratio_by_tokens.png", "memory.png"}
    assert "times in ms, ratio to dense in the same round" in capsys.readouterr().out


# Results


def row(**changes):
    row = results.Row(
        provider="PST (torch)", mode="step", shape="BERT-base up", out_features=3072, in_features=768, tokens=1024,
        dtype="float32", device="cpu", median_ms=12.5, p20_ms=12.0, p80_ms=13.0, rounds=9,
        ratio=0.95, ratio_p20=0.9, ratio_p80=1.0, ratio_to="dense", check="ok",
        kept_bytes=294912, peak_bytes=None, parameter_bytes=7, optimizer_bytes=9, trainable=65280, adamw="fused",
        machine="a CPU, 2 cores", threads=2, versions="torch 2.13.0", date="2026-11-24", commit="abcdef0",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def test_a_csv_reads_back_as_it_was_written(tmp_path):
    rows = [row(), row(provider="dense", ratio=1.0), row(ratio=None, ratio_p20=None, check="y is off, by 2", tokens=16)]
    results.write_csv(tmp_path / "a.csv", rows)
    assert results.read_csv(tmp_path / "a.csv") == rows


def test_a_csv_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("provider,mode\ndense,step\n")
    with pytest.raises(ValueError, match="run `python -m bench` again"):
        results.read_csv(path)
    with pytest.raises(FileNotFoundError, match="run `python -m bench` first"):
        results.read_csv(tmp_path / "b.csv")


def test_a_measurement_taken_again_replaces_the_old_one():
    old = [row(), row(tokens=16), row(machine="another", median_ms=1.0)]
    new = [row(median_ms=11.0, date="2026-11-25"), row(tokens=64)]
    assert results.merge(old, new) == [new[0], old[1], old[2], new[1]]


def test_the_readme_table_is_written_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    rows = [row(provider="dense", median_ms=13.0, ratio=1.0), row(), row(mode="mask"), row(provider="PST (torch) @ v1")]
    results.write_csv(tmp_path / "a.csv", rows)
    assert command.main(["table", "--csv", str(tmp_path / "a.csv"), "--readme", str(path)]) == 0
    text = path.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n| one training step")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "| BERT-base up 768 -> 3072, T = 1024, float32 | 13 (1.00) | 12.5 (0.95) |" in text
    assert "old" not in text
    assert "@ v1" not in text
    for part in ("a CPU, 2 cores", "cpu, 2 threads", "torch 2.13.0", "2026-11-24", "commit abcdef0", "fused"):
        assert part in text
    command.main(["table", "--csv", str(tmp_path / "a.csv"), "--readme", str(path)])
    assert path.read_text() == text


def test_a_readme_without_markers_is_refused(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(f"{table.END}{table.BEGIN}")
    results.write_csv(tmp_path / "a.csv", [row()])
    assert command.main(["table", "--csv", str(tmp_path / "a.csv"), "--readme", str(path)]) == 2
    assert "must hold <!-- bench:begin -->" in capsys.readouterr().err
    assert path.read_text() == f"{table.END}{table.BEGIN}"


# Another version beside this one


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("git") is None or subprocess.run(["git", "rev-parse", "HEAD"], cwd=results.ROOT).returncode != 0,
    reason="not a git checkout",
)
def test_another_version_runs_in_the_same_rounds(monkeypatch):
    monkeypatch.setenv("PST_KERNELS_CPU", "torch")  # that version's compiled passes would be compiled for this alone
    with compare.base_version("HEAD", "cpu") as base:
        rows = {row.provider: row for row in run.run_case(small_case("step"), options(base=base))}
        other = rows[f"{OURS} @ HEAD"]
        assert other.check == check.OK
        assert other.ratio > 0
        assert other.rounds == rows[DENSE].rounds
        assert other.commit == base.commit
        threshold = {row.provider for row in run.run_case(small_case("threshold"), options(base=base))}
        assert f"{modes.WARM} @ HEAD" in threshold
    with pytest.raises(ValueError, match="--base: git rev-parse"), compare.base_version("no-such-ref", "cpu"):
        pass


# Arithmetic for GPUs


def test_roofline_of_a_dense_step_by_hand():
    forward, dx, dw, adamw = roofline.dense_step(
        cases.Shape("square", 4096, 4096), 8192, 2, roofline.ADAMW["fp32 state"]
    )
    assert forward.operations == dx.operations == dw.operations == 2 * 8192 * 4096**2
    assert forward.nbytes == dw.nbytes == 2 * (2 * 8192 * 4096 + 4096**2)
    assert adamw.nbytes == 26 * 4096**2
    assert forward.floor(roofline.DEVICES["h100"]) == pytest.approx(0.42e-3, rel=0.02)  # 275 GFLOP at 650 TFLOP/s
    assert adamw.floor(roofline.DEVICES["h100"]) == pytest.approx(26 * 4096**2 / 3.35e12)
    assert (forward.bound(roofline.DEVICES["h100"]), adamw.bound(roofline.DEVICES["h100"])) == ("GEMM", "memory")


def test_roofline_of_a_pst_step():
    shape, tile = cases.Shape("square", 4096, 4096), roofline.Tile(128, 128)
    in_loop = {p.name: p for p in roofline.pst_step(shape, 256, 2, roofline.Tiles(tile, tile, tile, 1, 24, "test"))}
    scratch = {p.name: p for p in roofline.pst_step(shape, 256, 2, roofline.Tiles(None, None, tile, 2, 24, "test"))}
    numel, factors = 4096**2, 17 * 8192
    assert in_loop["threshold, warm"].nbytes == 2 * numel + 4 * factors
    assert in_loop["mask bits"].nbytes == 2.125 * numel + 4 * factors
    assert "masked weight for forward" not in in_loop
    assert scratch["masked weight for dx"].nbytes == 4.125 * numel
    assert in_loop["forward GEMM"].nbytes - scratch["forward GEMM"].nbytes == numel / 8
    # beta U V, as a product of width 24, for each of the two strips of 128 tokens
    assert in_loop["forward GEMM"].operations - scratch["forward GEMM"].operations == 2 * 2 * 24 * numel
    # 4096 x 256 and 256 x 4096 operands: a 32 x 2 grid reads the weight twice and x 32 times
    assert in_loop["forward GEMM"].cache_bytes == 2 * (numel + 31 * 256 * 4096) + numel / 8
    partial = 4 * 17 * (4096 * 32 + 4096 * 32)
    assert in_loop["G GEMM with factor gradients"].nbytes == 2 * (2 * 256 * 4096 + numel) + numel / 8 + partial
    assert scratch["reduce partial sums"].nbytes == 2 * partial + 4 * factors  # the tokens of a tile split in two
    stored_tiles = roofline.Tiles(None, None, tile, 1, 24, "test", g_stored=True)
    stored = {p.name: p for p in roofline.pst_step(shape, 256, 2, stored_tiles)}
    assert stored["G GEMM"].nbytes == 2 * (2 * 256 * 4096 + numel)
    assert stored["factor gradients from G"].nbytes == 4.125 * numel + partial  # G and W are read
    fused = in_loop["G GEMM with factor gradients"].operations
    assert stored["G GEMM"].operations + stored["factor gradients from G"].operations == fused


def test_roofline_takes_the_tiles_of_the_kernels():
    choice = pytest.importorskip("pst_kernels.triton.tiles.choice")
    if not hasattr(choice, "matmul"):
        pytest.skip("no table of tiles yet")
    shape = cases.BY_NAME["Llama-8B query"]
    for tokens in (16, 16384):
        found = roofline.shipped_tiles("sm_90", shape, tokens, torch.bfloat16)
        assert found.source == roofline.SHIPPED
        tile = choice.matmul("sm_90", torch.bfloat16, torch.bfloat16, tokens, 4096, 8)
        assert found.forward == (None if tile is None else (tile.rows, tile.columns))
        assert found.g_stored == (tokens >= 8192)


def test_roofline_is_labelled_and_stays_out_of_the_measured_file(tmp_path, capsys):
    arguments = ["roofline", "--device", "h100", "--tokens", "16", "8192", "--shapes", "Llama-8B query", "--output"]
    assert command.main([*arguments, str(tmp_path)]) == 0
    assert "Computed, not measured" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["roofline_h100.csv"]
    lines = (tmp_path / "roofline_h100.csv").read_text().splitlines()
    assert all(line.startswith("computed,NVIDIA H100 SXM,Llama-8B query,") for line in lines[1:])
    assert {line.split(",")[5] for line in lines[1:]} == {"16", "8192"}
    with pytest.raises(ValueError, match="expected"):
        results.read_csv(tmp_path / "roofline_h100.csv")


def test_profile_tells_products_apart():
    from bench.speed.profile import (
        COMPILED,
        ELEMENTWISE,
        G_GEMM,
        OTHER_GEMM,
        OUTSIDE,
        RANK_PRODUCTS,
        REDUCTIONS,
        kind_of,
    )

    case = cases.Case("step", cases.BY_NAME["BERT-base up"], 1024, torch.float32)
    for name, shapes, kind in (
        ("aten::addmm", [[3072], [1024, 768], [768, 3072]], OTHER_GEMM),
        ("aten::mm", [[1024, 3072], [3072, 768]], OTHER_GEMM),
        ("aten::mm", [[341, 1024], [1024, 768], [341, 768]], G_GEMM),
        ("aten::mm", [[1024, 1024], [1024, 768], [1024, 768]], G_GEMM),  # as many rows of G as tokens
        ("aten::addmm", [[341, 768], [341, 8], [8, 768], [], [], [341, 768]], RANK_PRODUCTS),
        ("aten::mm", [[341, 768], [768, 16], [341, 16]], REDUCTIONS),
        ("aten::addmm_", [[9, 768], [9, 341], [341, 768], [], []], REDUCTIONS),
        ("aten::mul", [[341, 768], [341, 768]], ELEMENTWISE),
        ("pst_kernels::prune_mask", [[3072, 768]], OUTSIDE),
        ("pst_kernels.cpu: prune", [], COMPILED),
    ):
        assert kind_of(name, shapes, case) == kind, name


def test_profile_adds_up():
    from bench.speed import profile

    case = cases.Case("step", SMALL, 12, torch.float32)
    for name in (DENSE, OURS):
        passes = profile.profile(PROVIDERS[name], case, "cpu", "default", 2)
        assert list(passes) == [p for p in profile.PASSES if name == OURS or p != "mask refresh"]
        assert all(value >= 0 for kinds in passes.values() for value in kinds.values())
    arguments = argparse.Namespace(
        shape="BERT-base attention", tokens=16, dtype="float32", device="cpu", threads=None, rounds=1, adamw="default"
    )
    assert profile.main(arguments) == 0
