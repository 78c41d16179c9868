"""Toy models of the usual families, built from configs in milliseconds, and numbers that are exact in fp32."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pst_kernels as pst
from pst_kernels.checkpoint import RELEASED_NAMES
from pst_kernels.layers.pst_layer import FACTORS
from pst_kernels.model import pst_layers

VOCABULARY, WIDTH, LENGTH, LABELS = 50, 32, 7, 3


def plain(*sizes: int) -> nn.Sequential:
    """Linear, ReLU, Linear, ...: a model without blocks. `plain(8, 16, 4)` has two linears."""
    sizes = sizes or (24, 40, 33, 3)
    layers: list[nn.Module] = []
    for columns, out in itertools.pairwise(sizes):
        layers += [nn.Linear(columns, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def bert(**changes) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_encoder() | changes))


def roberta(**changes) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**_encoder() | changes))


def gpt2(**changes) -> nn.Module:
    """Conv1D layers, fused c_attn, and an lm_head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes | off | changes))


def llama(**changes) -> nn.Module:
    """Two query heads for each key head, no biases, an lm_head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def t5(**changes) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(
        T5Config(**sizes | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0} | changes)
    )


def vit(**changes) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: value for key, value in _encoder().items() if key not in ("vocab_size", "max_position_embeddings")}
    return ViTForImageClassification(ViTConfig(**sizes | {"image_size": 8, "patch_size": 4} | changes))


FAMILIES = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit}
# Linears inside blocks of two layers each; T5's decoder has a second attention.
LINEARS = {"bert": 12, "roberta": 12, "gpt2": 8, "llama": 14, "t5": 32, "vit": 12}


def inputs(family: str, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for a forward of one of FAMILIES, labels included."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    labels = torch.randint(LABELS, (rows,), generator=generator)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator), "labels": labels}
    return {"input_ids": tokens, "labels": labels if family in ("bert", "roberta") else tokens}


def dyadic(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random multiples of 1/64 in [-1, 1]: sums and products of a few are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 65, shape, generator=generator).to(dtype) / 64


def perturb(model: nn.Module, scale: float = 0.05, seed: int = 0) -> nn.Module:
    """Give every factor random values, as training would: V, B, R and C are no longer 0. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in pst_layers(model):
            for name in FACTORS:
                factor = getattr(layer, name)
                factor.copy_(torch.randn(factor.shape, generator=generator) * scale)
    return model


def train_step(model: nn.Module, batch: dict[str, Tensor], lr: float = 1e-2) -> Tensor:
    """One AdamW step on the trainable parameters; returns the loss before it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def seeded(family: str = "bert", **changes) -> nn.Module:
    """The same dense toy model at every call, in eval mode: a pretrained base."""
    torch.manual_seed(0)
    return FAMILIES[family](**changes).eval()


def trained(family: str = "bert", **settings) -> nn.Module:
    """That model under PST after a training step from factors that are not zero, in eval mode."""
    model = perturb(pst.replace_linear(seeded(family), pst.PSTConfig(**settings)))
    train_step(model.train(), inputs(family))
    return model.eval()


def logits(model: nn.Module, family: str = "bert") -> Tensor:
    with torch.no_grad():
        return model(**inputs(family)).logits


def released_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the authors' code would have written for this model."""
    names = {ours: theirs for theirs, ours in RELEASED_NAMES.items()}
    state = {}
    for name, tensor in model.state_dict().items():
        owner, dot, entry = name.rpartition(".")
        if entry not in ("pst_mask", "pst_num_pruned"):
            state[f"{owner}{dot}{names.get(entry, entry)}"] = tensor.clone()
    return state


def copy_unsaved_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give a model loaded from the meta device the buffers that no state dict holds: positions, rotary frequencies."""
    saved = source.state_dict()
    for name, buffer in source.named_buffers():
        if name not in saved and not name.endswith("pst_guess"):
            owner, _, entry = name.rpartition(".")
            setattr(target.get_submodule(owner), entry, buffer.clone())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that only one state dict has, or whose tensors differ in dtype, shape or any bit (NaN equals NaN)."""
    return [name for name in one.keys() | other.keys() if not _same_bits(one.get(name), other.get(name))]


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def _encoder() -> dict:
    return {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_labels": LABELS,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


class Examples(Dataset):
    """A few labelled token sequences."""

    def __init__(self, size: int = 32, seed: int = 0):
        self.batch = inputs("bert", rows=size, seed=seed)

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in self.batch.items()}
