"""Labelled texts out of a .csv or .jsonl file: each row read right, or an error that names it and says what to do."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Example:
    text: str
    label: str
    source: str  # where it was read, for messages


@dataclass
class _Row:
    line: int  # where it begins
    values: dict[str, Any]
    twice: Sequence[str] = ()  # columns that it has more than once
    raw: list[str] = field(default_factory=list)  # its lines as they stand in a .csv file
    columns: Sequence[str] = ()  # of that file


def read_file(path: Path, text_column: str, label_column: str) -> list[Example]:
    """Examples of a .csv (with a header) or .jsonl file (one object a line). Raises ValueError naming file and line."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a .csv or .jsonl file of labelled texts")
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; give a .csv file with a header, or .jsonl with one object a line"
        )
    examples, of_many_lines = [], []
    for row in readers[path.suffix.lower()](path):
        source = f"{path}:{row.line}"
        for column in (text_column, label_column):
            if column in row.twice:
                raise ValueError(f"{source} has more than one column {column!r}; rename or remove all but one")
            if column not in row.values:
                known = ", ".join(map(repr, row.values)) or "none"
                raise ValueError(
                    f"{source} has no column {column!r}; it has {known}. See --text-column, --label-column"
                )
        text = _text(row.values[text_column], source, text_column)
        label = _label(row.values[label_column], source, label_column)
        examples.append(Example(text, label, source))
        if len(row.raw) > 1:
            of_many_lines.append(row)
    if not examples:
        raise ValueError(f"{path} holds no examples; it needs at least one line of text and label")
    _check_quotes(path, of_many_lines, label_column, {example.label for example in examples})
    return examples


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", bool: "true or false", float: "a number with a fraction"}
    return next(name for kind, name in kinds.items() if isinstance(value, kind))


def _text(value: Any, source: str, column: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{source} has {_kind(value)} as {column!r}, not a text; write it as one string")
    return _filled(value, source, column)


def _label(value: Any, source: str, column: str) -> str:
    if isinstance(value, (list, dict)):
        raise ValueError(
            f"{source} has {_kind(value)} as {column!r}; a text has one label here, so give one string or number"
        )
    if isinstance(value, bool):
        value = json.dumps(value)
    elif isinstance(value, float) and math.isnan(value):  # what pandas writes where there is no value
        value = None
    return _filled(None if value is None else str(value), source, column).strip()


def _filled(value: str | None, source: str, column: str) -> str:
    if value is None or not value.strip():
        raise ValueError(f"{source} has an empty {column!r}; fill it in or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(
            f"{source} has {half!r} in {column!r}, half of a surrogate pair and no character; remove it, or write the"
            " character that was meant"
        ) from None
    return value


def _csv_rows(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(1 << 30)  # the default of 128 KiB is shorter than some articles
    raw: list[str] = []  # the lines of the row that is read just now
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Strict, for what is not CSV is otherwise read as something: a quote that stays open takes all rows after it.
        reader = csv.reader((raw.append(line) or line for line in file), strict=True)  # type: ignore[func-returns-value]
        header: list[str] | None = None
        while True:
            raw.clear()
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{line} is not CSV in UTF-8: {error}") from error
            except csv.Error as error:
                raise ValueError(
                    f"{path}:{line} is not CSV in UTF-8: {error}; a quote inside a quoted field is doubled, and a field"
                    " that begins with a quote ends with one"
                ) from error
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = fields
                continue
            if len(fields) > len(header):
                raise ValueError(f"{path}:{line} has more fields than the header; quote fields with commas")
            filled = [*fields, *[None] * (len(header) - len(fields))]
            twice = [name for name in header if header.count(name) > 1]
            yield _Row(line, dict(zip(header, filled, strict=True)), twice, list(raw), header)


def _check_quotes(path: Path, rows: Sequence[_Row], label_column: str, labels: set[str]) -> None:
    """Refuse a text of several lines most of which are rows with a known label: two stray quotes took them in."""
    for row in rows:
        width, place = len(row.columns), row.columns.index(label_column)

        def is_row(line: str, width: int = width, place: int = place) -> bool:
            ways = (next(csv.reader([text]), []) for text in (line, line.replace('"', "")))
            return any(len(fields) == width and fields[place] in labels for fields in ways)

        hits = sum(map(is_row, row.raw))
        if 2 * (hits - 1) > len(row.raw) - 1:  # the line that the label is in looks like a row in any case
            raise ValueError(
                f"{path}:{row.line} opens a quote that ends in line {row.line + len(row.raw) - 1}, and {hits} of the"
                f' lines look like rows of their own; double each quote that is part of a text ("") and put that text'
                " in quotes, or give the file as .jsonl"
            )


class _Object(dict):
    """A JSON object that knows which names it was given twice; of each, it holds the last."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = [name for name in self if names.count(name) > 1] if len(self) < len(names) else []


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw, object_pairs_hook=_Object)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{line} is not a JSON object: {error}") from error
            if not isinstance(row, _Object):
                raise ValueError(f"{path}:{line} is a JSON {type(row).__name__}, not an object with text and label")
            yield _Row(line, row, row.twice)
