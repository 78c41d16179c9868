"""`python -m bench host`: launches by hand, and what the roofline makes of the times."""

from __future__ import annotations

import os

import pytest

from bench import __main__ as command
from bench.speed import host

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], host.Row]:
    """One block of every model."""
    return {(row.model, row.provider): row for row in host.rows(rounds=2, blocks=1)}


def test_launches_are_those_of_a_step(measured):
    assert {provider for _, provider in measured} == {host.DENSE, host.LORA, host.KEEP, host.REMAKE}
    for model, (shapes, _) in host.MODELS.items():
        rows = {provider: measured[model, provider] for _, provider in measured}
        assert all(row.layers == len(shapes) for row in rows.values())
        assert [row.ours for row in rows.values()] == [0.0, 0.0, 2.0, 5.0]
        assert [row.masks for row in rows.values()] == [0, 0, 9, 9]
        # y with its bias, dx, dW and the bias's gradient; for ours y and dx, or nothing
        assert rows[host.DENSE].library == 4.0
        assert rows[host.KEEP].library < rows[host.LORA].library
        assert rows[host.DENSE].ratio == 1.0


def test_layer_lists_are_those_of_the_models():
    counts = {model: len(host.linears(model, 8)) for model in host.MODELS}
    assert counts == {"BERT-base": 72, "GPT-2 medium": 96, "Llama-8B": 224}
    assert sum(layer.in_features == 32 for layer in host.linears("BERT-base", 8)) == 12


def test_it_leaves_the_environment_and_the_driver_as_they_were(measured):
    from triton.runtime import driver

    assert "PST_KERNELS_BACKEND" not in os.environ
    assert type(driver._active).__name__ != "Silent"


def test_the_roofline_shows_the_longer_of_host_and_device(measured, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host, "rows", lambda rounds: measured.values())
    assert command.main(["host", "--rounds", "1", "--output", str(tmp_path)]) == 0
    row = measured["Llama-8B", host.KEEP]
    assert host.of_shape(tmp_path, "Llama-8B query")[host.KEEP] == row.with_driver_us
    assert row.with_driver_us > row.layer_us + host.LAUNCH_US * row.ours
    arguments = ["roofline", "--tokens", "16", "16384", "--shapes", "Llama-8B query", "--output", str(tmp_path)]
    capsys.readouterr()
    assert command.main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "Llama-8B query" in line]
    few, many = ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines)
    assert float(few[8]) == pytest.approx(row.with_driver_us, abs=0.06)  # 16 tokens: the device waits for the host
    assert float(many[8]) == float(many[4]) > row.with_driver_us


def test_without_measured_times_the_roofline_shows_none(tmp_path):
    assert host.of_shape(tmp_path, "Llama-8B query") == {}
