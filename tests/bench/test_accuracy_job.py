"""The job of the accuracy grid: which cells run, in which order, once each, and never on test data to choose."""

import dataclasses

import pytest
from tiny_grid import options, row

from bench.accuracy import catalogue, choose, job, record, rerun, teachers, train
from bench.accuracy.record import FINAL, SHOW, TUNE

pytest_plugins = ["tiny_grid"]
pytestmark = pytest.mark.usefixtures("tiny")


def test_the_job_tunes_then_reports_every_cell_once(fake, tmp_path):
    assert job.main(options(tmp_path)) == 0
    stages = [one.stage for one in fake]
    # dense: 3 settings; PST: 3 at each sparsity; 2 seeds of dense, and of PST and its ablation at each sparsity
    assert (stages.count(TUNE), stages.count(FINAL), stages.count(SHOW)) == (9, 2 + 4, 4)
    assert len(set(fake)) == len(fake)
    largest = record.setting_text(catalogue.PST_RATES[-1])
    assert {one.setting for one in fake if one.method != "dense" and one.stage != TUNE} == {largest}
    seeds = [one.seed for one in fake if one.stage != TUNE]
    assert seeds == sorted(seeds)
    assert set(record.read(tmp_path / record.CSV_NAME)) == set(fake)
    before = len(fake)
    assert job.main(options(tmp_path)) == 0
    assert len(fake) == before


def test_the_job_goes_on_where_it_was_stopped(fake, tmp_path, monkeypatch):
    whole = train.run

    def stopped(*args):
        if len(fake) == 7:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(train, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        job.main(options(tmp_path))
    monkeypatch.setattr(train, "run", whole)
    assert job.main(options(tmp_path)) == 0
    assert len(set(fake)) == len(fake) == 9 + 6 + 4


def test_candidates_run_every_setting_by_tuning_seeds_and_are_never_tested(fake, tmp_path):
    name = "candidate: one rate"
    assert job.main(options(tmp_path, "--methods", name)) == 0
    settings = [record.setting_text(setting) for setting in catalogue.METHODS[name].grid]
    found = {(one.setting, one.sparsity, one.seed) for one in fake}
    assert found == {(text, sparsity, seed) for text in settings for sparsity in (0.5, 0.9) for seed in (100, 101)}
    assert {one.stage for one in fake} == {TUNE}
    assert len(fake) == len(found)


def test_a_recipe_is_tested_at_the_setting_of_the_candidate_that_it_was(fake, tmp_path):
    name, before = "PST, our recipe", catalogue.FOUND
    assert job.main(options(tmp_path, "--methods", name)) == 0
    tuning, final_ones = [one for one in fake if one.stage == TUNE], [one for one in fake if one.stage == FINAL]
    assert {(one.method, one.seed) for one in tuning} == {(before.name, choose.TUNING_SEED)}
    assert len(tuning) == 2 * len(before.grid) == 6
    largest = record.setting_text(before.grid[-1])
    assert {(one.method, one.setting) for one in final_ones} == {(name, largest)}
    assert len(final_ones) == 4
    assert len(fake) == 10
    recipe = catalogue.METHODS[name]
    assert dataclasses.replace(recipe, name=before.name, grid=before.grid, like=None, candidate=True) == before


def test_with_few_labels_80_percent_takes_the_rates_chosen_at_90(fake, tmp_path):
    assert job.main(options(tmp_path, "--methods", "PST", "--sparsities", "0.8", "--seeds", "1")) == 0
    assert [(one.stage, one.sparsity) for one in fake] == [(TUNE, 0.9)] * 3 + [(FINAL, 0.8)]
    fake.clear()
    assert (
        job.main(options(tmp_path, "--study", "long", "--methods", "PST", "--sparsities", "0.8", "--seeds", "1")) == 0
    )
    assert [(one.stage, one.sparsity) for one in fake] == [(TUNE, 0.8)] * 3 + [(FINAL, 0.8)]  # all labels: its own
    assert fake[-1].setting == record.setting_text(catalogue.PST_RATES[-1])


def test_a_candidate_runs_at_its_own_sparsity(fake, tmp_path):
    name = "candidate: one rate"
    assert job.main(options(tmp_path, "--methods", name, "--sparsities", "0.8", "--seeds", "1")) == 0
    assert {(one.stage, one.sparsity) for one in fake} == {(TUNE, 0.8)}


def test_what_learns_from_the_dense_model_waits_for_its_setting(fake, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(teachers, "get", lambda folder, one, _, dense: asked.append((one, dense.name)))
    assert job.main(options(tmp_path, "--methods", "candidate: norms, small beta, logits", "--sparsities", "0.9")) == 0
    assert [one.method for one in fake[:3]] == ["dense"] * 3
    assert {one.method for one in fake[3:]} == {"candidate: norms, small beta, logits"}
    largest = record.setting_text(catalogue.WEIGHT_RATES[-1])
    expected = [
        (dataclasses.replace(one, stage=FINAL, method="dense", sparsity=0.0, setting=largest), "dense")
        for one in fake[3:]
    ]
    assert asked == expected


def test_a_pattern_of_one_sparsity_runs_at_no_other(fake, tmp_path):
    assert job.main(options(tmp_path, "--methods", "PST, 2:4", "--seeds", "1")) == 0
    assert {one.sparsity for one in fake} == {0.5}


def test_a_rerun_is_set_beside_the_record(fake, tmp_path, monkeypatch):
    given = options(tmp_path, "--methods", "PST", "--seeds", "3")
    assert job.main(given) == 0
    for one, value in zip([c for c in fake if c.stage == FINAL and c.sparsity == 0.5], (0.5, 0.6, 0.8), strict=True):
        record.add(tmp_path / record.CSV_NAME, row(one, 0.5, value))
    before = (tmp_path / record.CSV_NAME).read_text()
    found = []

    def again(one, *_, **__):
        found.append(one)
        return row(one, 0.5, 0.75)

    monkeypatch.setattr(train, "run", again)
    only = ["--methods", "PST", "--seeds", "3", "--sparsities", "0.5"]
    assert job.main(options(tmp_path, *only, "--rerun", "1")) == 0
    lines = rerun.read(tmp_path / rerun.CSV_NAME)
    assert [(one.seed, one.stage) for one in found] == [(0, FINAL)]
    assert {name: lines[0][name] for name in ("recorded", "again", "difference", "seed_range", "seeds", "within")} == {
        "recorded": "0.5", "again": "0.75", "difference": "0.25", "seed_range": "0.3", "seeds": "3", "within": "yes"
    }  # fmt: skip
    monkeypatch.setattr(train, "run", lambda one, *_, **__: row(one, 0.5, 0.1))
    assert job.main(options(tmp_path, *only, "--rerun", "2")) == 1
    lines = rerun.read(tmp_path / rerun.CSV_NAME)
    assert [(line["seed"], line["within"]) for line in lines] == [("0", "no"), ("1", "no")]
    assert (tmp_path / record.CSV_NAME).read_text() == before


def test_no_cell_starts_when_the_time_is_up(fake, tmp_path):
    assert job.main(options(tmp_path, "--minutes", "1e-9")) == 0
    assert fake == []


def test_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'pst' is not known"):
        job.grid(options(tmp_path, "--methods", "pst"))
