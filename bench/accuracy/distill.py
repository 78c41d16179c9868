"""Learning from a dense model too: one trained with the same texts, steps and seed, at its own tuned setting.

Sources: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), for the logits;
Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", EMNLP Findings 2020 (arXiv 1909.10351), for
the hidden states, here relative to their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch: the task's loss, logits (n, classes), hidden states (texts, tokens, width) of each
    block and of the embeddings, and which tokens are real, bool (texts, tokens).
    """

    loss: Tensor
    logits: Tensor
    states: tuple[Tensor, ...]
    real: Tensor


@dataclass(frozen=True)
class Distillation:
    """loss = (1 - share) * task + share * T^2 KL(teacher || student) + states * mean over blocks of |s - t|^2 / |t|^2.

    KL is between softmax(logits / T), a mean over the rows of the logits; s and t are hidden states of real tokens.
    """

    share: float = 0.5
    temperature: float = 2.0
    states: float = 0.0

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        total = (1.0 - self.share) * student.loss + self.share * self.divergence(student.logits, teacher.logits)
        return total + self.states * self.distance(student, teacher) if self.states else total

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if not len(student):  # a batch without a masked word
            return student.sum()
        own, wanted = (log_softmax(logits / self.temperature, -1) for logits in (student, teacher))
        return self.temperature**2 * kl_div(own, wanted, reduction="batchmean", log_target=True)

    def distance(self, student: Outputs, teacher: Outputs) -> Tensor:
        pairs = list(zip(student.states, teacher.states, strict=True))[1:]
        wanted = [t[student.real] for _, t in pairs]
        apart = [(s[student.real] - t).square().sum() for (s, _), t in zip(pairs, wanted, strict=True)]
        return torch.stack([a / t.square().sum() for a, t in zip(apart, wanted, strict=True)]).mean()
