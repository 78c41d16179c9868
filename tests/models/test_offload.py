"""device_map and offloading: what works, and clear errors for what does not."""

from __future__ import annotations

import pytest
import torch
import toys

import pst_kernels as pst
from pst_kernels.model import pst_layers

accelerate = pytest.importorskip("accelerate")
SPLIT = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk", "bert.pooler": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    toys.seeded().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_of_one_device_converts_and_trains(folder, device_map):
    from transformers import BertForSequenceClassification

    def trained(**options):
        model = BertForSequenceClassification.from_pretrained(folder, **options)
        pst.replace_linear(toys.perturb(pst.replace_linear(model)))
        toys.train_step(model.train(), toys.inputs("bert"))
        return toys.snapshot(model)

    torch.manual_seed(0)
    mapped = trained(device_map=device_map)
    assert not toys.differences(mapped, trained())


def test_an_offloaded_model_is_refused(folder, tmp_path):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(
        folder, device_map=SPLIT | {"classifier": "cpu"}, offload_folder=str(tmp_path)
    )
    message = r"^bert\.encoder\.layer\.0.*is managed by an accelerate hook \(device_map or CPU offload\); convert the"
    with pytest.raises(RuntimeError, match=message):
        pst.replace_linear(model)
    assert not any(True for _ in pst_layers(model))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_converted_model_can_be_offloaded_for_inference(where, tmp_path):
    model = toys.trained()
    before, expected = toys.snapshot(model), toys.logits(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert next(pst_layers(model))[1].weight.is_meta
    for _ in range(2):
        assert torch.equal(toys.logits(model), expected)
    masks = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("pst_mask")}
    assert masks
    for name, mask in masks.items():
        assert torch.equal(mask, before[name])
    advice = r"on the meta device: offloaded .*bring the model into memory first, with accelerate\.hooks\.remove_hook"
    with pytest.raises(RuntimeError, match=rf"^the weight of bert\.encoder\.layer\.0\..*query is {advice}"):
        pst.merge_and_unload(model)
    with pytest.raises(RuntimeError, match=f"^the weight is {advice}"):
        next(pst_layers(model))[1].merge()
    with pytest.raises(RuntimeError, match=advice):
        pst.save_pretrained(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

    accelerate.hooks.remove_hook_from_submodules(model)
    assert not toys.differences(toys.snapshot(model), before)
    pst.merge_and_unload(model)
    torch.testing.assert_close(toys.logits(model), expected, rtol=1e-5, atol=1e-6)
