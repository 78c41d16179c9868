"""DistillationTrainer: a `transformers.Trainer` whose model learns from a teacher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from .distillation import Distillation, labelled_rows

TEACHER_LOGITS = "teacher_logits"


class DistillationTrainer(transformers.Trainer):
    """Trains a model, under PST or not, on the labels and on what a teacher says of the same batch.

    Args:
        teacher: a model, or the folder of one, for the same labels or vocabulary; it is frozen and put into evaluation.
        temperature, hardness, hidden_weight: see `Distillation`.
        precompute: ask the teacher once for each training example instead of at every step: for training data that
            gives the same example for the same index each time, and one row of logits a text (classifiers).
        All other arguments are those of `transformers.Trainer`.

    Raises ValueError when the teacher's labels or vocabulary are others, or its blocks where `hidden_weight` is not 0.

    Example:
        trainer = DistillationTrainer(model=model, teacher="runs/dense", hardness=0.5, args=..., train_dataset=...,
                                      callbacks=[PSTCallback()])
    """

    def __init__(
        self, *args: Any, teacher: nn.Module | str | Path, temperature: float = 2.0, hardness: float = 0.5,
        hidden_weight: float = 0.0, precompute: bool = False, **settings: Any,
    ):  # fmt: skip
        self.distillation = Distillation(temperature, hardness, hidden_weight)
        super().__init__(*args, **settings)
        model: Any = self.model
        self.teacher: Any = load_teacher(teacher, model)
        check_teacher(model, self.teacher, hidden_weight)
        self.teacher.requires_grad_(False).eval().to(self.args.device)
        # A mean over a micro-batch's rows is what both losses are, so the trainer must divide by the accumulation.
        self.model_accepts_loss_kwargs = False
        self.causal = type(self.accelerator.unwrap_model(model)).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        if precompute:
            self.train_dataset = WithTeacher(self._precomputed(), self.train_dataset)

    def _precomputed(self) -> Tensor:
        """The teacher's logits of every training example (examples, labels)."""
        if self.distillation.hidden_weight:
            raise ValueError("precompute=True keeps logits alone; use hidden_weight=0.0, or precompute=False")
        data: Any = self.train_dataset
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"precompute=True needs training data with a length, got {type(data).__name__}; use precompute=False"
            )
        found, size = [], max(1, self.args.per_device_eval_batch_size)
        for first in range(0, len(data), size):
            examples = [data[i] for i in range(first, min(first + size, len(data)))]
            batch = self._prepare_inputs(self._get_collator_with_removed_columns(self.data_collator)(examples))
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = self.teacher(**batch).logits
            if logits.dim() != 2:
                raise ValueError(
                    f"precompute=True is for one row of logits a text, but the teacher gives {tuple(logits.shape)}; use"
                    " precompute=False"
                )
            found.append(logits.float().cpu())
        return torch.cat(found)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if TEACHER_LOGITS not in columns:
            columns.append(TEACHER_LOGITS)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # fmt: skip
        logits = inputs.pop(TEACHER_LOGITS, None)
        if not model.training:  # evaluation reports the task's loss
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, real = inputs.get("labels"), inputs.get("attention_mask")
        hidden = {"output_hidden_states": True} if self.distillation.hidden_weight else {}
        if logits is None:
            with torch.no_grad():
                shown = self.teacher(
                    **{k: v for k, v in inputs.items() if k != "labels"} | self._for_teacher(labels) | hidden
                )
        else:
            shown = SimpleNamespace(logits=logits)
        task, own = super().compute_loss(model, {**inputs, **hidden}, True, None)
        rows = labelled_rows(own.logits, labels, self.causal)
        loss = self.distillation(own, shown, loss=task, rows=rows, real=real)
        return (loss, own) if return_outputs else loss

    def _for_teacher(self, labels: Tensor | None) -> dict[str, Tensor]:
        """An encoder-decoder makes the decoder's input of the labels."""
        is_pair = getattr(self.teacher.config, "is_encoder_decoder", False)
        return {"labels": labels} if is_pair and labels is not None else {}


class WithTeacher(Dataset):
    """Training data with the teacher's logits beside each example."""

    def __init__(self, logits: Tensor, data: Any):
        self.logits, self.data = logits, data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.data[index], TEACHER_LOGITS: self.logits[index].tolist()}


def load_teacher(teacher: Any, model: Any) -> nn.Module:
    """The module itself, or a model of the student's kind from a folder."""
    if isinstance(teacher, nn.Module):
        return teacher
    if not isinstance(teacher, (str, Path)):
        raise TypeError(f"teacher must be a model or its folder, got {type(teacher).__name__}")
    if not (Path(teacher) / "config.json").is_file():
        raise FileNotFoundError(f"teacher={str(teacher)!r} is no folder with a config.json; pass a saved model's")
    return type(model).from_pretrained(str(teacher))


def check_teacher(model: Any, teacher: Any, hidden_weight: float) -> None:
    """Raise ValueError that names what differs."""
    own, its = getattr(model, "config", None), getattr(teacher, "config", None)
    if own is None or its is None:
        return
    names = ["vocab_size"]
    if "Classification" in type(model).__name__:
        names.append("id2label")
    if hidden_weight:
        names += ["num_hidden_layers", "hidden_size"]
    for name in names:
        wanted, found = getattr(own, name, None), getattr(its, name, None)
        if wanted != found:
            raise ValueError(
                f"the teacher's {name} is {found!r}, the model's {wanted!r}; a model learns from a teacher of the same"
                " vocabulary and labels"
            )
