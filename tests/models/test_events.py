"""A schedule of few events, the learning rate that is rewound at them, and rates from one number."""

from __future__ import annotations

import pytest
import torch
import toys

import pst_kernels as pst
from pst_kernels.events import Events

transformers = pytest.importorskip("transformers")
CONFIG = pst.PSTConfig(sparsity=0.9, warmup=0.1, cooldown=0.3)


def test_a_large_first_step_and_a_cubic_rest():
    events = Events(first=0.7, count=4)
    assert events.steps(100, CONFIG) == [10, 30, 50, 70]
    found = [events.sparsity_at(step, 100, CONFIG) for step in (0, 9, 10, 29, 30, 50, 69, 70, 99, 100)]
    between = [0.9 - 0.2 * (2 / 3) ** 3, 0.9 - 0.2 * (1 / 3) ** 3]
    assert found == pytest.approx([0.0, 0.0, 0.7, 0.7, *between, between[1], 0.9, 0.9, 0.9])
    assert Events(0.95, 2).sparsity_at(10, 100, CONFIG) == 0.9  # no event prunes more than the end
    assert [Events(0.7, 1).sparsity_at(step, 100, CONFIG) for step in (9, 10)] == [0.0, 0.9]


def test_the_rate_starts_anew_at_each_event():
    events = Events(count=3)  # at 10, 40 and 70 of 100
    rates = [events.rate_at(step, 100, CONFIG) for step in (0, 5, 10, 25, 39, 40, 70, 85, 100)]
    assert rates == pytest.approx([1.0, 0.5, 1.0, 0.5, 1 / 30, 1.0, 1.0, 0.5, 0.0])


def model_of(**settings):
    torch.manual_seed(0)
    return toys.perturb(pst.replace_linear(toys.plain(24, 40, 3), pst.PSTConfig(**{"sparsity": 0.9} | settings)))


def loop(model, steps, schedule, rate, optimizer, first=0):
    for step in range(first, first + steps):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rate.step()


@pytest.mark.parametrize("at", [3, 8])
def test_resumed_in_mid_event_it_ends_with_the_same_bits(at):
    def new():
        model = model_of(freeze=0.2, train_kept=True)
        optimizer = torch.optim.AdamW(pst.parameter_groups(model, 1e-3))
        schedule = pst.SparsitySchedule(model, 10, kind="events", events=3)
        return model, schedule, pst.RewindLR(optimizer, schedule), optimizer

    whole = new()
    loop(whole[0], 10, *whole[1:])
    stopped = new()
    loop(stopped[0], at, *stopped[1:])
    again = new()
    for part, other in zip(again, stopped, strict=True):
        part.load_state_dict(other.state_dict())
    assert again[2].get_last_lr() == stopped[2].get_last_lr()
    loop(again[0], 10 - at, *again[1:], first=at)
    for (name, value), (_, other) in zip(whole[0].state_dict().items(), again[0].state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    with pytest.raises(ValueError, match="this schedule has kind='cubic', the saved one 'events'"):
        pst.SparsitySchedule(again[0], 10).load_state_dict(again[1].state_dict())


def test_under_a_trainer(tmp_path):
    """The sparsity and the rate that the trainer logs after each step, also when it goes on from a checkpoint."""

    def run(steps_done=None):
        torch.manual_seed(0)
        model = toys.perturb(pst.replace_linear(toys.bert(), pst.PSTConfig(sparsity=0.9, cooldown=0.2)))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
            save_steps=5, logging_steps=1, disable_tqdm=True, use_cpu=True, seed=3,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=toys.Examples(),
            callbacks=[pst.PSTCallback(kind="events", events=2, first=0.5)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=steps_done and str(tmp_path / f"checkpoint-{steps_done}"))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return model, [entry["sparsity"] for entry in logs], [entry["learning_rate"] for entry in logs]

    model, sparsity, rates = run()
    assert sparsity == [0.5] * 7 + [0.9] * 3  # after the steps 1 to 10; the events come after 1 and 8
    events = Events(0.5, 2)
    config = pst.PSTConfig(sparsity=0.9, cooldown=0.2)
    assert rates == pytest.approx([1e-3 * events.rate_at(step, 10, config) for step in range(10)], abs=1e-9)
    again, _, its_rates = run(5)
    assert its_rates[5:] == rates[5:]
    for (name, value), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


def test_what_cannot_be_rewound():
    model = model_of()
    with pytest.raises(ValueError, match="kind='steps' is not known; use one of cubic, events"):
        pst.SparsitySchedule(model, 10, kind="steps")
    with pytest.raises(ValueError, match="events must be at least 1"):
        pst.SparsitySchedule(model, 10, kind="events", events=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="the schedule has no events to rewind at"):
        pst.RewindLR(optimizer, pst.SparsitySchedule(model, 10))


def test_groups_from_one_rate():
    model = model_of(beta=1 / 16, train_kept=True)
    groups = {group["name"]: group for group in pst.parameter_groups(model, 1e-4)}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"update": 2e-3, "scores": 5e-4, "kept": 5e-4, "others": 1e-3}
    )
    assert len(groups["update"]["params"]) == 2
    assert len(groups["scores"]["params"]) == 4
    everything = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="lr must be a finite number above 0, got 0"):
        pst.parameter_groups(model, 0)
