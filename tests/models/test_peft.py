"""PST is no method of PEFT, whose registry is closed to other packages. README says so; this says when it opens.

`register_peft_method` takes names of `peft.utils.peft_types.PeftType` only, an enum with members, which Python lets
nobody extend. `get_peft_model`, `PeftConfig.peft_type` and `PeftModel.from_pretrained` all look methods up by it.
"""

from __future__ import annotations

import enum

import pytest
import torch
import toys
from torch import nn

import pst_kernels as pst

peft = pytest.importorskip("peft")


def test_the_registry_is_closed():
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType

    message = r"Unknown PEFT type PST, please add an entry to peft\.utils\.peft_types\.PeftType"
    with pytest.raises(ValueError, match=message):
        register_peft_method(name="pst", config_cls=peft.PeftConfig, model_cls=nn.Module)
    assert issubclass(PeftType, enum.Enum)
    with pytest.raises(TypeError, match="cannot extend"):

        class WithPST(PeftType):
            PST = "PST"


def test_a_merged_model_takes_another_adapter():
    """What works today: PST first, merged; then any method of PEFT over the sparse weights."""
    merged = pst.merge_and_unload(toys.trained())
    expected = toys.logits(merged)
    zeros = {name: p == 0 for name, p in merged.named_parameters() if name.endswith("query.weight")}
    model = peft.get_peft_model(merged, peft.LoraConfig(target_modules=["query"], r=2)).eval()
    assert torch.equal(toys.logits(model), expected)  # LoRA starts at zero
    base = dict(model.get_base_model().named_parameters())
    for name, zero in zeros.items():
        assert torch.equal(base[name.replace("query.weight", "query.base_layer.weight")] == 0, zero)
        assert zero.sum() == int(zero.numel() * 0.9)


def test_a_model_of_peft_is_refused_by_name():
    model = peft.get_peft_model(toys.seeded(), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(TypeError, match=r"query is a peft\.tuners\.lora\.layer\.Linear, which PST cannot convert"):
        pst.replace_linear(model, pst.PSTConfig(target_modules=["query"]))
