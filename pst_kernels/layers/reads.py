"""Who reads a PST layer's weight: another module that never calls the layer bypasses it, and PEFT would merge into it.

Told from the frame that reads, and only outside of compiled graphs. What the source of a class tells before the
conversion is in `bypass.py`; this is for the rest.
"""

from __future__ import annotations

import functools
import linecache
import logging
import re
from collections.abc import Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from ..masks import due

logger = logging.getLogger("pst_kernels")
HARMLESS = re.compile(
    r"\.weight\.(dtype|device|shape|requires_grad|ndim|numel|size|is_\w+|data_ptr)\b|isinstance|hasattr"
)
SET_UP = re.compile(r"(^|_)(init|reset|tie|repr|load|save|prune|resize|apply)")


def note(layer: Any, frame: FrameType) -> None:
    """Note who reads a weight. Raises RuntimeError when PEFT would merge an adapter into it."""
    reader = frame.f_globals.get("__name__", "")
    if reader.startswith(("pst_kernels.", "torch.")):
        return
    code = frame.f_code
    if reader.startswith("peft.") and "merge" in code.co_name:
        raise RuntimeError(
            f"PEFT would merge an adapter into the frozen weight of {layer.full_name or 'a PST layer'}, of which the"
            " mask then prunes a part; call pst_kernels.merge_and_unload(model) first, PEFT's after it"
        )
    if layer.called or layer.merged or layer.read_by or not _counts(code, frame.f_lineno):
        return
    owner = frame.f_locals.get("self")
    if isinstance(owner, nn.Module) and owner is not layer:
        layer.read_by = f"{type(owner).__qualname__}.{code.co_name}"


@functools.lru_cache(maxsize=1024)
def _counts(code: CodeType, line: int) -> bool:
    """Whether a line of code that reads a weight may compute with it."""
    if code.co_varnames[:1] != ("self",) or SET_UP.search(code.co_name):
        return False
    return not HARMLESS.search(linecache.getline(code.co_filename, line))


def notice_rewritten(layer: Any) -> None:
    """Say once that a frozen weight was written in place since the last look, other than by loading."""
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_inference():
        return
    seen, now = layer.seen_weight, (id(weight), weight.data_ptr(), weight._version)
    # A process group may write the same numbers anew, when a model is wrapped for instance.
    if now == seen or _in_process_group():
        return
    layer.seen_weight = now
    if seen is not None and seen[:2] == now[:2] and not layer.rewritten:
        layer.rewritten = True
        name = layer.full_name or "a PST layer"
        logger.warning(
            "the frozen weight of %s was written in place after the conversion, and its mask follows the new values;"
            " if the model itself does so, convert it with exclude_modules=[%r]",
            name,
            name,
        )


def _in_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def refuse_bypassed(layers: Sequence[tuple[str, Any]]) -> None:
    """Raise RuntimeError for layers that were never called while another module computed with their weights."""
    for _, layer in layers:
        # a compiled layer does not say that it was called, but its factors have a gradient
        layer.called = layer.called or layer.pst_V.grad is not None
    found = {name or layer.full_name: layer.read_by for name, layer in layers if layer.read_by and not layer.called}
    if found:
        names = list(found)
        raise RuntimeError(
            f"{', '.join(names)}: never called, but {next(iter(found.values()))} reads the weight, so it is not pruned"
            f" there and its factors do not learn; convert the model again with exclude_modules={names!r}"
        )


def _after_step(layers: Sequence[Any]) -> None:
    refuse_bypassed([(layer.full_name, layer) for layer in layers if layer.read_by])


due.after_steps.append(_after_step)
