"""Settings by name: what each preset trains, and at which rates the main job trains it."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from bench.accuracy import catalogue
from bench.accuracy.methods import Plan
from bench.accuracy.tasks import Size, Topic
from pst_kernels import PSTConfig, replace_linear
from pst_kernels.config import PRESETS, WORDS_RANK
from pst_kernels.finetune import presets
from pst_kernels.finetune.settings import Settings
from pst_kernels.layers.embedding import ENTRIES
from pst_kernels.model import get_config

FACTORS = ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C")


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(**size, vocab_size=40, num_labels=3))


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def converted(**given) -> torch.nn.Module:
    model = bert()
    return replace_linear(model, presets.config(Settings(**given), model))


def test_presets_are_the_defaults_but_for_what_they_name():
    assert PSTConfig.preset("paper") == PSTConfig()
    assert PSTConfig.preset("released", sparsity=0.5) == PSTConfig(sparsity=0.5, modules_to_save=())
    recipe = PSTConfig.preset("recipe", weight_rank=4)
    assert recipe == PSTConfig(beta=1 / 16, train_bias=True, weight_rank=4)
    assert PSTConfig.preset("recipe", beta=0.5).beta == 0.5
    with pytest.raises(ValueError, match="preset 'best' is not known; give one of paper, released, recipe"):
        PSTConfig.preset("best")


@pytest.mark.parametrize(("preset", "method"), [("released", "PST as released"), ("recipe", "PST, our recipe")])
def test_a_preset_is_the_method_of_the_accuracy_study(preset, method):
    model = bert()
    catalogue.METHODS[method].convert(model, Plan(Topic(Size()), 0.9, 0))
    ours = converted(preset=preset)
    assert trainable(ours) == trainable(model)
    for name in ("beta", "alpha1", "alpha2", "weight_rank", "score_rank", "through_magnitude", "train_bias", "warmup"):
        assert getattr(get_config(ours), name) == getattr(get_config(model), name), name


def test_as_released_nothing_but_factors_trains():
    assert {name.rpartition(".")[2] for name in trainable(converted(preset="released"))} == set(FACTORS)


def test_magnitudes_are_weighed_by_their_gradients_but_where_they_are_wanted_plain():
    for preset, magnitude in {"paper": "plain", "recipe": "plain", "accurate": "fisher", "fast": "fisher"}.items():
        assert (
            PSTConfig.preset(preset, sparsity=0.5).magnitude
            == PSTConfig.preset(preset, pattern="2:4").magnitude
            == "plain"
        )
        assert PSTConfig.preset(preset, sparsity=0.51).magnitude == magnitude
        assert PSTConfig.preset(preset, pattern="block:16", train_kept=False).magnitude == "plain"
        assert PSTConfig.preset(preset).magnitude == magnitude
        assert get_config(converted(preset=preset, steps=200)).magnitude == magnitude
        assert get_config(converted(preset=preset, steps=199)).magnitude == "plain"
        assert get_config(converted(preset=preset, steps=200, magnitude="plain")).magnitude == "plain"
        assert get_config(converted(preset=preset, steps=199, magnitude="fisher")).magnitude == "fisher"
    with pytest.raises(ValueError, match=r"--magnitude 'large' is not known; give plain or fisher"):
        Settings(magnitude="large")


def test_a_short_run_says_how_it_departs_from_its_preset():
    plain, late = "magnitudes are plain", "the mask is fixed in the last 30%"
    for given, told in (
        ({}, (plain, late)), ({"magnitude": "fisher"}, (late,)), ({"preset": "fast"}, (plain,)),
        ({"steps": 200}, ()), ({"sparsity": 0.5}, ()), ({"preset": "recipe"}, ()), ({"method": "dense"}, ()),
        ({"preset": "fast", "magnitude": "fisher"}, ()),
    ):  # fmt: skip
        note = presets.note(Settings(**given))
        assert bool(note) == bool(told)
        assert not told or (note or "").startswith("150 steps are fewer than 200: ")
        assert [text in (note or "") for text in (plain, late)] == [text in told for text in (plain, late)]


def test_accurate_fixes_its_mask_late_in_a_short_run_alone():
    for given, expected in (
        ({}, (0.3, 0.3, 0.1)), ({"magnitude": "fisher"}, (0.3, 0.3, 0.1)), ({"sparsity": 0.8}, (0.3, 0.3, 0.1)),
        ({"steps": 200}, (0.7, 0.7, 0.0)), ({"preset": "fast"}, (0.7, 0.7, 0.0)), ({"sparsity": 0.5}, (0.7, 0.7, 0.0)),
    ):  # fmt: skip
        found = get_config(converted(**given))
        assert (found.freeze, found.cooldown, found.warmup) == expected, given


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.51, 0.8, 0.9, 0.97])
def test_presets_fix_their_masks_early(sparsity: float):
    for name in ("accurate", "fast"):
        found = PSTConfig.preset(name, sparsity=sparsity)
        assert (found.freeze, found.cooldown, found.warmup) == (0.7, 0.7, 0.0)
        assert found.initial_sparsity == (sparsity if sparsity <= 0.5 else 0.0)
        assert found.score_interval == (2 if name == "fast" else 1)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_fast_is_accurate_but_for_scores_that_rest(sparsity: float):
    fast = PSTConfig.preset("fast", sparsity=sparsity)
    rank = WORDS_RANK if sparsity > 0.5 else 0
    assert fast == PSTConfig.preset("accurate", sparsity=sparsity, score_interval=2, embedding_rank=rank)
    assert PSTConfig.preset("fast", score_interval=1) == PSTConfig.preset("accurate")
    assert PSTConfig.preset("fast", pattern="block:16", train_kept=False).score_interval == 1
    assert PSTConfig.preset("fast", pattern="2:4").score_interval == 2


@pytest.mark.parametrize("name", ["accurate", "fast"])
def test_only_weights_that_go_one_by_one_go_at_once(name: str):
    for given in ({"pattern": "2:4"}, {"pattern": "block:16", "train_kept": False, "sparsity": 0.5}):
        found = PSTConfig.preset(name, **given)
        assert (found.initial_sparsity, found.warmup) == (0.0, 0.1)
    own = PSTConfig.preset(name, sparsity=0.5, initial_sparsity=0.2, warmup=0.05)
    assert (own.initial_sparsity, own.warmup) == (0.2, 0.05)


@pytest.mark.parametrize("name", ["accurate", "fast"])
def test_what_is_given_stays_beside_a_preset(name: str):
    assert PSTConfig.preset(name, pattern="2:4").freeze == 0.7
    own = PSTConfig.preset(name, sparsity=0.5, freeze=0.1)
    assert (own.freeze, own.cooldown) == (0.1, 0.3)
    assert PSTConfig.preset(name, sparsity=0.5, cooldown=0.4).freeze == 0.2
    assert PSTConfig.preset(name, train_kept=False).freeze == 0.0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_each_parameter_has_the_rate_of_its_role(preset, sparsity):
    settings = Settings(preset=preset, pst_learning_rate=3e-4, head_learning_rate=7e-3)
    model = converted(preset=preset, sparsity=sparsity)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in presets.groups("pst", settings, model) for p in g["params"]}
    assert set(rates) == trainable(model)
    update = 1.2e-3 if preset in ("recipe", "accurate", "fast") else 3e-4
    of_role = dict.fromkeys(FACTORS, 3e-4) | dict.fromkeys(FACTORS[:2], update) | {"pst_kept": 5e-4}
    of_role |= dict.fromkeys(ENTRIES, 2e-3)
    words = "bert.embeddings.word_embeddings.weight"
    assert (words in rates) == (preset == "accurate" and sparsity == 0.5)
    for name, rate in rates.items():
        assert rate == pytest.approx(5e-4 if name == words else of_role.get(name.rpartition(".")[2], 7e-3)), name
    assert any(name.endswith("pst_kept") for name in rates) == (preset in ("accurate", "fast"))
    given = presets.groups("pst", Settings(preset=preset, update_learning_rate=9e-3), model)
    assert {g["lr"] for g in given if names[id(g["params"][0])].endswith(FACTORS[:2])} == {9e-3}


def test_the_rates_of_the_recipe_are_those_of_the_readme():
    settings = Settings(preset="recipe")
    assert (settings.update_rate, settings.pst_learning_rate, settings.head_learning_rate) == (2e-3, 5e-4, 1e-3)


def test_dense_fine_tuning_has_a_rate_of_the_body_and_one_of_the_head():
    model = bert()
    settings = Settings(learning_rate=1e-4, head_learning_rate=7e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in presets.groups("dense", settings, model) for p in g["params"]}
    assert rates == {n: 7e-3 if n.startswith("classifier.") else 1e-4 for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "nowhere"}, "--teacher nowhere is no folder with a config"),
        ({"hardness": 1.5}, r"--hardness 1\.5 must lie in"),
        ({"temperature": 0.0}, r"--temperature 0\.0 must be above 0"),
        ({"epochs": 0}, "--epochs 0 must be at least 1"),
        ({"kept_learning_rate": 0.0}, "--kept-learning-rate 0.0 must lie between 0 and 1"),
        ({"preset": "best"}, "--preset 'best' is not known; give one of paper, released, recipe"),
        ({"update_learning_rate": 0.0}, "--update-learning-rate 0.0 must lie between 0 and 1"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_epochs_are_steps_of_these_texts():
    assert Settings(epochs=3, batch_size=16).with_steps_for(50).steps == 10
    assert Settings(steps=7).with_steps_for(50).steps == 7


def test_pst_learns_from_the_dense_model_of_the_run(tmp_path):
    assert Settings(output=str(tmp_path)).teacher_folder == tmp_path / "dense"
    assert Settings(method="pst").teacher_folder is None
    assert Settings(hardness=0.0).teacher_folder is None
    (tmp_path / "config.json").write_text("{}")
    assert Settings(method="pst", teacher=str(tmp_path)).teacher_folder == tmp_path
