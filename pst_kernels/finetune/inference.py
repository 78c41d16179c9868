"""How fast saved models are in use: forwards of one batch of test texts, interleaved, and their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

ROUNDS, TEXTS = 11, 16


def forward_ms(models: Mapping[str, Any], batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Median time of a forward of each model, by name. A noisy stretch of time meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for round_number in range(ROUNDS + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch)
                if round_number:  # the first one warms up
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}
