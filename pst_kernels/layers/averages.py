"""What others write into a layer's integer buffers, and through `tensor.data`: noticed where it can be, and mended.

An average of packed masks (AveragedModel with its buffers, an EMA of a whole state dict) is no mask, and one of their
counts lags behind the sparsity. So a layer's copies share with it the count that it was last given, and take that where
their own was written from outside; a mask whose bits do not fit its count is made anew.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import Any

import torch
from torch import Tensor

from ..masks.due import total_of
from ..masks.packing import WORD, unpack_mask
from ..masks.patterns import Pattern

logger = logging.getLogger("pst_kernels")


class Given:
    """The count that a layer was last given by its `sparsity`, a schedule or a checkpoint."""

    def __init__(self, count: int | Tensor, layer: Any = None):
        self.count = count  # a 0-d tensor where a device has counted
        self.mask: Tensor | None = None  # a fixed one
        self.layer = None if layer is None else weakref.ref(layer)

    def __deepcopy__(self, memo: Any) -> Given:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Given, (self.count,)

    def is_of_another(self, layer: Any) -> bool:
        return self.layer is not None and self.layer() is not layer

    def now(self, count: int | Tensor, layer: Any) -> Given:
        """After a layer was given a count. Its copies go on with it, and a copy by itself."""
        if self.is_of_another(layer):
            return Given(count, layer)
        self.count = count
        return self


def share_fixed_mask(layer: Any) -> None:
    """Let copies have the mask of a layer that was fixed, or no more."""
    layer.given = layer.given.now(layer.given.count, layer)
    layer.given.mask = layer.pst_mask.clone() if layer.frozen and not layer.pst_mask.is_meta else None


def mend(layer: Any) -> None:
    """Look for what was written from outside into a layer's count and mask since it was last looked at."""
    count, mask = layer._buffers["pst_num_pruned"], layer._buffers["pst_mask"]
    if type(count) is not Tensor or count.is_meta or layer._shards is not None:
        return
    if layer.given.is_of_another(layer) and total_of((count,)) != layer.seen_count:
        _write_given(layer.given.count, count)
        layer.seen_count = total_of((count,))
    watch = layer.watch
    if watch.made and total_of((mask,)) != watch.mask:
        if fits(layer.pattern, mask, layer._shape[1], int(count)):
            watch.mask = total_of((mask,))
            return
        say_spoilt(layer.full_name)
        layer.mark_stale()
        if layer.frozen and layer.given.mask is not None:
            mask.copy_(layer.given.mask)
            watch.mask = total_of((mask,))
        else:
            watch.mark_stale()


def _write_given(given: int | Tensor, count: Tensor) -> None:
    """Without reading a device's count, which would make the host wait: there it is written whatever it is. A count
    that was another's has moved its version, by which the mask is made anew; the same one again must not.
    """
    if count.is_cpu and int(count) == int(given):
        return
    kept = contextlib.nullcontext() if count.is_cpu else torch.autograd._unsafe_preserve_version_counter(count)
    with torch.no_grad(), kept:
        count.fill_(given)


def fits(pattern: Pattern, mask: Tensor, columns: int, count: int) -> bool:
    """Whether a packed mask (..., out, words) has a pattern's structure, prunes `count`, and nothing in its padding."""
    for packed in mask.reshape(-1, *mask.shape[-2:]):
        kept = unpack_mask(packed, WORD * packed.shape[1])
        if bool(kept[:, columns:].any()) or not pattern.fits(kept[:, :columns], count):
            return False
    return True


def without_averages(layer: Any, state_dict: dict[str, Any], prefix: str) -> bool:
    """Leave averaged integers out of a state dict that is about to be loaded. Returns whether it brings a mask."""
    names = f"{prefix}pst_mask", f"{prefix}pst_num_pruned"
    mask, count = (state_dict.get(name) for name in names)
    held = layer.pst_mask
    if mask is None or mask.is_meta or layer._shards is not None or mask.shape != held.shape:
        return mask is not None  # nothing to look at, or for torch to refuse
    if count is None:
        count = layer.pst_num_pruned
    whole = not mask.is_floating_point() and not count.is_floating_point()
    if whole and (count.is_meta or fits(layer.pattern, mask, layer._shape[1], int(count))):
        return True
    say_spoilt(layer.full_name or prefix.rstrip("."))
    for name, own in zip(names, (held, layer.pst_num_pruned), strict=True):
        state_dict[name] = own.detach().clone()
    return False


def say_spoilt(name: str) -> None:
    """Once a process: what averages one mask averages all of a model's."""
    if not _said:
        _said.append(name)
        logger.warning(
            "the mask of %s does not fit its count, as after averaging a model's integer buffers; it is made anew, and"
            " so are others like it",
            name or "a PST layer",
        )


_said: list[str] = []


def sums(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Numbers that tell tensors from others: the sums of their bits."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tuple(int(t.detach().contiguous().view(bits[t.element_size()]).sum(dtype=torch.int64)) for t in tensors)
