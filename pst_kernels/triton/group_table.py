"""A table of all layers of a model on one device, so that one launch serves them all.

Addresses, shapes and scales of the layers lie in device memory, written once. Layers whose kernels are compiled alike
are a group: the same dtypes, ranks and storage order, and all or none of them aligned. A model of one kind of layer is
one group, whatever their shapes. The table keeps alive what it points to; make a new one when a tensor has moved.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operands import integers_on
from . import group_row as row
from . import select, sweep
from .group_layer import TYPES, LayerTensors
from .group_tiles import cut, tile_of
from .sweep import SweepTile, tile_constants, tile_for_words
from .tiles import targets
from .tiles.targets import Platform

RARE = sweep.RARE._replace(block_j=256, vector=1)  # beside what a program keeps of its layer, more would spill
BRACKET = ("W_TYPE", "F_TYPE", "ALIGNED", "RANK_W", "RANK_S", "TRANSPOSED", "maxnreg")  # constants of that kernel


class Kind(NamedTuple):
    """What kernels are compiled for; layers of one kind are a group."""

    weight: torch.dtype
    factors: torch.dtype
    weight_rank: int
    score_rank: int
    unit: bool
    transposed: bool
    aligned: bool

    @classmethod
    def of(cls, layer: LayerTensors) -> Kind:
        factors = layer.factors
        return cls(
            layer.weight.dtype, factors.U.dtype, factors.weight_rank, factors.score_rank, layer.unit, layer.transposed,
            layer.aligned,
        )  # fmt: skip

    def constants(self, tile: SweepTile, platform: Platform) -> dict[str, Any]:
        return {
            "W_TYPE": TYPES[self.weight], "F_TYPE": TYPES[self.factors], "ALIGNED": self.aligned,
            "RANK_W": self.weight_rank, "RANK_S": self.score_rank, "UNIT": self.unit, "TRANSPOSED": self.transposed,
            **tile_constants(tile, platform),
        }  # fmt: skip


class Tiling(NamedTuple):
    """What a kernel over a group is launched with."""

    grid: tuple[int]
    places: Tensor | None  # of each program's tile; None where programs share out the tiles themselves
    constants: dict[str, Any]


class Group:
    """Layers of one kind, heavy ones first, and the memory that their search works in."""

    def __init__(self, kind: Kind, members: Sequence[LayerTensors], masked: torch.dtype | None) -> None:
        self.members = sorted(members, key=lambda layer: -layer.weight.numel())
        self.device = members[0].weight.device
        self.masked_type = None if masked is None else TYPES[masked]
        capacities = [select.capacity_of(layer.weight.numel()) for layer in self.members]
        numels = [layer.weight.numel() for layer in self.members]
        self.can_miss = any(numel > room for numel, room in zip(numels, capacities, strict=True))
        self.room, self.index_type = sum(capacities), torch.int32 if max(numels) < 2**31 else torch.int64
        starts = [sum(capacities[:n]) for n in range(len(numels))]
        self._place(kind, list(zip(capacities, starts, strict=True)))
        self.state = torch.zeros((len(numels), select.SLOTS.value), dtype=torch.int64, device=self.device)
        bins = (len(numels), row.COPIES.value, row.RADIX_BINS.value)
        self.bins = torch.zeros(bins, dtype=torch.int32, device=self.device)
        self.passes: Any = None  # of group_mask.py, made at the first call

    def _place(self, kind: Kind, rooms: list[tuple[int, int]]) -> None:
        """The launches, and the rows of the table; `rooms` are those for candidates, and where they begin."""
        platform, programs = targets.platform(self.device), sweep.programs_wanted(self.device)
        shapes = [layer.along[:2] for layer in self.members]
        tile = tile_of(kind.weight_rank + kind.score_rank, kind.transposed)
        of_words = tile_for_words(tile, kind.transposed)
        usual = cut(shapes, tile, programs)
        of_mask = usual._replace(block_j=of_words.block_j)
        self.gather = Tiling((sum(usual.counts),), usual.places(self.device), kind.constants(tile, platform))
        self.mask = Tiling((sum(of_mask.counts),), of_mask.places(self.device), kind.constants(of_words, platform))
        self.rare = Tiling((programs,), None, kind.constants(RARE, platform))
        self.bracket_constants = {"num_warps": 4} | {
            name: value for name, value in self.gather.constants.items() if name in BRACKET
        }
        rows = [row_of(layer, *room, rows) for layer, room, rows in zip(self.members, rooms, usual.rows, strict=True)]
        self.rows = integers_on(rows, self.device)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Room for their keys and indices: half a byte a weight, and used up within a call, so taken for each."""
        return (
            torch.empty(self.room, dtype=torch.int32, device=self.device),
            torch.empty(self.room, dtype=self.index_type, device=self.device),
        )


