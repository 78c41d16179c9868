"""The accuracy grid: fair tasks, no test data in a choice, the record, and what is shown of it."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_grid import LINEARS, SIZE, cell, row, run, task
from torch import nn

import bench.accuracy
from bench.accuracy import (
    catalogue,
    choose,
    docstrings,
    final,
    methods,
    overlap,
    plots,
    record,
    sections,
    table,
    tasks,
    train,
)
from bench.accuracy.record import FINAL, SHOW, TUNE
from pst_kernels import PSTConfig, replace_linear
from pst_kernels.masks.patterns import num_pruned_at

pytest_plugins = ["tiny_grid"]
pytestmark = pytest.mark.usefixtures("tiny")


# Tasks


def test_every_method_starts_from_the_same_head_and_sees_the_same_batches(monkeypatch):
    heads, batches = {}, {}

    class Seen(tasks.Topic):
        def loss(self, model, batch):
            heads.setdefault(current, model.classifier.weight.detach().clone())
            batches.setdefault(current, []).append(batch["input_ids"])
            return super().loss(model, batch)

    for current in ("dense", "PST", "Wanda + LoRA", "L0"):
        train.train(cell(current), Seen(SIZE), catalogue.METHODS[current])
    assert all(torch.equal(head, heads["dense"]) for head in heads.values())
    assert all(torch.equal(torch.stack(seen), torch.stack(batches["dense"])) for seen in batches.values())
    assert len(batches["PST"]) == SIZE.steps


def test_few_labels_as_many_of_each_class_and_others_for_another_seed(tiny):
    chosen = task().training_texts(0)
    assert sorted(text.label for text in chosen) == sorted(tiny.labels * 3)
    assert chosen == task().training_texts(0) != task().training_texts(1)
    assert set(chosen) <= set(tiny.train)


def test_all_labels_are_all_training_texts(tiny):
    assert tasks.Topic(dataclasses.replace(SIZE, labels_each=0)).training_texts(1) == tiny.train


def test_docstrings_are_of_twenty_packages_and_no_text_is_in_two_splits(tmp_path, monkeypatch):
    for package in range(docstrings.PACKAGES + 1):
        lines = [
            f'"""Package {package} as a whole, in six words."""',
            'def same():\n    """Words that each package of them has."""',
        ]
        for word in range(12 if package else 3):  # the first is the smallest
            lines.append(
                f'def f{word}():\n    """Do {word} of {package}, {package * 100 + word} times or {word} times."""'
            )
        folder = tmp_path / f"p{package}"
        folder.mkdir()
        (folder / "a.py").write_text("\n".join(lines))
        (folder / "tests").mkdir()
        (folder / "tests" / "b.py").write_text('"""A test whose words are not of the library at all."""')
    (tmp_path / "p1" / "wrong.py").write_text("def (")
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = docstrings.load(0)
    assert found.labels == sorted(f"p{package}" for package in range(1, docstrings.PACKAGES + 1))
    texts = [example.text for name in ("train", "validation", "test") for example in found.split(name)]
    assert len(set(texts)) == 20 * 13 + 1
    where = [
        name for name in ("train", "validation", "test") if any("each package" in e.text for e in found.split(name))
    ]
    assert len(where) == 1  # what all packages say is on one side
    assert not any("A test whose" in text for text in texts)
    assert all(
        {example.label for example in found.split(name)} == set(found.labels)
        for name in ("train", "validation", "test")
    )
    assert docstrings.load(0).train == found.train != docstrings.load(1).train


def test_sections_are_of_packages_with_a_description_one_of_a_source(tmp_path, monkeypatch):
    paragraphs = [
        f"Package: p{n}\nSource: s{n // 2} (1.0)\nDescription: package {n} does {word} and {n * n}\n longer text\n"
        f"Section: contrib/{chr(97 + n % 22)}{chr(97 + n % 22)}\nPriority: optional\n"
        for n, word in enumerate(1000 * ["one", "two", "three"])
    ]
    paragraphs += ["Package: bare\nSection: aa\n", "Package: terse\nDescription: two words\nSection: aa\n"]
    program = tmp_path / "apt-cache"
    (tmp_path / "told").write_text("\n".join(paragraphs))
    program.write_text(f'#!/bin/sh\ntest "$1" = dumpavail && exec /bin/cat "{tmp_path / "told"}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = sections.load(0)
    assert len(found.labels) == sections.SECTIONS
    assert {len(label) for label in found.labels} == {2}
    texts = [e for name in ("train", "validation", "test") for e in found.split(name)]
    assert all(e.text.startswith("package ") and "longer" not in e.text for e in texts)
    assert len({e.text for e in texts}) == len(texts)
    (tmp_path / "told").write_text("")
    with pytest.raises(RuntimeError, match="apt-cache knows no package here: run apt-get update"):
        sections.load(0)
    program.unlink()
    with pytest.raises(FileNotFoundError, match=r"'section' reads Debian's package lists; there is no apt-cache"):
        sections.load(0)


def test_an_epoch_holds_every_text_once():
    size = tasks.Size(steps=9, batch=2, length=12, labels_each=6)
    seen = [tuple(ids.tolist()) for batch in tasks.Topic(size).batches(0) for ids in batch["input_ids"]]
    assert len(set(seen)) == len(seen) == 18


def test_words_are_masked_as_in_bert(tiny):
    words, tokenizer = task("masked words"), tasks._tokenizer()
    many = tiny.train * 40
    rows = words.encode(many, seed=3)
    ids = torch.stack([batch["input_ids"] for batch in rows])
    labels = torch.stack([batch["labels"] for batch in rows])
    plain = words._tokens(many)["input_ids"]
    real = words._tokens(many)["attention_mask"].bool() & (plain != tokenizer.cls_token_id)
    real &= plain != tokenizer.sep_token_id
    chosen = labels != tasks.IGNORED
    assert not (chosen & ~real).any()
    assert torch.equal(labels[chosen], plain[chosen])
    assert torch.equal(ids[~chosen], plain[~chosen])
    assert (chosen.sum() / real.sum()).item() == pytest.approx(0.15, abs=0.01)
    masked = (ids[chosen] == tokenizer.mask_token_id).double().mean().item()
    assert masked == pytest.approx(0.8 + 0.1 / len(tokenizer), abs=0.02)
    assert (ids[chosen] == plain[chosen]).double().mean().item() == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=0.02)
    again = words.encode(many, seed=4)
    assert not torch.equal(ids, torch.stack([batch["input_ids"] for batch in again]))


def test_the_loss_of_masked_words_is_that_of_all_positions_decoded():
    words = task("masked words")
    model = words.model()
    batch = next(iter(words.batches(0)))
    hidden = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    normed = nn.functional.layer_norm(hidden, hidden.shape[-1:])  # the transform starts as the identity
    logits = normed @ model.bert.embeddings.word_embeddings.weight.T
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=tasks.IGNORED)
    torch.testing.assert_close(words.loss(model, batch), expected, rtol=1e-5, atol=1e-6)
    texts_ = words.validation_texts()
    rows = words.encode(texts_, 0)
    with torch.no_grad():
        found = [model(**{n: v[None] for n, v in one.items()}) for one in rows]
    by_hand = float(sum(out.loss * len(out.logits) for out in found)) / sum(len(out.logits) for out in found)
    assert words.judge(model, texts_) == pytest.approx(by_hand, rel=1e-5)


def test_accuracy_counts_right_texts(tiny):
    model = task().model()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    expected = sum(text.label == tiny.labels[1] for text in tiny.validation) / len(tiny.validation)
    assert task().judge(model, tiny.validation) == expected


# No test data in any choice


def test_only_a_final_cell_reads_test_texts(monkeypatch):
    def refuse(source):
        raise RuntimeError("test texts were read")

    monkeypatch.setattr(tasks, "test_texts", refuse)
    assert run(cell(stage=TUNE)).test is None
    assert run(cell("PST, rank 2", stage=SHOW)).test is None
    with pytest.raises(RuntimeError, match="test texts were read"):
        run(cell(stage=FINAL))


def test_no_other_file_names_the_test_texts():
    readers = {}
    for path in Path(bench.accuracy.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("test_texts", "_split"):
                readers.setdefault(path.name, set()).add(node.attr)
            if isinstance(node, ast.Attribute) and node.attr == "judge" and getattr(node.value, "id", "") == "final":
                readers.setdefault(path.name, set()).add("final.judge")
    assert readers == {"final.py": {"test_texts"}, "train.py": {"final.judge"}}
    # inside tasks.py one function reads the split's test texts
    assert (Path(bench.accuracy.__file__).parent / "tasks.py").read_text(encoding="utf-8").count(
        "_split(source).test"
    ) == 1


def test_a_final_cell_is_judged_on_the_test(tiny):
    one = cell(stage=FINAL)
    trained = train.train(one, task(), catalogue.METHODS["PST"]).model
    got = run(one)
    assert got.test == task().judge(trained, tiny.test) == final.judge(trained, task())
    assert got.validation == task().judge(trained, tiny.validation)


GRID = [{"weights": rate} for rate in (1e-4, 1e-3, 1e-2)]


def tuned(*validations, reached=None):
    cells = choose.tuning_cells(cell("magnitude", stage=FINAL), GRID)
    reached = reached or [0.5] * 3
    found = zip(cells, validations, reached, strict=True)
    return cells, {one: row(one, value, reached=share) for one, value, share in found}


def test_the_best_on_validation_is_chosen():
    cells, rows = tuned(0.6, 0.8, 0.7)
    assert {one.stage for one in cells} == {TUNE}
    assert {one.seed for one in cells} == {choose.TUNING_SEED}
    assert choose.best(rows, cells, higher_is_better=True) == cells[1].setting
    assert choose.best(rows, cells, higher_is_better=False) == cells[0].setting
    del rows[cells[2]]
    assert choose.best(rows, cells, higher_is_better=True) is None
    cells, rows = tuned(0.7, 0.7, None)
    assert choose.best(rows, cells, higher_is_better=True) == cells[0].setting
    cells, rows = tuned(None, None, None)
    with pytest.raises(ValueError, match="every setting of magnitude diverged"):
        choose.best(rows, cells, higher_is_better=True)


def test_a_setting_that_misses_the_target_is_chosen_only_if_all_do():
    cells, rows = tuned(0.9, 0.5, 0.6, reached=[0.1, 0.49, 0.6])
    assert choose.best(rows, cells, higher_is_better=True) == cells[2].setting
    cells, rows = tuned(0.9, 0.5, 0.6, reached=[0.1, 0.2, 0.15])
    assert choose.best(rows, cells, higher_is_better=True) == cells[1].setting


# Cells and the record


def test_the_same_cell_comes_out_the_same():
    one, again = run(cell("PST")), run(cell("PST"))
    assert (one.validation, one.train_loss) == (again.validation, again.train_loss)
    assert run(cell("PST", seed=1)).train_loss != one.train_loss


def test_training_that_diverges_is_recorded_and_not_tested():
    got = run(cell("dense", stage=FINAL, setting={"weights": 1e30}))
    assert (got.validation, got.test, got.train_loss) == (None, None, None)


def test_the_record_reads_back_what_was_added(tmp_path):
    path = tmp_path / "accuracy.csv"
    assert record.read(path) == {}
    rows = [
        row(cell("magnitude", FINAL, seed=1), 0.75, 0.5),
        row(cell("PST"), None),
        row(cell("dense", FINAL), 0.25, 0.125),
    ]
    for one in rows:
        record.add(path, one)
    assert record.read(path) == {one.cell: one for one in rows}
    better = dataclasses.replace(rows[1], validation=0.5)
    record.add(path, better)
    assert record.read(path)[better.cell] == better
    assert len(record.read(path)) == 3
    other = record.setting_text({"weights": 0.5})
    chosen_later = row(dataclasses.replace(rows[0].cell, setting=other), 0.75, 0.625)
    record.add(path, chosen_later)  # of a cell to report there is one row
    tuned_too = row(dataclasses.replace(rows[1].cell, setting=other), 0.5)
    record.add(path, tuned_too)  # of tuning cells there is one a setting
    assert set(record.read(path)) == {chosen_later.cell, rows[1].cell, rows[2].cell, tuned_too.cell}
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="has columns"):
        record.read(path)


# What is shown


def some_rows():
    rows = []
    for method, values in {"dense": (0.95, 0.96, 0.97), "PST": (0.8, 0.9, 0.85)}.items():
        rows += [row(cell(method, FINAL, seed=s), 0.5, v, trainable=1234) for s, v in enumerate(values)]
    rows.append(row(cell("L0", FINAL), 0.5, 0.7, reached=0.31))
    rows.append(row(cell("PST", FINAL, name="masked words", sparsity=0.9), 5.0, 4.5, metric="loss"))
    return {one.cell: one for one in rows}


def test_the_table_gives_mean_worst_best_and_number_of_seeds(tmp_path):
    text = table.markdown(some_rows())
    assert text.splitlines()[:5] == [
        "| | trainable | topic, 50 % | masked words, 90 % |",
        "| --- | ---: | ---: | ---: |",
        "| dense | 1,234 | 96.0 (95.0 to 97.0, 3) | - |",
        "| L0 | 100 | 70.0 (1) at 31 % | - |",
        "| PST | 1,234 | 85.0 (80.0 to 90.0, 3) | 4.50 (1) |",
    ]
    assert text.splitlines()[6].startswith("topic: test accuracy, %; masked words: test loss, nats a masked word. Mean")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nafter\n")
    table.rewrite_readme(readme, some_rows())
    assert readme.read_text() == f"before\n<!-- accuracy:begin -->\n{text}\n<!-- accuracy:end -->\nafter\n"
    with pytest.raises(ValueError, match="no final rows"):
        table.markdown({})


def test_the_table_says_whose_rates_were_taken():
    rows = [
        row(cell("PST", FINAL, 0.5), test=0.5), row(cell("PST", FINAL, 0.8), test=0.5),
        row(cell("magnitude, distilled", FINAL, 0.8), test=0.5),
    ]  # fmt: skip
    found = [table.caption(rows[:count]) for count in (1, 2, 3)]
    assert [text.partition("among three for each method")[2].partition(". ")[0] for text in found] == [
        "",
        "; 80 % takes those chosen at 90 %",
        "; 80 % takes those chosen at 90 %; magnitude, distilled takes those of magnitude",
    ]


def test_what_was_chosen_and_varied_is_shown_on_validation(tmp_path):
    rows = some_rows()
    for name, seed, validation in (("PST, rank 2", 0, 0.25), ("PST, rank 2", 2, 0.75), ("PST, rank 4", 0, 0.125)):
        one = cell(name, SHOW, seed=seed)
        rows[one] = row(one, validation)
    for setting, validation in ((0.25, 0.5), (0.5, 0.75)):
        one = cell("candidate: norms", TUNE, seed=100, setting={"factors": setting})
        rows[one] = row(one, validation)
    path = tmp_path / "tables.md"
    table.write_validation(path, rows)
    assert path.read_text().splitlines() == [
        "# On validation",
        "",
        "**topic, validation, at the rates chosen for PST: accuracy, mean (worst to best, number of seeds)**",
        "",
        "| method | trainable | 50 % |",
        "| --- | ---: | ---: |",
        "| PST | 1,234 | 50.0 (50.0 to 50.0, 2) |",  # of the seeds that were varied
        "| PST, rank 2 | 100 | 50.0 (25.0 to 75.0, 2) |",
        "| PST, rank 4 | 100 | 12.5 (1) |",
        "",
        "**topic, validation, candidates for a recipe: accuracy, mean (worst to best, number of seeds)**",
        "",
        "| recipe | setting | 50 % |",
        "| --- | ---: | ---: |",
        '| candidate: norms | {"factors": 0.25} | 50.0 (1) |',
        '| candidate: norms | {"factors": 0.5} | 75.0 (1) |',
        "",
    ]


def test_overlap_is_the_share_of_kept_weights_that_both_keep(tmp_path):
    one, other = cell("PST", FINAL), cell("magnitude", FINAL)
    mask = torch.tensor([[True, True, False, False, False], [True, False, False, False, True]])
    overlap.save(tmp_path, one, {"a": mask, "b": torch.ones(3, 3, dtype=torch.bool)})
    overlap.save(tmp_path, other, {"a": ~mask, "b": torch.ones(3, 3, dtype=torch.bool)})
    assert np.array_equal(overlap.load(tmp_path, one), [*mask.flatten().tolist(), *[True] * 9])
    assert overlap.load(tmp_path, cell("movement", FINAL)) is None
    path = tmp_path / overlap.CSV_NAME
    overlap.write(path, tmp_path, [one, other, cell("movement", FINAL)])
    rows = overlap.read(path)
    assert [row[3:] for row in rows] == [
        ["PST", "magnitude", "13", "9", f"{9 / 13:.4f}", f"{15 / 19:.4f}"],
        ["magnitude", "PST", "15", "9", f"{9 / 15:.4f}", f"{13 / 19:.4f}"],
    ]
    overlap.write(path, tmp_path / "nothing here", [])
    assert overlap.read(path) == rows


def test_a_final_cell_keeps_its_masks(tmp_path):
    one = cell(stage=FINAL)
    run(one, masks_folder=tmp_path)
    kept = overlap.load(tmp_path, one)
    model = task().model()
    prunable = sum(linear.weight.numel() for linear in methods.targets(model).values())
    exact = sum(num_pruned_at(linear.weight.numel(), 0.5) for linear in methods.targets(model).values())
    assert kept.size == prunable
    assert int((~kept).sum()) == exact


def test_the_pictures_show_what_the_rows_say(tmp_path):
    rows = some_rows()
    figure = plots.by_sparsity(list(rows.values()))
    topic, words = figure.axes
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["dense", "L0", "PST"]
    dense = next(line for line in topic.lines if line.get_label() == "dense")
    np.testing.assert_allclose(dense.get_ydata(), [96.0, 96.0])
    lines = [line.get_xydata().tolist() for line in topic.lines]
    assert any(np.allclose(line, [[50.0, 85.0]]) for line in lines)
    assert any(np.allclose(line, [[31.0, 70.0]]) for line in lines)  # L0, where it came out
    far = row(cell("movement", FINAL), 0.5, 0.2)
    topic, _ = plots.by_sparsity([*rows.values(), far]).axes
    assert [text.get_text() for text in topic.texts] == ["below: movement 20 to 20"]
    assert topic.get_ylim()[0] == pytest.approx(68.0)
    assert words.get_ylabel() == "test loss, nats a masked word"
    pairs = [["topic", "0.5", "0", "PST", "magnitude", "13", "9", "0.6923", "0.7895"]]
    written = plots.draw(rows, pairs, tmp_path)
    assert sorted(path.name for path in written) == [
        "accuracy_by_sparsity.png", "accuracy_by_trainable.png", "accuracy_overlap.png"
    ]  # fmt: skip
    assert plots.draw({}, [], tmp_path) == []


def test_the_overlap_picture_leaves_blank_what_was_never_compared():
    def both(task: str, sparsity: str, one: str, other: str, *shares: str) -> list[list[str]]:
        named = [(one, other), (other, one)]
        return [
            [task, sparsity, "0", *names, "13", "9", share, "0.5"] for names, share in zip(named, shares, strict=True)
        ]

    figure = plots.overlap_picture([
        *both("masked words", "0.5", "PST", "movement", "0.60", "0.61"),
        *both("topic", "0.5", "PST", "movement", "0.70", "0.80"),
        *both("topic", "0.9", "PST", "movement", "0.40", "0.41"),
        *both("topic", "0.9", "magnitude", "PST", "0.30", "0.31"),
    ])  # fmt: skip
    half, most, words, nothing = figure.axes
    assert [axis.get_title() for axis in (half, most, words)] == [
        "topic, 50 %, seed 0", "topic, 90 %, seed 0", "masked words, 50 %, seed 0"
    ]  # fmt: skip
    assert not nothing.axison
    assert [text.get_text() for text in half.texts] == ["1.00", "0.80", "0.70", "1.00"]  # movement stands before PST
    assert [text.get_text() for text in most.texts] == ["1.00", "0.30", "1.00", "0.41", "0.31", "0.40", "1.00"]


def test_targets_are_those_of_replace_linear():
    model = task().model()
    names = set(methods.targets(model))
    converted = replace_linear(task().model(), PSTConfig())
    assert names == {n for n, m in converted.named_modules() if type(m).__name__ == "PSTLinear"}
    assert len(names) == LINEARS
