"""The one place that reads test data: a model trained with the setting that validation chose is judged once."""

from __future__ import annotations

from typing import Any

from . import tasks


def judge(model: Any, task: tasks.Task) -> float:
    return task.judge(model, tasks.test_texts(task.source))
