"""Tensor parallelism: PST layers whose weight is cut by rows or columns over a group of processes.

Cut they are by torch's own styles, after the conversion:

    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

Each process scores, masks and multiplies its own shard; no weight is gathered. The threshold is that of the whole
matrix (sharded_selection.py), so the mask depends on the number of processes only where scores differ by rounding. The
state dict holds the whole mask, one bit a weight, which every process gathers when it is asked for; a checkpoint
therefore loads into any number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .. import ops
from ..functional import Options, check, masked_linear, operand_dtype
from ..masks.guess import Guess
from ..masks.packing import pack_mask, unpack_mask
from ..masks.refresh import Weights, refresh
from ..masks.sharded_selection import ShardPosition, select
from ..operands import Factors, MaskedWeight, Scales

SCORES = 1 << 19  # made at once
# Which dimension of a factor runs along the weight's rows (0) or columns (1), by the factor's place in layer.factors.
RUNS_ALONG = ((0, 0), (1, 1), (0, 0), (1, 1), (0, 0), (1, 0))  # U V A B R C: (of the weight, of the factor)


def take_over(layer: Any) -> Shards:
    """Give a layer that torch has cut the buffers of its shard. Raises ValueError or RuntimeError for other cuts."""
    config = layer.config
    for name, needed in (("score_interval", 1), ("freeze", 0.0), ("allocation", "uniform"), ("magnitude", "plain")):
        if getattr(config, name) != needed:
            raise RuntimeError(
                f"{name}={getattr(config, name)!r} does not run under tensor parallelism; use {name}={needed!r}"
            )
    shards = Shards(layer.weight)
    layer.pst_num_pruned = layer.pst_num_pruned.to_local().clone()
    layer.pst_guess = layer.pst_guess.to_local().clone()
    layer.pst_mask = shards.cut_mask(layer.pst_mask.to_local())
    layer.mark_stale()
    return shards


class Shards:
    """How a weight (out, in) is cut: by rows (dim 0, ColwiseParallel) or by columns (dim 1, RowwiseParallel)."""

    def __init__(self, weight: DTensor):
        placement = weight.placements[0]
        if weight.device_mesh.ndim != 1 or not isinstance(placement, Shard):
            raise RuntimeError(
                f"the weight is laid out as {weight.placements} over a mesh of {weight.device_mesh.ndim} dimensions;"
                " cut PST layers with ColwiseParallel or RowwiseParallel over a mesh of one dimension"
            )
        self.mesh, self.dim = weight.device_mesh, placement.dim
        self.group: dist.ProcessGroup = self.mesh.get_group(0)
        self.rank, self.ranks = self.mesh.get_local_rank(0), self.mesh.size(0)
        self.shape = tuple(weight.shape)
        length = self.shape[self.dim]
        self.step = -(-length // self.ranks)  # as torch.chunk cuts
        self.first, self.last = (min((self.rank + i) * self.step, length) for i in (0, 1))
        if self.step * (self.ranks - 1) >= length:
            raise ValueError(
                f"a weight {self.shape} cut along dimension {self.dim} leaves some of {self.ranks} processes without a"
                " part; use fewer, or leave this layer out of the plan"
            )

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            raise TypeError(
                f"x is a {type(x).__name__} but the weight is sharded; cut the layer with parallelize_module, whose"
                " hooks lay out its input"
            )
        weight, bias, factors = self._operands(layer)
        self._refresh(layer, weight, factors.map(Tensor.detach))
        if self.dim == 0:
            local = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        else:
            local = x.redistribute(placements=[Shard(x.dim() - 1)]).to_local()
        operands = MaskedWeight(weight, factors, layer.pst_mask, layer.scales)
        check(local, operands, bias)
        y = masked_linear(local, operands, bias, operand_dtype(local), Options(layer.config.through_magnitude))
        shape = torch.Size((*y.shape[:-1], self.shape[0]))
        placement = Shard(y.dim() - 1) if self.dim == 0 else Partial()
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, self.mesh, [placement], run_check=False, shape=shape, stride=stride)

    def refresh(self, layer: Any) -> None:
        """Compute this shard's mask if it is due; every process of the group must call it."""
        with torch.no_grad():
            weight, _, factors = self._operands(layer)
            self._refresh(layer, weight, factors)

    def whole_mask(self, packed: Tensor) -> Tensor:
        """The packed mask of the whole weight, from every process's own."""
        kept = unpack_mask(packed, self._local_shape[1])
        padded = kept.new_zeros([self.step if i == self.dim else n for i, n in enumerate(self.shape)])
        padded.narrow(self.dim, 0, self.last - self.first).copy_(kept)
        own = pack_mask(padded)
        everyones = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(everyones, own, group=self.group)
        masks = [unpack_mask(one, padded.shape[1]) for one in everyones]
        return pack_mask(torch.cat(masks, self.dim).narrow(self.dim, 0, self.shape[self.dim]).contiguous())

    def cut_mask(self, whole: Tensor) -> Tensor:
        """This shard's packed mask, from that of the whole weight."""
        kept = unpack_mask(whole, self.shape[1])
        return pack_mask(kept.narrow(self.dim, self.first, self.last - self.first).contiguous())

    @property
    def _local_shape(self) -> tuple[int, int]:
        rows, columns = (self.last - self.first if i == self.dim else n for i, n in enumerate(self.shape))
        return rows, columns

    def _operands(self, layer: Any) -> tuple[Tensor, Tensor | None, Factors]:
        """Weight, bias and factors as this shard needs them, with gradients that flow back to the whole ones.

        A factor that runs along the cut is cut like the weight; of the others every process needs all, and their
        gradients are summed over the group.
        """
        if layer.weight.device_mesh != self.mesh:
            raise RuntimeError(
                "the weight was cut a second time, by fully_shard for example; tensor parallel PST layers do not"
                " support that outside a forward"
            )
        factors = []
        for factor, (along, axis) in zip(layer.factors, RUNS_ALONG, strict=True):
            layout = (Shard(axis), Shard(axis)) if along == self.dim else (Replicate(), Partial())
            factors.append(factor.redistribute(placements=[layout[0]]).to_local(grad_placements=[layout[1]]))
        bias = None if layer.bias is None else self._bias(layer.bias)
        return layer.weight.to_local(), bias, Factors(*factors)

    def _bias(self, bias: DTensor) -> Tensor | None:
        if self.dim == 0:
            return bias.redistribute(placements=[Shard(0)]).to_local()
        # the outputs of all processes are summed, so one of them adds the bias
        if self.rank and not bias.requires_grad:
            return None
        local = bias.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return local * 0 if self.rank else local

    def _refresh(self, layer: Any, weight: Tensor, factors: Factors) -> None:
        watched = (layer.weight, *layer.factors)  # the local parts are made anew at every look
        with torch.no_grad():
            refresh(self, Weights(weight, factors, layer.scales), layer.mask_state(), layer.watch, sharded=watched)

    def prune_mask(
        self, weight: Tensor, factors: Factors, scales: Scales, num_pruned: Tensor, guess: Tensor, _masked: None
    ) -> Tensor:
        """This shard's packed mask, under the threshold of the whole matrix."""
        k = int(num_pruned)
        kept = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        if k == 0:
            return pack_mask(kept)
        U, V, A, B, R, C = factors

        def scores():
            step = max(1, SCORES // weight.shape[1])
            for start in range(0, len(weight), step):
                rows = slice(start, start + step)
                yield rows, ops.scores(weight[rows], U[rows], V, A[rows], B, R[rows], C, *scales)

        first = (self.first, 0) if self.dim == 0 else (0, self.first)
        position = ShardPosition(*first, *self.shape)
        last, fraction = Guess.load(guess), k / position.numel
        chosen = select(scores, position, k, last.bracket(fraction), kept, self.group)
        last.update(guess, chosen, fraction)
        return pack_mask(kept)
