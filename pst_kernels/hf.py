"""Folders written by `save_sparse`, for transformers: after `import pst_kernels.hf` any `from_pretrained` loads them.

Where a weight is packed the model gets a `SparseLinear` or a `BlockSparseLinear` before any tensor is read. Its values
come straight from the file, and the rest of its lists is made of the bits, one layer at a time: no dense copy of a
pruned weight is made. All files are checked first (export/checked.py). Under tensor parallelism a process keeps its
rows or columns of each layer that the plan cuts (hf_parallel.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import hf_parallel
from .export import checked, classes
from .export.cut import cut
from .export.folder import KEEP, pack_model, refuse_parts
from .export.packed import BLOCK_BITS, WEIGHT, WEIGHT_BITS, Compact, Shape, empty, indices
from .layers.checks import is_conv1d

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
except ModuleNotFoundError as error:
    here = transformers.__version__
    raise ImportError(f"pst_kernels.hf needs transformers 5, got {here}; run: pip install -U transformers") from error


def load_sparse(directory: str | Path, **settings: Any) -> Any:
    """Load a folder written by `save_sparse` with the class that its config names.

    `settings` go to that class's `from_pretrained`, `dtype`, `device_map` and `distributed_config` among them. Raises
    ValueError for a damaged, incomplete or foreign folder, before anything is loaded, and OSError where there is none.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    given = getattr(config, "quantization_config", None)
    checked.check_entry(given if isinstance(given, dict) else {}, str(directory))
    return classes.named(config, directory).from_pretrained(directory, **settings)


@register_quantization_config(checked.METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of such a folder."""

    quant_method: Any
    digest: str

    def __init__(self, **fields: Any):
        self.set_digest(checked.check_entry(fields, "the folder"))

    def set_digest(self, digest: str) -> None:
        vars(self).update(checked.entry(digest))


@register_quantizer(checked.METHOD)
class SparseQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves such a folder."""

    quantization_config: SparseConfig
    requires_calibration = True  # it reads what was saved, and does not prune
    in_parts = False  # whether a plan cuts the model while it is loaded

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **others: Any) -> None:
        if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
            raise ValueError("a model saved by save_sparse is loaded from its safetensors files; pass their folder")
        plan = hf_parallel.Plan.of(model)
        self.in_parts = plan.ranks > 1
        found = checked.check(checkpoint_files, self.quantization_config.digest)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, (shape, kept) in found.items():
            here = next((n for n in classes.possible_names(model, name) if n in modules), None)
            if here is None:  # of a head that this class does not have
                continue
            _check_fit(here, modules[here], shape)
            old: Any = modules[here]
            part = plan.part(here, shape)
            # how much a part keeps is known when its bits are read
            sizes = (shape, kept) if part is None else (part.shape, kept // part.ranks)
            new: Any = empty(*sizes, old.bias is not None, old.weight.dtype)
            if part is not None:
                hf_parallel.set_up(new, part, plan.style(here))
            parent, _, child = here.rpartition(".")
            setattr(model.get_submodule(parent), child, new.train(old.training))

    def get_weight_conversions(self) -> list[WeightConverter]:
        if self.in_parts:  # on the CPU, so that no device holds all of a layer
            return [WeightConverter([WEIGHT_BITS, BLOCK_BITS, WEIGHT], [WEIGHT], [_Cut()], force_cpu=True)]
        made_of = {WEIGHT_BITS: ("offsets", "pointers"), BLOCK_BITS: ("crow_indices", "col_indices")}
        return [WeightConverter([bits], list(names), [_FromBits(names)]) for bits, names in made_of.items()]

    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> Any:
        for layer in model.modules():
            if isinstance(layer, Compact):
                layer.weight.requires_grad_(False)  # as merge_and_unload makes them
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        refuse_parts(model)
        twin = classes.unpruned(model)
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, Compact):
                continue
            parent, _, child = name.rpartition(".")
            plain: Any = twin.get_submodule(name)
            weight = layer.to_dense().to(dtype)
            plain.weight = nn.Parameter((weight.T if is_conv1d(plain) else weight).contiguous())
            plain.bias = layer.bias
            setattr(model.get_submodule(parent), child, plain.train(layer.training))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        packed = pack_model(model, KEEP)
        sums = checked.checksums(packed.state)
        model.config.quantization_config.set_digest(checked.digest_of(sums))
        return packed.state, checked.metadata(packed.layers, sums)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _check_fit(name: str, module: Any, shape: Shape) -> None:
    fits = isinstance(module, nn.Linear) or is_conv1d(module)
    size = tuple(module.weight.T.shape if is_conv1d(module) else module.weight.shape) if fits else ()
    if size != (shape.out, shape.columns):
        raise ValueError(
            f"the folder does not fit its config: {name} is {type(module).__name__} {size}, its packed weight is"
            f" {(shape.out, shape.columns)}; save the folder again with save_sparse"
        )


class _Made(ConversionOps):
    """Makes tensors of a layer while it is loaded."""

    @property
    def reverse_op(self) -> ConversionOps:
        """Never run: what is saved is packed before transformers asks for reversals."""
        return self


class _FromBits(_Made):
    """Two index tensors of a layer, made of its bits."""

    def __init__(self, names: tuple[str, str]):
        self.names = names

    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        (bits,) = _tensors(input_dict).values()
        name = about["full_layer_name"].rpartition(".")[0]
        made = indices(Shape.of(about["model"].get_submodule(name)), bits)
        return {f"{name}.{index}": tensor for index, tensor in zip(self.names, made, strict=True)}


class _Cut(_Made):
    """All tensors of a layer, or of the part that this process holds, made of its values and bits at once."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        given, full_name = _tensors(input_dict), about["full_layer_name"]
        values, rest = given.pop(WEIGHT), list(given.values())
        if not rest:  # a weight that is not packed
            return {full_name: values}
        name = full_name.rpartition(".")[0]
        layer: Any = about["model"].get_submodule(name)
        part = layer.part_of
        made = (values, *indices(Shape.of(layer), rest[0])) if part is None else cut(part, values, rest[0])
        layer._take(*(tensor.to("meta") for tensor in made))  # transformers asks for the sizes of what it puts there
        return {f"{name}.{entry}": tensor for entry, tensor in zip(layer.PARTS, made, strict=True)}


def _tensors(given: dict[str, Any]) -> dict[str, Any]:
    return {pattern: found[0] if isinstance(found, list) else found for pattern, found in given.items()}
