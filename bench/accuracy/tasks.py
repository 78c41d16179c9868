"""The tasks: topics of articles, masked words of articles that were held out, packages that docstrings are from, and
sections that packages of Debian are in.

Training and validation texts come from here; test texts only through `final`, which alone calls `test_texts`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pst_kernels.distillation import IGNORED
from pst_kernels.finetune import data, models
from pst_kernels.finetune.settings import Settings

from . import docstrings, kept_texts, sections

MINILM = Settings(dropout=0.0)
SOURCES = {"docstrings": docstrings.load, "sections": sections.load}  # beside the articles
SPLIT_SEED = 0  # of all runs: a cell's seed draws its labelled texts, its order, its head and its factors
EVALUATION_BATCH = 64
MASKED_SHARE, KEPT_SHARE, RANDOM_SHARE = 0.15, 0.1, 0.1  # BERT's: of the masked, 80 % become [MASK]

texts_folder: Path | None = None  # where the texts are kept; None: made anew
Batch = dict[str, Tensor]
Texts = Sequence[data.Example]


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch: the task's loss, logits (n, classes), hidden states (texts, tokens, width) of each
    block and of the embeddings, and which tokens are real, bool (texts, tokens).
    """

    loss: Tensor
    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    real: Tensor


@dataclass(frozen=True)
class Size:
    """Of a cell; equal for every method."""

    steps: int = 120
    batch: int = 8
    length: int = 32
    labels_each: int = 10  # labelled texts of each class; 0: all there are


@functools.cache
def _split(source: str) -> data.Dataset:
    if texts_folder is None:
        return _made(source)
    return kept_texts.load(texts_folder, source, functools.partial(_made, source))


def _made(source: str) -> data.Dataset:
    if source in SOURCES:
        return SOURCES[source](SPLIT_SEED)
    return data.load(None, None, None, MINILM.text_column, MINILM.label_column, SPLIT_SEED)


@functools.cache
def _tokenizer() -> Any:
    return models.load_tokenizer(MINILM)


def test_texts(source: str) -> Texts:
    """`final` alone calls this."""
    return _split(source).test


class Task:
    """What a cell trains and how it is judged. `model()` has its pretrained body in `model.base`."""

    name: str
    metric: str
    higher_is_better: bool
    head: tuple[str, ...]  # modules that are new, or stand between the blocks and what is new
    decoder: tuple[str, ...] = ()  # pretrained modules that the logits are made with
    source: str = "articles"

    def __init__(self, size: Size, device: str = "cpu"):
        self.size, self.device = size, device

    def model(self) -> nn.Module:
        """On the task's device; what is random in it is drawn on the CPU, and the same on every device."""
        return self._model().to(self.device)

    def _model(self) -> nn.Module:
        raise NotImplementedError

    def training_texts(self, seed: int) -> Texts:
        raise NotImplementedError

    def validation_texts(self) -> Texts:
        return _split(self.source).validation

    def encode(self, texts: Texts, seed: int) -> list[Batch]:
        """A batch of one a text, padded to the length of a cell; `seed` for what is random in it."""
        raise NotImplementedError

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        """The loss, and what another model can learn from."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return self.outputs(model, batch).loss

    def judge(self, model: Any, texts: Texts) -> float:
        """The metric over texts, in evaluation mode."""
        raise NotImplementedError

    def batches(self, seed: int) -> Iterator[Batch]:
        """As many as the steps, each epoch in a new order; the same for every method."""
        texts, order, epoch = self.training_texts(seed), list[int](), 0
        rng = random.Random(f"{seed}/order")
        encoded: list[Batch] = []
        for _ in range(self.size.steps):
            while len(order) < self.size.batch:
                order += rng.sample(range(len(texts)), len(texts))
                encoded = self.encode(texts, seed + 1000 * epoch)
                epoch += 1
            chosen, order = order[: self.size.batch], order[self.size.batch :]
            yield self._stack([encoded[i] for i in chosen])

    def calibration(self, seed: int) -> Iterator[Batch]:
        """Training texts as the task reads them, for activation norms: 64 texts, or all if there are fewer."""
        yield from self._in_batches(self.encode(self.training_texts(seed)[:EVALUATION_BATCH], seed))

    def _in_batches(self, rows: Sequence[Batch]) -> Iterator[Batch]:
        for first in range(0, len(rows), EVALUATION_BATCH):
            yield self._stack(rows[first : first + EVALUATION_BATCH])

    def _stack(self, rows: Sequence[Batch]) -> Batch:
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def _tokens(self, texts: Texts) -> Batch:
        encoded = _tokenizer()(
            [text.text for text in texts], truncation=True, max_length=self.size.length, padding="max_length",
            return_tensors="pt",
        )  # fmt: skip
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class Topic(Task):
    """Which of five topics an article has, from its first words."""

    name, metric, higher_is_better = "topic", "accuracy", True
    head = ("classifier", "bert.pooler")

    def _model(self) -> nn.Module:
        return models.load_model(MINILM, _split(self.source).labels)

    def training_texts(self, seed: int) -> Texts:
        split = _split(self.source)
        if not self.size.labels_each:
            return split.train
        chosen: list[data.Example] = []
        for label in split.labels:
            of_label = [text for text in split.train if text.label == label]
            chosen += random.Random(f"{seed}/{label}").sample(of_label, self.size.labels_each)
        return chosen

    def encode(self, texts: Texts, seed: int) -> list[Batch]:
        labels = torch.tensor([_split(self.source).labels.index(text.label) for text in texts])
        return _rows(self._tokens(texts) | {"labels": labels})

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        out = model(**batch, output_hidden_states=True)
        return Outputs(out.loss, out.logits, out.hidden_states, batch["attention_mask"].bool())

    @torch.inference_mode()
    def judge(self, model: Any, texts: Texts) -> float:
        model.eval()
        right = 0
        for batch in self._in_batches(self.encode(texts, 0)):
            right += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
        return right / len(texts)


class Package(Topic):
    """Which of twenty packages of the standard library a docstring is from."""

    name, source = "package", "docstrings"


class Section(Topic):
    """Which of twenty sections of Debian's archive a package with a one-line description is in."""

    name, source = "section", "sections"


