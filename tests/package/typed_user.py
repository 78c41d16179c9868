"""A program of a user who checks types: `mypy --strict` takes it as it is, and knows what every public name gives.

`make lint` checks it against this tree, `make package` against the installed wheel; it is not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import pst_kernels as pst
import pst_kernels.hf
from pst_kernels import functional


def settings(folder: Path) -> pst.PSTConfig:
    config = pst.PSTConfig(sparsity=0.5, target_modules=["query"], modules_to_save=("classifier",), freeze=0.2)
    chosen = pst.PSTConfig(target_modules=lambda module, name: isinstance(module, nn.Linear) and name != "head")
    assert_type(config.sparsity, float)
    assert_type(chosen.weight_rank, int)
    assert_type(config.to_dict(), dict[str, Any])
    assert_type(pst.PSTConfig.from_dict(config.to_dict()), pst.PSTConfig)
    config.save_pretrained(folder)
    assert_type(pst.PSTConfig.from_pretrained(str(folder)), pst.PSTConfig)
    return pst.PSTConfig.preset("accurate", sparsity=0.9)


def training(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    model = pst.replace_linear(model, pst.PSTConfig(pattern="block:32"))
    groups = pst.parameter_groups(model, lr=1e-4)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = pst.SparsitySchedule(model, total_steps=len(batches), kind="events", first=0.7, events=4)
    rate = pst.RewindLR(optimizer, schedule)
    for x, wanted in batches:
        loss: Tensor = nn.functional.cross_entropy(model(x), wanted)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        schedule.step()
        rate.step()
    assert_type(schedule.sparsity, float)
    assert_type(schedule.ended, bool)
    schedule.load_state_dict(schedule.state_dict())
    pst.refresh_masks(model)
    pst.print_trainable_parameters(model)
    rows = pst.get_layer_status(model)
    assert_type(rows[0].name, str)
    assert_type(rows[0].shape, tuple[int, ...])
    assert_type(rows[0].dtype, torch.dtype)
    assert_type(rows[0].sparsity, float)
    assert_type(rows[0].frozen, bool)
    return model


def teaching(model: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    learn = pst.Distillation(temperature=2.0, hardness=0.5)
    loss = learn(model(**batch), teacher(**batch))
    assert_type(loss, Tensor)
    trainer = pst.DistillationTrainer(model=model, teacher="runs/dense", callbacks=[pst.PSTCallback(kind="events")])
    assert_type(trainer.distillation, pst.Distillation)
    return loss


def saving(model: nn.Module, folder: Path) -> nn.Module:
    pst.save_pretrained(model, folder / "adapter")
    assert_type(pst.load_pretrained(model, str(folder / "adapter")), nn.Module)
    pst.save_sparse(model, folder / "sparse", format="block:32", max_shard_size="5GB")
    loaded: nn.Module = pst.load_sparse(folder / "sparse", dtype=torch.bfloat16)
    loaded = pst_kernels.hf.load_sparse(folder / "sparse")
    merged = pst.merge_and_unload(loaded, safe_merge=True, format="sparse")
    pst.save_compressed(merged.state_dict(), folder / "model.safetensors")
    assert_type(pst.load_compressed(folder / "model.safetensors"), dict[str, Tensor])
    return merged


def layers(linear: nn.Linear, x: Tensor) -> list[nn.Module]:
    under = pst.PSTLinear.from_linear(linear, pst.PSTConfig())
    conv = pst.PSTConv1D(8, 16, config=pst.PSTConfig())
    for layer in (under, conv):
        assert_type(layer.sparsity, float)
        assert_type(layer.mask, Tensor)
        assert_type(layer.scores(), Tensor)
        assert_type(layer.frozen, bool)
        layer.sparsity = 0.5
        layer.refresh_mask(force=True)
        layer.merge(safe_merge=True)
        layer.unmerge()
    assert_type(under, pst.PSTLinear)
    assert_type(under.pst_U, nn.Parameter)
    assert_type(under.forward(x), Tensor)
    sparse = pst.SparseLinear.from_linear(linear, trainable=True)
    assert_type(sparse, pst.SparseLinear)
    assert_type(sparse.to_dense(), Tensor)
    assert_type(sparse.forward(x), Tensor)
    blocks = pst.BlockSparseLinear.from_linear(linear, 32)
    assert_type(blocks, pst.BlockSparseLinear)
    assert_type(blocks.to_bsr(), Tensor)
    return [under, conv, sparse, blocks]


def mistakes(model: nn.Module) -> None:
    """Each line must be an error: mypy tells of an ignore that nothing needs."""
    pst.replace_linaer(model)  # type: ignore[attr-defined]
    pst.PSTConfig(sparsity="0.9")  # type: ignore[arg-type]
    pst.merge_and_unload(model, "sparse")  # type: ignore[arg-type]
    functional.kth_value(torch.rand(3), "1")  # type: ignore[arg-type]


def tensors(x: Tensor, weight: Tensor, factors: list[Tensor]) -> Tensor:
    U, V, A, B, R, C = factors
    assert_type(functional.scores(weight, U, V, A, B, R, C, beta=0.5), Tensor)
    assert_type(functional.kth_value(weight, 3), tuple[Tensor, Tensor])
    mask = functional.prune_mask(weight, U, V, A, B, R, C, 7)
    assert_type(functional.unpack_mask(mask, weight.shape[1]), Tensor)
    y = functional.pst_linear(x, weight, None, U, V, A, B, R, C, mask, through_magnitude=False)
    assert_type(y, Tensor)
    return y
