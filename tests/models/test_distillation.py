"""Learning from a teacher: the loss by its definition, and a Trainer that does it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import toys
from torch.nn.functional import cross_entropy

import pst_kernels as pst

transformers = pytest.importorskip("transformers")
from pst_kernels.distillation import labelled_rows  # noqa: E402
from pst_kernels.distillation_trainer import WithTeacher  # noqa: E402


def outputs(*shape: int, blocks: int = 3, seed: int = 0, grad: bool = False) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)
    states = [
        torch.randn(4, 5, 6, generator=generator, dtype=torch.float64).requires_grad_(grad) for _ in range(blocks)
    ]
    return SimpleNamespace(logits=logits, hidden_states=states, loss=logits.square().mean())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("hidden_weight", [0.0, 10.0])
def test_the_loss_and_its_gradients(temperature, hardness, hidden_weight):
    student, teacher = outputs(4, 7, grad=True), outputs(4, 7, seed=1)
    real = torch.tensor([[1, 1, 1, 0, 0]] * 4)
    loss = pst.Distillation(temperature, hardness, hidden_weight)(student, teacher, real=real)
    p, q = ((o.logits / temperature).softmax(-1) for o in (teacher, student))
    expected = (1 - hardness) * student.loss + hardness * temperature**2 * (p * (p / q).log()).sum(-1).mean()
    apart = [
        (s[:, :3] - t[:, :3]).square().sum() / t[:, :3].square().sum()
        for s, t in zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
    ]
    expected = expected + hidden_weight * sum(apart) / 2
    leaves = [student.logits, *student.hidden_states]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    for value, right in zip(found, torch.autograd.grad(expected, leaves, allow_unused=True), strict=True):
        if value is None:
            assert right is None or not right.any()
        else:
            torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-12)


def test_only_labelled_tokens_count():
    labels = torch.tensor([[-100, 3, -100, 1], [2, -100, -100, -100]])
    logits = torch.randn(2, 4, 9)
    assert torch.equal(labelled_rows(logits, labels, causal=False), labels != -100)
    shifted = labelled_rows(logits, labels, causal=True)
    assert shifted.tolist() == [[True, False, True, False], [False, False, False, False]]
    assert labelled_rows(torch.randn(2, 9), torch.tensor([1, 2]), causal=False) is None
    learn, teacher = pst.Distillation(hardness=1.0), torch.randn(2, 4, 9)
    both = [SimpleNamespace(logits=t) for t in (logits, teacher)]
    by_hand = learn.divergence(logits[shifted], teacher[shifted])
    torch.testing.assert_close(learn(*both, rows=shifted), by_hand)
    nothing = learn(*both, rows=torch.zeros(2, 4, dtype=torch.bool))
    assert float(nothing) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"hardness": 1.5}, "hardness must be a number from 0 to 1"),
        ({"hidden_weight": -1.0}, "hidden_weight must be a number from 0"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        pst.Distillation(**settings)


def test_outputs_that_do_not_fit():
    learn = pst.Distillation(hidden_weight=1.0)
    with pytest.raises(ValueError, match=r"logits are \(4, 7\), the teacher's \(4, 8\)"):
        learn(outputs(4, 7), outputs(4, 8))
    with pytest.raises(ValueError, match="has 3 hidden states of width 6, the teacher 2"):
        learn(outputs(4, 7), outputs(4, 7, blocks=2))
    with pytest.raises(ValueError, match="pass labels to the model"):
        pst.Distillation()(SimpleNamespace(logits=torch.zeros(1, 2), loss=None), outputs(1, 2))


def trainer_of(model, folder, teacher, data=None, **settings):
    arguments = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
        "weight_decay": 0.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    own = {
        k: settings.pop(k) for k in list(settings) if k in ("gradient_accumulation_steps", "max_steps", "torch_compile")
    }
    return pst.DistillationTrainer(
        model=model, args=transformers.TrainingArguments(**arguments | own),
        train_dataset=toys.Examples() if data is None else data, teacher=teacher, **settings,
    )  # fmt: skip


def models():
    torch.manual_seed(0)
    student, teacher = toys.bert(), toys.bert()
    return pst.replace_linear(student, pst.PSTConfig(sparsity=0.5)), toys.perturb(teacher)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_that_of_the_loss(accumulation, tmp_path):
    """Of the Trainer, and of a loop by hand over the same batches."""
    student, teacher = models()
    by_hand = models()[0]
    trainer = trainer_of(
        student, tmp_path, teacher, hardness=0.7, hidden_weight=2.0, gradient_accumulation_steps=accumulation,
        max_steps=2, optimizers=(torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1), None),
    )  # fmt: skip
    batches = list(trainer.get_train_dataloader())[: 2 * accumulation]
    trainer.train()
    learn = pst.Distillation(2.0, 0.7, 2.0)
    teacher.eval()
    by_hand.train()
    optimizer = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.1)
    for first in range(0, len(batches), accumulation):
        for batch in batches[first : first + accumulation]:
            own, shown = (m(**batch, output_hidden_states=True) for m in (by_hand, teacher))
            (learn(own, shown, real=batch.get("attention_mask")) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, value), (_, other) in zip(student.named_parameters(), by_hand.named_parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)


def test_the_teacher_asked_once_gives_the_same_run(tmp_path):
    runs = []
    for precompute in (False, True):
        student, teacher = models()
        asked = []
        teacher.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        trainer = trainer_of(student, tmp_path, teacher, precompute=precompute, callbacks=[pst.PSTCallback()])
        before = len(asked)
        trainer.train()
        assert (len(asked) - before) == (0 if precompute else 6)
        runs.append(student)
    for (name, value), (_, other) in zip(runs[0].named_parameters(), runs[1].named_parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)
    assert isinstance(trainer.train_dataset, WithTeacher)


def test_evaluation_is_the_tasks_own(tmp_path):
    student, teacher = models()
    trainer = trainer_of(student, tmp_path, teacher, hardness=1.0)
    data = toys.Examples(8, seed=1)
    found = trainer.evaluate(data)["eval_loss"]
    batch = trainer.data_collator([data[i] for i in range(8)])
    student.eval()
    logits = student(**batch).logits
    assert found == pytest.approx(float(cross_entropy(logits, batch["labels"])), rel=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_a_teacher_from_a_folder(tmp_path):
    student, teacher = models()
    teacher.save_pretrained(tmp_path / "teacher")
    trainer = trainer_of(student, tmp_path, tmp_path / "teacher")
    for value, other in zip(trainer.teacher.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(value, other)


def test_a_causal_teacher(tmp_path):
    torch.manual_seed(0)
    student, teacher = pst.replace_linear(toys.gpt2(), pst.PSTConfig(sparsity=0.5)), toys.gpt2()
    tokens = [{"input_ids": torch.randint(50, (7,)), "attention_mask": torch.ones(7).long()} for _ in range(8)]
    data = [{**row, "labels": row["input_ids"]} for row in tokens]
    trainer = trainer_of(student, tmp_path, teacher, data, hardness=1.0)
    assert trainer.causal
    batch = trainer.data_collator(data[:4])
    student.train()
    loss = trainer.compute_loss(student, dict(batch))
    own, shown = student(**batch).logits[:, :-1], teacher.eval()(**batch).logits[:, :-1]
    torch.testing.assert_close(loss, pst.Distillation(hardness=1.0).divergence(own, shown), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="precompute=True is for one row of logits a text"):
        trainer_of(student, tmp_path, teacher, data, precompute=True)


def test_other_teachers_are_refused(tmp_path):
    student, _ = models()
    for teacher, message in (
        (toys.bert(vocab_size=60), "the teacher's vocab_size is 60, the model's 50"),
        (toys.bert(num_labels=5), "the teacher's id2label is"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(student, tmp_path, teacher)
    with pytest.raises(ValueError, match="the teacher's num_hidden_layers is 1, the model's"):
        trainer_of(student, tmp_path, toys.bert(num_hidden_layers=1), hidden_weight=1.0)
    with pytest.raises(FileNotFoundError, match="is no folder with a config"):
        trainer_of(student, tmp_path, tmp_path / "nothing")
    with pytest.raises(TypeError, match="teacher must be a model or its folder, got int"):
        trainer_of(student, tmp_path, 3)
