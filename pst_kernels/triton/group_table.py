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
import triton
from torch import Tensor

from ..masks.packing import WORD
from . import group_row as row
from . import select, walk
from .group_layer import TYPES, LayerTensors

SHORTEST = 64  # band: at ranks 8 + 8 it reads a byte of factors a weight
BRACKET = ("W_TYPE", "F_TYPE", "ALIGNED", "RANK_W", "RANK_S", "TRANSPOSED", "maxnreg")  # constants of that kernel
ROUNDS = 2  # of programs over the whole device, at least: the last one is seldom full


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

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "W_TYPE": TYPES[self.weight], "F_TYPE": TYPES[self.factors], "ALIGNED": self.aligned,
            "RANK_W": self.weight_rank, "RANK_S": self.score_rank, "UNIT": self.unit, "TRANSPOSED": self.transposed,
        }  # fmt: skip


class Launch(NamedTuple):
    """Of one kernel over a group."""

    grid: tuple[int]
    places: Tensor | None  # of each program's tile; None where programs share out the tiles themselves
    constants: dict[str, Any]


class Group:
    """Layers of one kind, heavy ones first, and the memory that their search works in."""

    def __init__(self, kind: Kind, members: Sequence[LayerTensors], masked: torch.dtype | None) -> None:
        self.members = sorted(members, key=lambda layer: -layer.weight.numel())
        self.kind, self.device = kind, members[0].weight.device
        self.masked_type = None if masked is None else TYPES[masked]
        shapes = [layer.along[:2] for layer in self.members]
        tile = best_tile(kind.weight_rank + kind.score_rank, shapes)
        spans = spans_of(shapes, tile, walk.programs_wanted(self.device))
        of_words = tile._replace(block_i=WORD, block_j=128, vector=1, warps=8) if kind.transposed else tile
        self.gather, self.mask = self._launch(shapes, spans, tile), self._launch(shapes, spans, of_words)
        self.bracket_constants = {name: value for name, value in self.gather.constants.items() if name in BRACKET} | {
            "num_warps": 4
        }
        self.rare = Launch((walk.programs_wanted(self.device),), None, self._constants(walk.RARE))
        numels = [layer.weight.numel() for layer in self.members]
        capacities = [select.capacity_of(numel) for numel in numels]
        self.can_miss = any(numel > room for numel, room in zip(numels, capacities, strict=True))
        self.room, self.index_type = sum(capacities), torch.int32 if max(numels) < 2**31 else torch.int64
        rows = [
            row_of(layer, capacity, sum(capacities[:n]), span, count_tiles(shape, span, tile))
            for n, (layer, capacity, span, shape) in enumerate(
                zip(self.members, capacities, spans, shapes, strict=True)
            )
        ]
        self.rows = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.state = torch.zeros((len(rows), select.SLOTS.value), dtype=torch.int64, device=self.device)
        self.bins = torch.zeros(
            (len(rows), row.COPIES.value, row.RADIX_BINS.value), dtype=torch.int32, device=self.device
        )

    def _constants(self, tile: walk.Tile) -> dict[str, Any]:
        return self.kind.constants | walk._constants(tile, self.device)

    def _launch(self, shapes: list[tuple[int, int]], spans: list[int], tile: walk.Tile) -> Launch:
        places = [
            layer + row.LAYERS.value * (band + row.BANDS.value * block)
            for layer, ((n_i, n_j), span) in enumerate(zip(shapes, spans, strict=True))
            for band in range(triton.cdiv(n_i, span))
            for block in range(triton.cdiv(n_j, tile.block_j))
        ]
        return Launch(
            (len(places),), torch.tensor(places, dtype=torch.int64, device=self.device), self._constants(tile)
        )

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Room for their keys and indices: half a byte a weight, and used up within a call, so taken for each."""
        return (
            torch.empty(self.room, dtype=torch.int32, device=self.device),
            torch.empty(self.room, dtype=self.index_type, device=self.device),
        )


def best_tile(ranks: int, shapes: list[tuple[int, int]]) -> walk.Tile:
    """Of those for so many ranks, the one that computes the least beside the weights."""
    tiles = [walk.tile_of(ranks, n_j) for n_j in (1024, 512)]
    return min(tiles, key=lambda tile: sum(n_i * triton.cdiv(n_j, tile.block_j) * tile.block_j for n_i, n_j in shapes))


def count_tiles(shape: tuple[int, int], span: int, tile: walk.Tile) -> int:
    n_i, n_j = shape
    return triton.cdiv(n_i, span) * triton.cdiv(n_j, tile.block_j)


def spans_of(shapes: list[tuple[int, int]], tile: walk.Tile, programs: int) -> list[int]:
    """The length of each layer's bands: equal within a layer, whole words, as long as leaves enough programs in all."""

    def spans(longest: int) -> list[int]:
        return [triton.cdiv(triton.cdiv(n_i, triton.cdiv(n_i, longest)), WORD) * WORD for n_i, _ in shapes]

    longest = walk.LONGEST
    while longest > SHORTEST and ROUNDS * programs > sum(
        count_tiles(shape, span, tile) for shape, span in zip(shapes, spans(longest), strict=True)
    ):
        longest //= 2
    return spans(longest)


def row_of(layer: LayerTensors, capacity: int, first_candidate: int, span: int, tiles: int) -> list[int]:
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
        row.FIRST_CANDIDATE: first_candidate, row.INDEX_BITS: max(1, (n_i * n_j - 1).bit_length()), row.SPAN: span,
        row.TILES: tiles,
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
    dtypes = list(dict.fromkeys(layer.masked.dtype for layer in layers if layer.masked is not None)) or [None]
    parts: dict[torch.dtype | None, list[LayerTensors]] = {dtype: [] for dtype in dtypes}
    for layer in layers:
        parts[dtypes[0] if layer.masked is None else layer.masked.dtype].append(layer)
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
