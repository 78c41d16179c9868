"""A BERT small enough to train in a second, and labelled texts that it can learn, both written by the tests."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

WORDS = {
    "sport": ["goal", "match", "coach", "score"],
    "money": ["bank", "price", "trade", "loan"],
    "art": ["film", "music", "novel", "stage"],
}
FILLER = ["the", "a", "of", "new", "old", "said", "was", "with", "today", "city", "people", "year"]


def write_model(folder: Path) -> Path:
    """A random two-layer BERT (without a head) with a WordPiece vocabulary, as `save_pretrained` writes it."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *(w for ws in WORDS.values() for w in ws)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def texts(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label), no two alike."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = list(WORDS)[len(rows) % len(WORDS)]
        words = rng.choices(FILLER, k=8) + rng.choices(WORDS[label], k=3)
        rng.shuffle(words)
        rows[" ".join(words)] = label
    return list(rows.items())


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8"
    )
    return path
