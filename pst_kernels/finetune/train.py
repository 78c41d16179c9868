"""One method, start to end: train with `transformers.Trainer`, save, and judge what was saved.

`run` is called in a process of its own, so that the peak memory of one method is not hidden by the other's. Under
torchrun the processes share each batch, and the first one writes. A run that goes on after a kill takes the
newest whole checkpoint, and removes what is half written.
"""

from __future__ import annotations

import functools
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .. import PSTCallback, load_sparse, merge_and_unload, replace_linear, save_pretrained, save_sparse
from ..distillation_trainer import DistillationTrainer
from ..targets import find_targets
from . import models, presets, processes
from .callbacks import MarkComplete, Progress, Recorder, StopOnNaN, newest_checkpoint
from .data import Dataset, Example
from .inference import TEXTS, forward_ms
from .measure import count_zeros, memory_mb, weights_mb
from .result import Result, read_result, write_result
from .settings import Settings

EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Facts:
    """Of the model before it is trained."""

    base_mb: float  # memory of the process before the model was loaded
    model_numel: int
    trainable: int
    layers: dict[str, int]  # name -> numel of what PST prunes


def run(method: str, settings: Settings, dataset: Dataset, work: Path) -> None:
    """Train `method`, write its checkpoints below `settings.folder`, and `<work>/<method>.json` when all is done."""
    transformers.logging.set_verbosity_error()  # it warns that the head is new, which is the point
    transformers.logging.disable_progress_bar()
    processes.form_group(method)
    if processes.first_says(read_result(work, method) is not None):
        return
    base_mb = memory_mb(peak=False)
    tokenizer = models.load_tokenizer(settings)
    # One seed before both methods, so both start from the same head.
    transformers.set_seed(settings.seed)
    model = models.load_model(settings, dataset.labels)
    dense_numel = sum(p.numel() for p in model.parameters())
    model, layers = _convert(method, settings, model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = Facts(base_mb, dense_numel, trainable, layers)

    checkpoints = work / method
    trainer, recorder = _trainer(method, settings, dataset, model, tokenizer, checkpoints)
    with trainer.args.main_process_first():  # it also removes half-written checkpoints
        newest = newest_checkpoint(checkpoints, settings.steps)
    trainer.train(resume_from_checkpoint=newest)
    if processes.is_first():
        entries = recorder.entries(trainer.state.log_history)
        _save_and_judge(method, settings, dataset, work, trainer, tokenizer, entries, facts)
        shutil.rmtree(checkpoints, ignore_errors=True)
    processes.wait_for_all()


def _convert(method: str, settings: Settings, model: Any) -> tuple[Any, dict[str, int]]:
    """The model to train, and name -> numel of what PST prunes. Raises ConversionError."""
    try:
        config = presets.config(settings, model)
        targets: dict[str, Any] = find_targets(model, config)
        layers = {name: layer.weight.numel() for name, layer in targets.items()}
        return (replace_linear(model, config) if method == "pst" else model), layers
    except (ValueError, TypeError, RuntimeError) as error:
        raise presets.refusal(models.model_name(settings), error) from error


def _save_and_judge(
    method: str, settings: Settings, dataset: Dataset, work: Path, trainer: transformers.Trainer, tokenizer: Any,
    steps: Sequence[dict[str, Any]], facts: Facts,
) -> None:  # fmt: skip
    """Write the trained model, and `<work>/<method>.json` about what was written."""
    peak_mb = max([memory_mb(peak=True), *(entry["peak_mb"] for entry in steps)])
    trained_model: Any = trainer.model
    trained = _predict(trained_model, tokenizer, dataset.test, settings)
    final = settings.folder / method
    building = final.with_name(f".{method}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    if method == "pst":
        save_pretrained(trained_model, building / "adapter")
        sparse = _save_sparse(trained_model, tokenizer, building / "sparse")
        whole, checkpoint_mb = building / "merged", weights_mb(building / "adapter")
        models.save(merge_and_unload(trained_model, safe_merge=True), tokenizer, whole)
    else:
        whole, sparse = building, None
        models.save(trained_model, tokenizer, whole)
        checkpoint_mb = weights_mb(whole)

    saved = _predict(models.load_saved(whole), tokenizer, dataset.test, settings)
    used, inference = _inference(settings, dataset, tokenizer, whole, sparse)
    zeros = count_zeros(whole, facts.layers)
    prunable = sum(facts.layers.values())
    result = Result(
        row={
            "method": method,
            "test_accuracy": _accuracy(saved, dataset.test, dataset.labels),
            "zeros_pruned": zeros.pruned_share,
            "zeros_model": zeros.model_share,
            "trainable": facts.trainable,
            "step_ms": statistics.median(entry["step_ms"] for entry in steps),
            "peak_mb": peak_mb,
            "checkpoint_mb": checkpoint_mb,
            "inference_ms": inference,
            "folder_mb": weights_mb(sparse or whole),
        },
        details={
            "model_numel": facts.model_numel,
            "prunable_numel": prunable,
            "trainable_of_model": facts.trainable / facts.model_numel,
            # movement pruning trains every weight, and a score for every prunable one
            "trainable_of_movement": facts.trainable / (facts.model_numel + prunable),
            "memory_before_model_mb": facts.base_mb,
            "saved_model_mb": weights_mb(whole),
            "inference": used,
            "saved_and_trained_agree": bool((saved.argmax(1) == trained.argmax(1)).all()),
            "saved_and_trained_max_difference": float(np.abs(saved - trained).max()),
            "zeros": zeros.to_dict(),
        },
        history=_history(trainer.state.log_history),
    )
    shutil.rmtree(final, ignore_errors=True)
    building.rename(final)
    write_result(work, method, result)


def _save_sparse(model: Any, tokenizer: Any, folder: Path) -> Path | None:
    """The folder that stays sparse; None, and said, where it can't be had."""
    try:
        save_sparse(model, folder, tokenizer=tokenizer)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"note: no folder of the sparse model: {error}")
        return None
    return folder


def _inference(
    settings: Settings, dataset: Dataset, tokenizer: Any, whole: Path, sparse: Path | None
) -> tuple[dict[str, float], float]:
    """Times by what is used, and this method's own: of the sparse folder where there is one."""
    used = {"this": load_sparse(sparse) if sparse is not None else models.load_saved(whole)}
    if sparse is not None and (settings.folder / "dense").is_dir():
        used["dense"] = models.load_saved(settings.folder / "dense")
    texts = [example.text for example in dataset.test[:TEXTS]]
    batch = tokenizer(texts, truncation=True, max_length=settings.max_length, padding=True, return_tensors="pt")
    found = forward_ms({name: model.eval() for name, model in used.items()}, batch)
    return found, found["this"]


def _trainer(
    method: str, settings: Settings, dataset: Dataset, model: Any, tokenizer: Any, checkpoints: Path
) -> tuple[transformers.Trainer, Recorder]:
    recorder = Recorder()
    every = max(1, math.ceil(settings.steps / settings.evaluations))
    arguments = transformers.TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // processes.count(),
        per_device_eval_batch_size=EVALUATION_BATCH,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=max(1, settings.steps // 250),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        # The one before the newest is needed until the newest is complete.
        save_total_limit=2,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=[],
        # said outright, because Accelerate otherwise takes several processes on CPUs for one
        use_cpu=not torch.accelerator.is_available(),
        # else the trainer multiplies the loss by the number of processes, expecting the model to divide it by the texts
        # of all, which sequence classifiers do not do
        average_tokens_across_devices=False,
        # every factor is used in every forward; a dense model may have weights that are not
        ddp_find_unused_parameters=False if method == "pst" else None,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    if arguments.world_size != processes.count():
        raise RuntimeError(
            f"Accelerate sees {arguments.world_size} processes, torchrun started {processes.count()}; start the job"
            " with torchrun or accelerate launch, and without other ACCELERATE_ variables"
        )
    callbacks = [*([PSTCallback()] if method == "pst" else []), recorder, StopOnNaN(), MarkComplete()]
    train = models.encode(dataset.train, dataset.labels, tokenizer, settings.max_length)
    if processes.is_first():
        tokens = sum(len(text["input_ids"]) for text in train)
        callbacks.append(Progress(method, tokens / math.ceil(len(train) / settings.batch_size)))
    teacher = settings.teacher_folder if method == "pst" else None
    kind: Any = transformers.Trainer
    if teacher is not None:
        learn: Any = {"teacher": teacher, "hardness": settings.hardness, "temperature": settings.temperature}
        kind = functools.partial(DistillationTrainer, precompute=True, **learn)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=models.encode(dataset.validation, dataset.labels, tokenizer, settings.max_length),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=_metrics,
        # An encoder-decoder gives its hidden states after the logits, as long as the longest text of the batch.
        preprocess_logits_for_metrics=lambda outputs, _: outputs[0] if isinstance(outputs, tuple) else outputs,
        optimizers=(torch.optim.AdamW(presets.groups(method, settings, model), weight_decay=0.0, fused=True), None),
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, recorder


def _metrics(evaluation: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(evaluation.predictions, 1) == evaluation.label_ids).mean())}


