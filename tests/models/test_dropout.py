"""Dropout lowered by a conversion, and given back by the merge."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst

GIVEN = 0.25
SETTINGS = {
    "bert": {"hidden_dropout_prob": GIVEN, "attention_probs_dropout_prob": GIVEN},
    "t5": {"dropout_rate": GIVEN},
}


def probabilities(model: nn.Module) -> list[float]:
    """Of dropout modules, and what attention of T5 hands to a function."""
    of_modules = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    return of_modules + [m.dropout for m in model.modules() if isinstance(getattr(m, "dropout", None), float)]


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return toys.FAMILIES[family](**SETTINGS[family])


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize(("settings", "expected"), [({}, GIVEN), ({"dropout": 0.1}, 0.1), ({"dropout": 0.5}, GIVEN)])
def test_it_is_lowered_and_never_raised(family, settings, expected):
    model = model_of(family)
    count = len(probabilities(model))
    pst.replace_linear(model, pst.PSTConfig(**settings))
    assert probabilities(model) == [expected] * count
    assert count > 6
    assert probabilities(pst.merge_and_unload(model)) == [GIVEN] * count


def test_a_module_that_hands_it_to_a_function_is_lowered_too():
    model = pst.replace_linear(model_of("t5"), pst.PSTConfig(dropout=0.0))
    attention = next(m for m in model.modules() if type(m).__name__ == "T5Attention")
    assert attention.dropout == 0.0
    assert pst.merge_and_unload(model) is model
    assert attention.dropout == GIVEN


@pytest.mark.parametrize(("name", "expected"), [("accurate", 0.0), ("fast", 0.0), ("paper", GIVEN), ("recipe", GIVEN)])
def test_presets(name, expected):
    model = pst.replace_linear(model_of("bert"), pst.PSTConfig.preset(name))
    assert set(probabilities(model)) == {expected}
    kept = pst.replace_linear(model_of("bert"), pst.PSTConfig.preset(name, dropout=None))
    assert set(probabilities(kept)) == {GIVEN}


def test_what_it_was_outlives_a_second_call_and_a_copy():
    model = pst.replace_linear(model_of("bert"), pst.PSTConfig(dropout=0.0))
    pst.replace_linear(model, pst.PSTConfig(dropout=0.0))
    assert set(probabilities(pst.merge_and_unload(copy.deepcopy(model)))) == {GIVEN}
    assert set(probabilities(model)) == {0.0}


def test_settings_of_a_second_call_are_ignored():
    model = pst.replace_linear(model_of("bert"), pst.PSTConfig(dropout=0.125))
    pst.replace_linear(model, pst.PSTConfig(dropout=0.0))
    assert set(probabilities(model)) == {0.125}


def test_without_dropout_training_is_evaluation():
    model = pst.replace_linear(model_of("bert"), pst.PSTConfig(dropout=0.0))
    batch = {"input_ids": torch.arange(toys.LENGTH)[None] + 1, "labels": torch.tensor([1])}
    assert torch.equal(model.train()(**batch).logits, model.eval()(**batch).logits)


def test_it_is_said_once_by_name(caplog):
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        pst.replace_linear(model_of("t5"), pst.PSTConfig(dropout=0.0))
        (record,) = caplog.records
        for part in ("dropout=0 ", "SelfAttention.dropout", "encoder.dropout", "dropout=None"):
            assert part in record.message
        caplog.clear()
        pst.replace_linear(toys.FAMILIES["bert"](hidden_dropout_prob=0.0), pst.PSTConfig(dropout=0.2))
        pst.replace_linear(toys.plain(), pst.PSTConfig(dropout=0.0))
    assert not caplog.records


def test_it_is_saved_with_the_adapter(tmp_path):
    pst.save_pretrained(pst.replace_linear(model_of("bert"), pst.PSTConfig(dropout=0.125)), tmp_path)
    assert pst.PSTConfig.from_pretrained(tmp_path).dropout == 0.125


@pytest.mark.parametrize(
    ("value", "error"), [(-0.1, ValueError), (1.5, ValueError), ("0.1", TypeError), (True, TypeError)]
)
def test_a_probability_that_is_none_is_refused(value, error):
    with pytest.raises(error, match="dropout must be a probability in"):
        pst.PSTConfig(dropout=value)