class MaskedWords(Task):
    """BERT's masked language modelling on the articles; the loss in nats a masked token of held-out articles."""

    name, metric, higher_is_better = "masked words", "loss", False
    head = ("head",)
    decoder = ("bert.embeddings.word_embeddings",)

    def _model(self) -> nn.Module:
        return MaskedLanguageModel(models.load_model(MINILM, _split(self.source).labels).bert)

    def training_texts(self, seed: int) -> Texts:
        return _split(self.source).train

    def encode(self, texts: Texts, seed: int) -> list[Batch]:
        tokenizer = _tokenizer()
        batch = self._tokens(texts)
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
        generator = torch.Generator().manual_seed(seed)
        masked = (torch.rand(ids.shape, generator=generator) < MASKED_SHARE) & real & ~special
        fate = torch.rand(ids.shape, generator=generator)
        others = torch.randint(len(tokenizer), ids.shape, generator=generator)
        shown = torch.where(masked & (fate >= KEPT_SHARE), tokenizer.mask_token_id, ids)
        shown = torch.where(masked & (fate >= 1.0 - RANDOM_SHARE), others, shown)
        return _rows(batch | {"input_ids": shown, "labels": ids.masked_fill(~masked, IGNORED)})

    def outputs(self, model: Any, batch: Batch) -> Outputs:
        return model(**batch)

    @torch.inference_mode()
    def judge(self, model: Any, texts: Texts) -> float:
        model.eval()
        total, words = 0.0, 0
        for batch in self._in_batches(self.encode(texts, 0)):
            masked = int((batch["labels"] != IGNORED).sum())
            total += float(self.loss(model, batch)) * masked
            words += masked
        return total / words


class MaskedLanguageModel(nn.Module):
    """A body, one linear layer that starts as the identity, LayerNorm, and the word embeddings as decoder.

    MiniLM as published for sentences has no language-modelling head of its own.
    """

    def __init__(self, bert: Any):
        super().__init__()
        self.bert = bert
        bert.pooler = None
        self.head = MaskedHead(bert.config.hidden_size, bert.config.vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Outputs:
        """The mean loss and the logits of the labelled tokens; only those are decoded."""
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        chosen = labels != IGNORED
        logits = self.head(out.last_hidden_state[chosen], self.bert.embeddings.word_embeddings.weight)
        loss = cross_entropy(logits, labels[chosen], reduction="sum") / max(1, int(chosen.sum()))
        return Outputs(loss, logits, out.hidden_states, attention_mask.bool())


class MaskedHead(nn.Module):
    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.transform = nn.Linear(width, width)
        nn.init.eye_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        return self.norm(self.transform(hidden)) @ embeddings.T + self.bias


TASKS: dict[str, type[Task]] = {task.name: task for task in (Topic, MaskedWords, Package, Section)}


def _rows(batch: Batch) -> list[Batch]:
    return [{name: values[i] for name, values in batch.items()} for i in range(len(batch["labels"]))]
