"""What a GPU day alone runs of places.py, with stand-ins for CUDA: which calls are made, and in which order."""

from __future__ import annotations

import contextlib

import pytest
import torch
from places import CUDA, TORCH, WARM_UP, Place


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            made.append("wait")

    class Graph:
        def replay(self) -> None:
            made.append("replay")

    @contextlib.contextmanager
    def graph(_: Graph, stream: Stream):
        made.append("capture")
        yield
        made.append("captured")

    def set_mode(mode: int | str) -> None:
        made.append(f"mode {mode}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return made


def test_a_graph_is_captured_after_the_warm_up(calls: list[str]) -> None:
    replay = Place(CUDA).captured(lambda: calls.append("step"))
    replay()
    assert calls == ["wait", *["step"] * WARM_UP, "wait", "capture", "step", "captured", "replay"]


def test_waiting_is_an_error_around_the_calls_alone(calls: list[str]) -> None:
    def call() -> list[torch.Tensor]:
        calls.append("call")
        return [torch.zeros(2)]

    Place(CUDA).twice(call)
    assert calls == ["mode error", "call", "mode 0"] * 2
    with pytest.raises(ZeroDivisionError), Place(CUDA).without_waiting():
        raise ZeroDivisionError
    assert calls[-1] == "mode 0"


def test_different_bits_are_noticed() -> None:
    values = iter([torch.tensor(0.0), torch.tensor(-0.0)])
    with pytest.raises(AssertionError, match="differ in their bits"):
        Place(TORCH).twice(lambda: [next(values)])
