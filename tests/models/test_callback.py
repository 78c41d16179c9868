"""PSTCallback under transformers.Trainer: sparsity by step, accumulation, evaluation, resuming, the best model."""

from __future__ import annotations

import logging

import pytest
import torch
import toys

import pst_kernels as pst
from pst_kernels import cpu
from pst_kernels.model import pst_layers
from pst_kernels.schedule import sparsity_at

transformers = pytest.importorskip("transformers")
STEPS = 8


class Recorder(transformers.TrainerCallback):
    """What every forward of training and of evaluation was computed with."""

    def __init__(self):
        self.steps: list[tuple[int, list[int]]] = []
        self.pruned_at_evaluation: list[list[int]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append((state.global_step, pruned(model)))

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.pruned_at_evaluation.append(pruned(model))


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def pruned(model) -> list[int]:
    return [int(layer.pst_num_pruned) for _, layer in pst_layers(model)]


def make_model(**settings):
    torch.manual_seed(0)
    return toys.perturb(pst.replace_linear(toys.bert(), pst.PSTConfig(**settings)))


def make_trainer(model, directory, *callbacks, **changes):
    settings = {
        "output_dir": str(directory), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings | changes),
        train_dataset=toys.Examples(),
        eval_dataset=toys.Examples(8, seed=1),
        callbacks=[pst.PSTCallback(), *callbacks],
    )


def count_masks(monkeypatch) -> list[int]:
    """Grows by one for every mask that is computed."""
    counted, prune_mask = [], cpu.prune_mask
    monkeypatch.setattr(cpu, "prune_mask", lambda *args: (counted.append(1), prune_mask(*args))[1])
    return counted


def test_sparsity_follows_the_global_step(tmp_path):
    model, recorder = make_model(initial_sparsity=0.2), Recorder()
    trainer = make_trainer(model, tmp_path, recorder)
    trainer.train()
    config = pst.PSTConfig(initial_sparsity=0.2)
    sizes = [layer.weight.numel() for _, layer in pst_layers(model)]

    def expected(step):
        return [int(size * sparsity_at(step, STEPS, config)) for size in sizes]

    assert recorder.steps == [(step, expected(step)) for step in range(STEPS)]
    assert pruned(model) == expected(STEPS) == [int(size * 0.9) for size in sizes]
    assert [int((~layer.mask).sum()) for _, layer in pst_layers(model)] == expected(STEPS)


def test_the_log_holds_the_sparsity(tmp_path):
    trainer = make_trainer(make_model(), tmp_path)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    expected = [round(sparsity_at(row["step"], STEPS, pst.PSTConfig()), 4) for row in rows]
    assert [row["sparsity"] for row in rows] == expected
    assert expected[-1] == 0.9


@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_mask_for_each_optimizer_step(tmp_path, monkeypatch, accumulation):
    model = make_model()
    counted = count_masks(monkeypatch)
    make_trainer(model, tmp_path, gradient_accumulation_steps=accumulation, per_device_train_batch_size=2).train()
    assert len(counted) == STEPS * len(pruned(model))


def test_evaluation_reuses_the_mask(tmp_path, monkeypatch):
    model, recorder = make_model(), Recorder()
    counted = count_masks(monkeypatch)
    trainer = make_trainer(model, tmp_path, recorder, eval_strategy="steps", eval_steps=2)
    trainer.train()
    # the mask after a step serves the evaluation and the next step's forward; the last evaluation needs one more
    assert len(counted) == (STEPS + 1) * len(pruned(model))
    sizes = [layer.weight.numel() for _, layer in pst_layers(model)]
    by_step = [[int(size * sparsity_at(step, STEPS, pst.PSTConfig())) for size in sizes] for step in (2, 4, 6, 8)]
    assert recorder.pruned_at_evaluation == by_step
    before = toys.snapshot(model)  # for which masks are made anew
    counted.clear()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert not counted
    assert not toys.differences(toys.snapshot(model), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"mask_interval": 3}, {"train_bias": True, "modules_to_save": ["classifier", "LayerNorm"]}],
    ids=str,
)
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop, settings):
    saving = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    whole = make_model(**settings)
    make_trainer(whole, tmp_path / "whole", **saving).train()

    first = make_model(**settings)
    make_trainer(first, tmp_path / "parts", StopAt(stop), **saving).train()
    torch.manual_seed(1234)
    second = pst.replace_linear(toys.bert(), pst.PSTConfig(**settings))  # other random numbers, all to be overwritten
    make_trainer(second, tmp_path / "parts", **saving).train(resume_from_checkpoint=True)
    assert not toys.differences(toys.snapshot(second), toys.snapshot(whole))
    assert toys.differences(toys.snapshot(second), toys.snapshot(first))
    for model in (whole, second):
        model.eval()
    batch = toys.inputs("bert")
    assert torch.equal(whole(**batch).logits, second(**batch).logits)


def test_load_best_model_at_end_restores_its_masks_and_says_that_it_is_less_sparse(tmp_path, caplog):
    model = make_model()
    best_at = 4

    def metrics(prediction):
        return {"score": 1.0 if trainer.state.global_step == best_at else 0.0}

    trainer = make_trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = metrics
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best_at}")
    sparsity = sparsity_at(best_at, STEPS, pst.PSTConfig())
    assert pruned(model) == [int(layer.weight.numel() * sparsity) for _, layer in pst_layers(model)]
    assert "best model" in caplog.text
    assert f"{sparsity:.2f}" in caplog.text

    torch.manual_seed(77)
    other = pst.replace_linear(toys.bert(), pst.PSTConfig())
    from safetensors.torch import load_file

    other.load_state_dict(load_file(tmp_path / f"checkpoint-{best_at}" / "model.safetensors"))
    assert not toys.differences(toys.snapshot(model), toys.snapshot(other))


def test_a_finished_run_is_as_sparse_as_promised_and_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        make_trainer(make_model(), tmp_path).train()
    assert "pst_kernels" not in {record.name for record in caplog.records}


def test_a_model_without_pst_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no PST layers; call replace_linear"):
        make_trainer(toys.bert(), tmp_path).train()


def test_training_twice_keeps_the_sparsity(tmp_path, caplog):
    model, recorder = make_model(), Recorder()
    trainer = make_trainer(model, tmp_path, recorder)
    trainer.train()
    before = pruned(model)
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        trainer.train()
    assert recorder.steps[0] == (0, [0] * 12)
    assert [counts for _, counts in recorder.steps[STEPS:]] == [before] * STEPS
    assert "restart=True" in caplog.text


def test_restart_starts_the_schedule_again(tmp_path):
    model, recorder = make_model(), Recorder()
    trainer = make_trainer(model, tmp_path, recorder)
    trainer.remove_callback(pst.PSTCallback)
    trainer.add_callback(pst.PSTCallback(restart=True))
    trainer.train()
    trainer.train()
    assert recorder.steps[STEPS] == recorder.steps[0] == (0, [0] * 12)


def test_an_early_stop_says_how_to_finish(tmp_path, caplog):
    model = make_model()
    with caplog.at_level(logging.WARNING, "pst_kernels"):
        make_trainer(model, tmp_path, StopAt(2)).train()
    assert "training ended at step 2 of 8" in caplog.text
    assert "resume_from_checkpoint" in caplog.text
