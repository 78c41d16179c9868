"""save_sparse: a whole transformers folder whose pruned weights are packed."""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..bypass import weights_read_past_their_layers
from ..layers.block_sparse_linear import BlockSparseLinear
from ..layers.checks import is_conv1d, refuse_meta, whole
from ..layers.experts import PSTExperts
from ..layers.linear import PSTConv1D
from ..layers.pst_layer import PSTLayer
from ..layers.sparse_linear import SparseLinear
from ..masks.patterns import Blocks
from ..operands import FLOATING
from ..targets import is_transformers_model, parameter_uses, weight_key
from . import checked
from .classes import unpruned
from .packed import WEIGHT, Compact, Shape, pack

logger = logging.getLogger("pst_kernels")
LEAST_ZEROS = 0.4  # of a dense layer's weight, from which on it is packed: half of them, rounded, and more
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
KEEP = "as they are"  # a format: layers that store what they keep go on doing so, in the same way


class Packed(NamedTuple):
    state: dict[str, Tensor]
    layers: dict[str, Shape]


def save_sparse(
    model: nn.Module, directory: str | Path, *, format: str = "sparse", tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
) -> None:  # fmt: skip
    """Write a transformers model into a folder: config, generation config, and shards with its pruned weights packed.

    After `import pst_kernels.hf` any `from_pretrained` loads it, and builds a `SparseLinear` or `BlockSparseLinear`
    where a weight is packed, without making the dense one; `load_sparse` does both. The model may be under PST (it is
    saved as it would be merged, and stays as it is), merged into dense layers, or made of sparse layers already. Of
    dense layers those are packed whose weight is zero at 40 % of its places or more, be it by any method.

    Args:
        model: a transformers model.
        directory: made if need be. Its earlier weights are replaced once all new files are written.
        format: "sparse", single weights; "block:B", blocks of B x B, or "block" for what is in blocks of a size of its
            own already; "dense", an ordinary folder without anything of this package in it.
        tokenizer: a tokenizer or processor to save beside it.
        max_shard_size: of a file of weights, in bytes or as "5GB", say.

    Raises before anything is written: TypeError for what is no transformers model; ValueError for a format that is not
    known or does not fit, and when nothing is sparse; RuntimeError for offloaded or shared weights, and for
    layers that were cut over processes.
    """
    if not is_transformers_model(model):
        raise TypeError(
            f"model must be a transformers model, got {type(model).__name__}; save_compressed(model.state_dict(), path)"
            " takes any state dict"
        )
    it: Any = model
    packed = pack_model(model, format)
    config = copy.deepcopy(it.config)
    config.architectures, config.dtype = [type(model).__name__], str(it.dtype).removeprefix("torch.")
    vars(config).pop("quantization_config", None)
    metadata = {"format": "pt"}
    if packed.layers:
        sums = checked.checksums(packed.state)
        config.quantization_config = checked.entry(checked.digest_of(sums))
        metadata = checked.metadata(packed.layers, sums)
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        _write_shards(packed.state, metadata, Path(temporary), max_shard_size)
        if it.can_generate() and getattr(it, "generation_config", None) is not None:
            it.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        config.save_pretrained(temporary)
        move_in(Path(temporary), directory)


def pack_model(model: Any, format: str) -> Packed:
    """A model's state dict with its sparse weights packed, without the tensors that loading ties, and their shapes."""
    size, conv1d = block_size(format), _conv1d_names(model)
    refuse_parts(model)
    state: dict[str, Tensor] = {name: whole(tensor).detach() for name, tensor in model.state_dict().items()}
    shapes: dict[str, Shape] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PSTExperts):  # which stay dense, by every format
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
            state[module.entry(name, WEIGHT)] = module.oriented(module.masked_weight()).contiguous()
    for name, layer in _sparse_layers(model, format):
        if format == "dense":
            dense = dense_weight(layer)
            parts = {WEIGHT: (dense.T if name in conv1d else dense).contiguous()}
        else:
            made = compact(layer, name, format, size)
            if made is None:
                continue
            parts, shapes[name] = pack(made), Shape.of(made, name in conv1d)
        if layer.bias is not None:
            parts["bias"] = state[f"{name}.bias"]
        state = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] != name}
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    if format != "dense" and not shapes:
        raise ValueError(
            f"no layer of the model has zeros to leave out with format={format!r}: a dense one needs"
            f" {LEAST_ZEROS:.0%}; prune it first, or use format='dense'"
        )
    return Packed(_on_the_cpu(model, state), shapes)


def refuse_parts(model: nn.Module) -> None:
    """Raise RuntimeError for a model whose packed layers were cut over processes."""
    for name, module in model.named_modules():
        if (part := getattr(module, "part_of", None)) is not None:
            raise RuntimeError(
                f"{name} is one of {part.ranks} parts of a layer: the model was loaded under tensor parallelism. The"
                " folder that it came from holds it whole; load that in one process"
            )


