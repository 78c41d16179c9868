"""PSTLayer: what the linear layers under PST share, but for their forward and the freeze."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import PSTConfig, check_sparsity
from ..functional import new_guess
from ..masks import due, patterns
from ..masks.packing import packed_width, unpack_mask
from ..masks.refresh import MaskState
from ..operands import Factors, MaskedWeight, Scales, factor_shapes
from . import averages, reads
from .checks import PLAIN, check_finite, refuse_meta, whole
from .fisher import Weighs
from .forward import NAMES, Forward
from .rested import masked_with

FACTORS = NAMES[2:]
NEVER = 1 << 62  # steps from one mask to the next, of a mask that is fixed
FROZEN = "pst_weight"  # in a checkpoint whose `weight` is M * W' (whole_model.py): W itself


class PSTLayer(Forward, Weighs, nn.Module):
    """What PSTLinear and PSTConv1D share; they differ in how the weight lies.

    Parameters pst_U (out, weight_rank), pst_V (weight_rank, in), pst_A (out, score_rank), pst_B (score_rank, in),
    pst_R (out,), pst_C (in,); buffers pst_mask (packed, one bit a weight) and pst_num_pruned (int64, 0-d), both in the
    state dict, so a reloaded layer is as sparse as the saved one.

    The mask is computed when a factor, the weight or the sparsity has changed since the last forward (every
    `mask_interval` changes), and reused otherwise. A change through `tensor.data` cannot be seen: saving
    and merging make the mask anew, for a forward call `refresh_mask(force=True)` after one.

    With `PSTConfig(freeze=)` a schedule fixes the mask at last (`freeze_mask`), which the buffer pst_frozen says, and
    with `train_kept` the parameter pst_kept (kept,) is added to the kept weights from there on. With
    `PSTConfig(magnitude="fisher")` the buffer pst_moments (out + in,) holds running sums of G^2 (fisher.py).
    """

    bias: Any  # a Parameter or None
    pst_U: nn.Parameter
    pst_V: nn.Parameter
    pst_A: nn.Parameter
    pst_B: nn.Parameter
    pst_R: nn.Parameter
    pst_C: nn.Parameter
    pst_mask: Tensor
    pst_num_pruned: Tensor
    pst_guess: Tensor

    full_name = ""  # in the model, for messages
    called = False  # whether its forward has run outside of a compiled graph
    read_by = ""  # the method of another module that has computed with the weight before the layer was called
    rewritten = False  # whether it was said that the weight was written in place
    seen_count = due.NOTHING  # version and address of the count that it was given itself
    loaded: tuple[Any, ...] = ()  # what tells the tensors of a checkpoint from others, while its mask is in use
    seen_weight: tuple[int, int, int] | None = None  # which parameter, its address and version, at the last look

    def _add_factors(self, config: PSTConfig | None) -> None:
        config = PSTConfig() if config is None else config
        if not isinstance(config, PSTConfig):
            raise TypeError(
                f"config must be a PSTConfig, got {type(config).__name__}; use PSTConfig(sparsity=0.9), say"
            )
        shape = tuple(self.oriented_weight.shape)
        *stack, out, columns = shape
        self.config = config
        # as text: torch.compile(dynamic=True) makes symbols of floats, and cannot pass a symbol into a checkpoint
        self._scales = Scales(float(config.beta), float(config.alpha1), float(config.alpha2))
        self._scales_as_text = tuple(map(float.hex, self._scales))
        self.pattern = patterns.parse(config.pattern)
        self.merged = False
        shapes = factor_shapes(shape, config.weight_rank, config.score_rank)
        device = self.weight.device
        for name, shape in zip(FACTORS, shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=config.adapter_dtype, device=device)))
        mask = torch.empty((*stack, out, packed_width(columns)), dtype=torch.int32, device=device)
        self.register_buffer("pst_mask", mask)
        self.register_buffer("pst_num_pruned", torch.zeros((), dtype=torch.int64, device=device))
        # fp32 kept as bits: model.to(torch.bfloat16) must not round where the last threshold was
        self.register_buffer("pst_guess", self._new_guess(device), persistent=False)
        self.has_learned_mask = False  # whether it comes of training, or of a checkpoint, not of the conversion alone
        self.watch = due.Watch()
        self.scheduled = False  # whether a schedule refreshes it after every optimizer step
        self._ready, self._kept_weight = None, None
        due.register(self)
        self._unmerged_weight: Tensor | None = None
        self._shards: Any = None
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(config.train_bias)
        self.reset_factors()
        self.given = averages.Given(0, self)
        self.sparsity = config.sparsity
        self._add_rest()
        self._add_moments((out, columns))

    def _new_guess(self, device: torch.device) -> Tensor:
        return new_guess(device).view(torch.int32).repeat(*self.oriented_weight.shape[:-2], 1)

    def reset_factors(self) -> None:
        """U, A ~ N(0, 1); V, B, R, C = 0, so that the layer starts as plain magnitude pruning of W."""
        with torch.no_grad():
            for name in FACTORS:
                factor = getattr(self, name)
                factor.normal_() if name in ("pst_U", "pst_A") else factor.zero_()

    @property
    def weight(self) -> Any:
        """The frozen Parameter. Who reads it past the layer is noted (see reads.py)."""
        if not torch.compiler.is_compiling():
            reads.note(self, sys._getframe(1))
        # `__dict__` is where wrappers that take parameters apart (FSDP1, DataParallel) put a plain tensor
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.__dict__.get("weight")
        if weight is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")
        return weight

    @weight.setter
    def weight(self, value: Any) -> None:
        self.__dict__["weight"] = value

    @property
    def oriented_weight(self) -> Tensor:
        """The weight as (out, in), a view."""
        return self.oriented(self.weight)

    def oriented(self, weight: Tensor) -> Tensor:
        """A tensor that lies as the weight does, as (out, in)."""
        return weight

    def entry(self, name: str, what: str) -> str:
        """What the layer's "weight" or "bias" is called in a model where the layer is called `name`."""
        return f"{name}.{what}" if name else what

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None, "_kept_weight": None}  # made again where it is needed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.seen_count = due.NOTHING
        due.register(self)  # a copy has optimizers of its own, and may be the first layer of its process

    @property
    def factors(self) -> Factors:
        held = self._parameters
        try:
            found = [held[name] for name in FACTORS]
        except KeyError:  # a parametrised factor is no parameter of the layer
            found = [getattr(self, name) for name in FACTORS]
        return Factors(*found)  # type: ignore[arg-type]

    @property
    def sparsity(self) -> float:
        """Fraction of this layer's weights that are pruned now. Reading it waits for the device.

        Set it to choose how many are: whole blocks or weights of a group, rounded down (see patterns.py).
        """
        return self.weights_pruned / self.weight.numel()

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        if self.frozen:
            raise RuntimeError("the mask of this layer is fixed; call unfreeze_mask() before setting its sparsity")
        self.set_num_pruned(self.num_pruned_at(check_sparsity("sparsity", value)))

    def set_num_pruned(self, count: int | Tensor) -> None:
        """Let the next mask prune `count`, of what `num_pruned_at` counts; a 0-d tensor stays on its device."""
        self.pst_num_pruned.fill_(count)
        self._note_count(count)

    def _note_count(self, count: int | Tensor) -> None:
        self.given = self.given.now(count, self)
        if type(self.pst_num_pruned) is Tensor:
            self.seen_count = due.total_of((self.pst_num_pruned,))

    @property
    def weights_pruned(self) -> int:
        """How many weights are pruned now; where blocks have ragged edges, that is for the mask to say."""
        averages.mend(self)
        counted = self.pattern.weights_pruned(self._shape, int(self.pst_num_pruned))
        single = self._shape[0] * self._shape[1]
        return int((~self.mask).sum()) if counted is None else counted * (self.weight.numel() // max(1, single))

    def num_pruned_at(self, sparsity: float) -> int:
        """What `pst_num_pruned` holds at a sparsity: a number of weights, or of blocks."""
        return self.pattern.num_pruned_at(self._shape, sparsity)

    @property
    def _shape(self) -> tuple[int, int]:
        out, columns = self.oriented_weight.shape[-2:]
        return out, columns

    @property
    def mask(self) -> Tensor:
        """bool (out, in), True for kept weights; up to date. Of a tensor parallel layer every process must ask."""
        self.refresh_mask()
        return unpack_mask(self._whole_mask(), self.oriented_weight.shape[1])

    def _tensor_parallel(self) -> Any:
        """How the weight is cut, a `tensor_parallel.Shards`, or None. `parallelize_module` makes the buffers DTensors,
        as `fully_shard` does not.
        """
        count = self.pst_num_pruned
        if self._shards is None and type(count) is not Tensor and hasattr(count, "device_mesh"):
            from . import tensor_parallel  # torch.distributed.tensor, which most programs need not load

            if not self.pattern.across_processes:
                raise RuntimeError(
                    f"pattern={self.config.pattern!r} does not run under tensor parallelism; use pattern='unstructured'"
                )
            self._shards = tensor_parallel.take_over(self)
        return self._shards

    def refuse_cut(self) -> None:
        """Raise RuntimeError for a layer that tensor parallelism has cut, and whose settings do not go with it."""
        self._tensor_parallel()

    def _whole_mask(self) -> Tensor:
        shards = self._tensor_parallel()
        return self.pst_mask if shards is None else shards.whole_mask(self.pst_mask)

    def refresh_mask(self, force: bool = False) -> None:
        """Compute the mask if it is due, or now if `force`. A merged layer's mask stays as it was merged."""
        if self.merged:
            return
        if force:
            self.mark_stale()
        if (shards := self._tensor_parallel()) is not None:
            shards.refresh(self)
            return
        if not torch.compiler.is_compiling():
            averages.mend(self)
        with torch.no_grad():
            if self.moments is None:
                ops.refresh_mask(*self._weights(), *self.scales, *self.mask_state())
            else:
                self.refresh_weighed(*self._weights())
            self.added()  # what a compiled forward takes as it is

    def settle_mask(self) -> None:
        """Bring the mask up to date for saving or merging: made anew also where no change can be seen.

        One that is meant to be older than its factors (`mask_interval`, or fixed) stays, and so does one that was
        loaded with them.
        """
        if not self.merged and self._is_suspect():
            self.mark_stale()
        self.refresh_mask()

    def _is_suspect(self) -> bool:
        """Whether a write that leaves no trace may have made the mask stale."""
        if self.frozen or self.config.mask_interval > 1 or type(self.weight) not in PLAIN:
            return False
        looks, *sums = self.loaded or (None,)
        return looks != self.watch.looks or tuple(sums) != averages.sums(self._weights())

    def _weights(self) -> tuple[Tensor, ...]:
        """The weight (out, in) and the factors, whole."""
        return tuple(map(whole, (self.oriented_weight, *self.factors)))

    def scores(self) -> Tensor:
        """What the mask is decided by, fp32 (out, in)."""
        if self.moments is None:
            return ops.scores(*self._weights(), *self.scales)
        return self.weighed_scores(*self._weights())

    def mask_state(self) -> MaskState:
        """What `refresh` takes: the mask, and what says when it is due."""
        guess = self.pst_guess.view(torch.float32)
        return MaskState(self.pst_num_pruned, self.pst_mask, guess, self.mask_interval, self.config.pattern)

    @property
    def mask_interval(self) -> int:
        """Optimizer steps from one mask to the next."""
        return NEVER if self.frozen else self.config.mask_interval

    @property
    def scales(self) -> Scales:
        """beta, alpha1 and alpha2."""
        return Scales(*map(float.fromhex, self._scales_as_text)) if torch.compiler.is_compiling() else self._scales

    def mark_stale(self) -> None:
        """Let the next forward compute the mask anew, or of a fixed mask M * W' alone."""
        if self.frozen:
            self._ready, self._fixed_of = None, due.NOTHING
        else:
            self.watch.mark_stale()

    def after_load(self, with_mask: bool) -> None:
        """Tensors were loaded into this layer; a mask that came with its factors is used as it is."""
        self.seen_weight = None
        if self.pst_guess.is_meta:  # converted on the meta device; no state dict holds the guess
            self.pst_guess = self._new_guess(self.pst_mask.device)
        if self.config.freeze and not self.pst_frozen.is_meta:
            self._set_frozen(bool(self.pst_frozen))
        plain = type(self.pst_num_pruned) is Tensor and not self.pst_num_pruned.is_meta
        if plain:
            self._note_count(int(self.pst_num_pruned))
        if not with_mask:
            self.watch.mark_stale()
            return
        self.has_learned_mask = True
        self._ready = None
        self._renew_lists()
        self.watch.note(self.pst_num_pruned, (self.oriented_weight, *self.factors), made=True, mask=self.pst_mask)
        if plain and type(self.weight) in PLAIN and not self.weight.is_meta:
            self.loaded = (self.watch.looks, *averages.sums(self._weights()))

    def _renew_lists(self) -> None:
        """A captured graph may read lists of the mask that was there before a checkpoint's."""
        kernels: Any = ops.kernels_for(self.pst_mask.device.type)
        if self.pattern.block_size is not None and hasattr(kernels, "renew_lists"):
            kernels.renew_lists(self.pst_mask, self.oriented_weight.shape, self.pattern.block_size)

    def masked_weight(self) -> Tensor:
        """M * W' as (out, in) in the weight's dtype: what the layer multiplies by."""
        if self.merged:
            return self.oriented_weight.detach().clone()
        if self._tensor_parallel() is not None:
            self._refuse_sharded()
        self.refresh_mask()
        weight, *factors = self._weights()
        operands = MaskedWeight(weight, Factors(*factors), self.pst_mask, self.scales)
        with torch.no_grad():
            return masked_with(operands, self.added(), self.weight.dtype)

    def _refuse_sharded(self) -> None:
        raise RuntimeError(
            "the weight is sharded over processes and cannot be merged there;"
            " load the saved state into a model of one process, and merge that"
        )

    def merge(self, safe_merge: bool = False) -> None:
        """Put M * W' in the weight's place, for inference; a second call does nothing.

        The unmerged weight is kept for `unmerge`. With `safe_merge`, raises ValueError and changes nothing if M * W'
        has NaN or infinite values.
        """
        if self.merged:
            return
        if hasattr(self.weight, "full_tensor"):
            self._refuse_sharded()
        refuse_meta("the weight", self.weight)
        self.settle_mask()
        merged = self.masked_weight()
        if safe_merge:
            check_finite(merged, "the merged weight", "lower the learning rate, or merge an earlier checkpoint")
        self._unmerged_weight = self.weight.detach().clone()
        with torch.no_grad():
            self.oriented_weight.copy_(merged)
        self.merged = True

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit; does nothing on an unmerged layer."""
        if self._unmerged_weight is None:
            return
        with torch.no_grad():
            self.weight.copy_(self._unmerged_weight)
        self._unmerged_weight, self.merged, self.seen_weight = None, False, None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.settle_mask()  # saved between an optimizer step and the next forward, mask and factors must fit
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged_weight is not None:  # a state dict always describes the unmerged layer
            destination[self.entry(prefix.rstrip("."), "weight")] = self._unmerged_weight
        if self._shards is not None:
            destination[f"{prefix}pst_mask"] = self._whole_mask()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        if self.merged and self.entry(prefix.rstrip("."), "weight") in state_dict:
            errors.append(f"{prefix.rstrip('.') or 'this layer'} is merged; call unmerge() before loading into it")
            return
        if f"{prefix}{FROZEN}" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}{FROZEN}")
        if f"{prefix}pst_mask" in state_dict and (shards := self._tensor_parallel()) is not None:
            state_dict[f"{prefix}pst_mask"] = shards.cut_mask(state_dict[f"{prefix}pst_mask"])
        self.fit_loaded_kept(state_dict, prefix)
        with_mask = averages.without_averages(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.after_load(with_mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_rank={self.config.weight_rank}, score_rank={self.config.score_rank}"
