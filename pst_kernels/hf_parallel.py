"""Tensor parallel loading of a sparse folder: which packed layers transformers' plan cuts, and how a part is set up.

A process loads some rows of a layer that is `colwise` in the plan, some columns of one that is `rowwise`
(export/cut.py). What happens between processes is left to transformers' own styles, which take a layer with
`_hf_quantized_needs_local_tp` for one that holds a part already: they hand on a part of the outputs, or add up what
parts of the columns give and then add the bias, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
import transformers
from torch import Tensor, nn

from .export.cut import Part
from .export.packed import Compact, Shape

GATHERED = ("colwise_gather_output", "colwise_rep")
ROWS, COLUMNS = ("colwise", *GATHERED), ("rowwise", "rowwise_rep", "rowwise_split_input")
WHOLE = (None, "replicate", "mla_kv_a_proj")  # the last one looks at outputs alone
OTHERS = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
INSTEAD = "give it, and what shares its cut, the style 'replicate' in tp_plan"


class Plan(NamedTuple):
    """Styles of layers by their names, in which * stands for numbers. Without any there is one rank."""

    styles: dict[str, str]
    ranks: int

    @classmethod
    def of(cls, model: Any) -> Plan:
        """What transformers is about to cut a model by. Raises ValueError for more than tensor parallelism."""
        config: Any = getattr(model.config, "distributed_config", None)
        for name in OTHERS:
            if getattr(config, name, 1) > 1:
                raise ValueError(
                    f"a model saved by save_sparse is loaded under tensor parallelism alone, got {name}="
                    f"{getattr(config, name)}; leave it out"
                )
        ranks = getattr(config, "tp_size", 1)
        if ranks == 1:
            return cls({}, 1)
        given = config.tp_plan
        return cls({**model.tp_plan, **(given if isinstance(given, dict) else {})}, ranks)

    def style(self, name: str) -> str | None:
        return self.styles.get(_wildcards(name))

    def part(self, name: str, shape: Shape) -> Part | None:
        """What this process holds of a packed layer; None for all of it. Raises ValueError for what cannot be cut."""
        if self.ranks == 1:
            return None
        style = self.style(name)
        if f"{_wildcards(name)}.weight" in self.styles:
            raise ValueError(f"tp_plan names the weight of {name}, which is packed; name the layer itself")
        if style in WHOLE:
            return None
        if style not in (*ROWS, *COLUMNS):
            raise ValueError(
                f"{name} is {style!r} in the tensor parallel plan, and a packed layer is cut by 'colwise' or 'rowwise'"
                f" alone; {INSTEAD}"
            )
        part = Part(shape, 0 if style in ROWS else 1, dist.get_rank(), self.ranks)
        if reason := part.refusal():
            raise ValueError(f"{name} {reason}; load it on another number of processes, or {INSTEAD}")
        return part


def set_up(layer: Compact, part: Part, style: str | None) -> None:
    """Make a layer without data, of the part's size, one that transformers lets be while it cuts a model."""
    it: Any = layer
    it.part_of, it._hf_quantized_needs_local_tp = part, True
    if layer.bias is not None:  # which transformers cuts, or leaves whole beside columns
        layer.bias = nn.Parameter(layer.bias.detach().new_empty(part.whole.out))
    values = layer.weight.detach()
    del layer.weight
    it.register_buffer("weight", values)  # until it is loaded: transformers would cut a Parameter evenly
    if style in GATHERED:
        it.forward = _says_its_width(layer.forward)


def _says_its_width(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Outputs that say that they are a part: of plain ones transformers would take `out_features` for the whole."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    world: Any = dist.group.WORLD
    mesh = functools.cache(lambda kind: DeviceMesh.from_group(world, kind))

    def part_of_outputs(x: Tensor) -> Tensor:
        y = forward(x)
        return DTensor.from_local(y, mesh(y.device.type), [Shard(-1)], run_check=False)

    return part_of_outputs


def _wildcards(name: str) -> str:
    try:
        from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
    except ModuleNotFoundError as error:
        here = transformers.__version__
        raise ImportError(f"tensor parallel loading needs transformers 5.23, got {here}; update it") from error
    return replace_layer_number_by_wildcard(name)
