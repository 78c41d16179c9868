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


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["key"]}])
def test_a_model_of_peft_is_refused_by_name(settings):
    model = peft.get_peft_model(toys.seeded(), peft.LoraConfig(target_modules=["query"], r=2))
    says = r"holds the adapter 'default' of PEFT \(2 tuner layers.*query, a peft\.tuners\.lora\.layer\.Linear\).* first"
    with pytest.raises(TypeError, match=says):
        pst.replace_linear(model, pst.PSTConfig(**settings))


def test_an_adapter_over_pst_is_not_merged_into_frozen_weights():
    model = peft.get_peft_model(toys.trained(), peft.LoraConfig(target_modules=["query"], r=2)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    expected = toys.logits(model)
    with pytest.raises(RuntimeError, match=r"PEFT would merge an adapter into the frozen weight of bert.*query"):
        model.merge_and_unload()
    assert torch.equal(toys.logits(model), expected)
    merged = pst.merge_and_unload(model).merge_and_unload()
    torch.testing.assert_close(toys.logits(merged), expected, rtol=1e-5, atol=1e-5)
