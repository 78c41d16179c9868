"""Learning from a teacher: the loss of a model that also imitates another one's outputs.

Sources: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), for the logits;
Jiao et al., "TinyBERT", EMNLP Findings 2020 (arXiv 1909.10351), for the hidden states, here relative to their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from .config import check_positive
from .operands import compute_dtype

IGNORED = -100  # the label of a token that has none


@dataclass(frozen=True)
class Distillation:
    """loss = (1 - hardness) * task + hardness * T^2 KL(teacher || student) + hidden_weight * distance.

    Args:
        temperature: T, by which both models' logits are divided.
        hardness: share of the teacher, in [0, 1]; at 1 the labels have no say.
        hidden_weight: of the mean over blocks of |s - t|^2 / |t|^2, s and t the hidden states of real tokens. 0 leaves
            them out; else both models must have the same number of blocks and the same width.

    Example for a loop of one's own:
        learn = Distillation(temperature=2.0, hardness=0.5)
        with torch.no_grad():
            shown = teacher(**batch)
        loss = learn(model(**batch), shown)
    """

    temperature: float = 2.0
    hardness: float = 0.5
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        for name, value, most in (
            ("hardness", self.hardness, 1.0),
            ("hidden_weight", self.hidden_weight, float("inf")),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= most:
                raise ValueError(f"{name} must be a number from 0{' to 1' if most == 1.0 else ''}, got {value!r}")

    def __call__(
        self, student: Any, teacher: Any, *, loss: Tensor | None = None, rows: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Of two transformers outputs for the same batch.

        Args:
            student, teacher: with `logits`, and `hidden_states` where `hidden_weight` is not 0.
            loss: of the task; the student's own `loss` if None.
            rows: bool, which rows of the logits (all dimensions but the last) count; all if None. See `labelled_rows`.
            real: bool or 0 and 1 (texts, tokens), which tokens are real; all if None.
        """
        total: Any = 0.0
        if self.hardness < 1.0:
            task = student.loss if loss is None else loss
            if task is None:
                raise ValueError(
                    "the student's outputs hold no loss; pass labels to the model, or loss=, or hardness=1.0"
                )
            total = (1.0 - self.hardness) * task
        if self.hardness:
            total = total + self.hardness * self.divergence(student.logits, teacher.logits, rows)
        if self.hidden_weight:
            total = total + self.hidden_weight * distance(student.hidden_states, teacher.hidden_states, real)
        return total

    def divergence(self, student: Tensor, teacher: Tensor, rows: Tensor | None = None) -> Tensor:
        """T^2 KL(teacher || student), a mean over the rows that count."""
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; both models"
                " must have the same labels, or the same vocabulary"
            )
        student, teacher = (t[rows] if rows is not None else t.flatten(0, -2) for t in (student, teacher))
        if not len(student):  # a batch without a labelled token
            return student.sum()
        wide = compute_dtype(student.dtype)
        own, wanted = (log_softmax(logits.to(wide) / self.temperature, -1) for logits in (student, teacher))
        return self.temperature**2 * kl_div(own, wanted, reduction="batchmean", log_target=True)


def distance(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """The mean over blocks of |s - t|^2 / |t|^2; the first hidden states, those of the embeddings, are left out."""
    if student is None or teacher is None:
        raise ValueError("hidden_weight needs the hidden states; call both models with output_hidden_states=True")
    shapes = [[tuple(t.shape) for t in states] for states in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the student has {len(student)} hidden states of width {student[0].shape[-1]}, the teacher"
            f" {len(teacher)} of width {teacher[0].shape[-1]}; use hidden_weight=0.0, or a teacher of the same size"
        )
    kept = slice(None) if real is None else real.bool()
    wide = compute_dtype(student[0].dtype)
    pairs = [(s[kept].to(wide), t[kept].to(wide)) for s, t in list(zip(student, teacher, strict=True))[1:]]
    return torch.stack([(s - t).square().sum() / t.square().sum() for s, t in pairs]).mean()


def labelled_rows(logits: Tensor, labels: Tensor | None, causal: bool) -> Tensor | None:
    """Which rows of the logits answer to a label, bool; None where that is every row, as of a text's class.

    With `causal` the logits of a token are compared with the label of the next one.
    """
    if labels is None or logits.dim() != labels.dim() + 1 or labels.dim() < 2:
        return None
    rows = labels != IGNORED
    if causal:
        rows = torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], 1)
    return rows