def _sparse_layers(model: nn.Module, format: str) -> Iterator[tuple[str, Any]]:
    """(name, layer) of PST layers and of those that store what they keep; of dense ones with zeros where they count."""
    uses, zeros_count = parameter_uses(model), format not in ("dense", KEEP)
    bypassed = weights_read_past_their_layers(model) if zeros_count else {}
    for name, module in model.named_modules(remove_duplicate=False):
        layer: Any = module
        if isinstance(module, PSTExperts):
            continue
        if isinstance(module, PSTLayer | Compact):
            refuse_meta(f"the weight of {name}", layer.weight)
            if isinstance(module, PSTLayer) and uses[weight_key(layer.weight)] > 1:
                raise RuntimeError(
                    f"the weight of {name} is shared with another module; untie it first: layer.weight ="
                    " nn.Parameter(layer.weight.clone())"
                )
            yield name, layer
        elif zeros_count and (type(module) is nn.Linear or is_conv1d(module)):
            refuse_meta(f"the weight of {name}", layer.weight)
            if not mostly_zero(layer.weight):
                continue
            tied = uses[weight_key(layer.weight)] > 1
            if tied or name in bypassed:
                logger.warning("%s stays dense: its weight is %s", name, "tied" if tied else "read past the layer")
            else:
                yield name, layer


def move_in(source: Path, target: Path) -> None:
    """Move all files of a folder into another, and remove the weights that those replace. The config comes last."""
    target.mkdir(exist_ok=True)
    new = sorted(source.rglob("*"), key=lambda path: (path.name == "config.json", path))
    for path in new:
        here = target / path.relative_to(source)
        if path.is_dir():
            here.mkdir(exist_ok=True)
        else:
            path.replace(here)
    names = {path.name for path in new}
    for old in target.iterdir():
        if WEIGHT_FILES.fullmatch(old.name) and old.name not in names:
            old.unlink()


def write_index(path: Path, metadata: Mapping[str, Any], weight_map: Mapping[str, str]) -> None:
    """As transformers writes it."""
    content = {"metadata": dict(metadata), "weight_map": dict(weight_map)}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def block_size(format: str) -> int:
    """B of "block:B", else 0. Raises ValueError for a format that is not known."""
    size = format.removeprefix("block:")
    if size != format and size.isascii() and size.isdigit() and int(size) > 0:
        return int(size)
    if format not in ("dense", "sparse", "block", KEEP):
        raise ValueError(f"format={format!r} is not known; use 'sparse', 'block', 'block:64' (say) or 'dense'")
    return 0


def _conv1d_names(model: Any) -> set[str]:
    """Layers whose dense weight is (in, out). What a sparse layer was made of is asked of a model without data."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(isinstance(module, Compact) for module in modules.values()):
        modules |= {name: module for name, module in unpruned(model).named_modules() if is_conv1d(module)}
    return {name for name, module in modules.items() if is_conv1d(module) or isinstance(module, PSTConv1D)}


def mostly_zero(weight: Tensor) -> bool:
    return weight.dtype in FLOATING and weight.numel() > 0 and int((weight == 0).sum()) >= LEAST_ZEROS * weight.numel()


def dense_weight(layer: Any) -> Tensor:
    """Of any layer, as (out, in)."""
    if isinstance(layer, PSTLayer):
        return layer.masked_weight()
    if isinstance(layer, Compact):
        return layer.to_dense()
    return layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()


def compact(layer: Any, name: str, format: str, size: int) -> Compact | None:
    """The layer in a format; None where a dense one has too few blocks without a weight."""
    if format == KEEP and isinstance(layer, Compact):
        return layer
    if format in ("sparse", KEEP):
        return layer if isinstance(layer, SparseLinear) else SparseLinear.from_dense(dense_weight(layer), None)
    if format == "block":
        pattern = layer.pattern if isinstance(layer, PSTLayer) else None
        size = getattr(pattern, "size", 0) if isinstance(pattern, Blocks) else getattr(layer, "block_size", 0)
        if not size:
            raise ValueError(f"format='block' needs a size for {name}, which has no blocks; use 'block:64', say")
    if isinstance(layer, BlockSparseLinear) and layer.block_size == size:
        return layer
    made = BlockSparseLinear.from_dense(dense_weight(layer), None, size)
    if made.sparsity < LEAST_ZEROS and not isinstance(layer, PSTLayer | Compact):
        logger.warning("%s stays dense: it has weights in most blocks of %d", name, size)
        return None
    return made


def _on_the_cpu(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, each with a memory of its own, without what transformers ties again or does not save."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        source = state.get(tied.get(name, ""))
        if name in ignored or (source is not None and source.data_ptr() == tensor.data_ptr()):
            continue
        refuse_meta(name, tensor)
        tensor = tensor.cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return found


def _write_shards(
    state: Mapping[str, Tensor], metadata: dict[str, str], folder: Path, max_shard_size: int | str
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards  # comes with transformers
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for filename, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / filename, metadata)
    if split.is_sharded:
        numbers = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
        write_index(folder / INDEX, {"total_parameters": numbers, **split.metadata}, split.tensor_to_filename)