def _history(log: Sequence[dict[str, Any]]) -> dict[str, list]:
    """Columns for the plot, from the trainer's log, which goes through its checkpoints."""
    losses = [entry for entry in log if "loss" in entry]
    validation = [entry for entry in log if "eval_accuracy" in entry]
    return {
        "step": [entry["step"] for entry in losses],
        "loss": [entry["loss"] for entry in losses],
        "sparsity": [entry.get("sparsity", 0.0) for entry in losses],
        "validation_step": [entry["step"] for entry in validation],
        "validation_accuracy": [entry["eval_accuracy"] for entry in validation],
    }


def _predict(model: Any, tokenizer: Any, examples: Sequence[Example], settings: Settings) -> np.ndarray:
    """Logits (texts, labels)."""
    model.eval()
    rows = []
    with torch.inference_mode():
        for first in range(0, len(examples), EVALUATION_BATCH):
            texts = [example.text for example in examples[first : first + EVALUATION_BATCH]]
            batch = tokenizer(texts, truncation=True, max_length=settings.max_length, padding=True, return_tensors="pt")
            rows.append(model(**batch.to(model.device)).logits.float().cpu().numpy())
    return np.concatenate(rows)


def _accuracy(logits: np.ndarray, examples: Sequence[Example], labels: Sequence[str]) -> float:
    return float(np.mean([labels[i] == example.label for i, example in zip(logits.argmax(1), examples, strict=True)]))