def row_of(layer: LayerTensors, capacity: int, first_candidate: int, rows_per_program: int) -> list[int]:
    """The fields of group_row.py."""
    left_w, right_w, left_s, right_s, left_1, right_1 = layer.factors
    if layer.transposed:
        left_w, right_w, left_s, right_s, left_1, right_1 = right_w, left_w, right_s, left_s, right_1, left_1
    n_i, n_j, stride_i, stride_j = layer.along
    tensors = {
        row.WEIGHT: layer.weight, row.LEFT_W: left_w, row.RIGHT_W: right_w, row.LEFT_S: left_s, row.RIGHT_S: right_s,
        row.LEFT_1: left_1, row.RIGHT_1: right_1, row.PRUNED: layer.num_pruned, row.GUESS: layer.guess,
        row.MASK: layer.mask, row.MASKED: layer.masked,
    }  # fmt: skip
    numbers = {
        row.N_I: n_i, row.N_J: n_j, row.STRIDE_I: stride_i, row.STRIDE_J: stride_j, row.CAPACITY: capacity,
        row.FIRST_CANDIDATE: first_candidate, row.INDEX_BITS: max(1, (n_i * n_j - 1).bit_length()),
        row.ROWS: rows_per_program,
    }  # fmt: skip
    found = [0] * row.FIELDS.value
    for slot, tensor in tensors.items():
        found[slot.value] = 0 if tensor is None else tensor.data_ptr()
    for slot, number in numbers.items():
        found[slot.value] = number
    for slot, scale in zip((row.BETA, row.ALPHA1, row.ALPHA2), layer.scales, strict=True):
        found[slot.value] = struct.unpack("<i", struct.pack("<f", scale))[0]
    return found


def by_masked(layers: list[LayerTensors]) -> list[tuple[list[LayerTensors], torch.dtype | None]]:
    """Apart by the dtype of M * W'; those that do not want it go with the first."""
    dtypes = [layer.masked.dtype for layer in layers if layer.masked is not None]
    parts: dict[torch.dtype | None, list[LayerTensors]] = {}
    for layer in layers:
        first = dtypes[0] if dtypes else None
        parts.setdefault(first if layer.masked is None else layer.masked.dtype, []).append(layer)
    return [(members, dtype) for dtype, members in parts.items()]


class MaskTable:
    """All layers of a model on one device; those without a weight have an empty mask already."""

    def __init__(self, layers: Sequence[LayerTensors]) -> None:
        for n, layer in enumerate(layers):
            try:
                layer.check()
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {n} of the table: {error}") from error
        if len({layer.weight.device for layer in layers}) > 1:
            raise ValueError("the layers of a table must be on one device")
        self._places = [layer.place for layer in layers]
        kinds: dict[Kind, list[LayerTensors]] = {}
        for layer in layers:
            if layer.weight.numel():
                kinds.setdefault(Kind.of(layer), []).append(layer.detached())
        self.groups = [Group(kind, *part) for kind, members in kinds.items() for part in by_masked(members)]

    def matches(self, layers: Sequence[LayerTensors]) -> bool:
        """Whether these are the layers, where they were: addresses, shapes, strides, dtypes and scales."""
        return self._places == [layer.place for layer in layers]
