"""A run of the device as a CUDA graph: launched as one, so that its time is that of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3  # runs before a graph is captured: kernels are compiled, buffers and the optimizer's state are there


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """What replays `run` as a graph, after WARM_UP runs; capturing runs nothing. It keeps what `run` keeps: a graph
    knows addresses alone.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()

    def replay(kept: Callable[[], Any] = run) -> None:
        graph.replay()

    return replay
