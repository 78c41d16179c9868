"""A layer that stores parts of its weight: how many there are is up to the state dict that it loads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import autocasts


class StoredParts(nn.Module):
    """`PARTS` names its tensors, the weight first; `_wrong` says what keeps others from being such parts, and `_take`
    puts them in the place of its own."""

    PARTS: ClassVar[tuple[str, str, str]]
    in_features: int
    part_of: Any = None  # loaded under tensor parallelism: which part of which layer this is, an export.cut.Part

    def _wrong(self, weight: Tensor, one: Tensor, other: Tensor, /) -> str | None:
        raise NotImplementedError

    def _take(self, weight: Tensor, one: Tensor, other: Tensor, /) -> None:
        raise NotImplementedError

    @staticmethod
    def _goes_direct(x: Tensor) -> bool:
        """Whether a product may go past the dispatcher, which costs as much as that of a small layer."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and type(x) is Tensor

    def _check(self, x: Tensor, weight: Tensor) -> None:
        """Raise ValueError or TypeError for an input that does not fit."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (..., {self.in_features}), got shape {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"weight is on {weight.device} but x is on {x.device}; move the layer or the input")
        dtype = weight.dtype
        if x.dtype is not dtype and not (x.is_floating_point() and autocasts(x)):
            raise TypeError(f"x is {x.dtype} but weight is {dtype}; cast x with x.to({dtype}), or use torch.autocast")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        given = [state_dict.get(f"{prefix}{name}") for name in self.PARTS]
        if all(isinstance(tensor, Tensor) for tensor in given):
            if not any(tensor.is_meta for tensor in given) and (wrong := self._wrong(*given)):
                errors.append(f"{prefix.rstrip('.') or 'this layer'} was given {wrong}")
                return
            own = [getattr(self, name) for name in self.PARTS]
            if given[0].shape != own[0].shape:  # another mask than this layer's
                self._take(*(mine.new_empty(new.shape) for mine, new in zip(own, given, strict=True)))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
