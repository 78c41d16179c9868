"""Budgets of launches, counted by a driver that launches nothing: masks of a whole model, and a layer's own step."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import weakref

import pytest
import torch
from silent_driver import silent
from torch import nn

import pst_kernels as pst
from pst_kernels.layers import together
from pst_kernels.operands import MaskedWeight

pytest.importorskip("triton", reason="triton is not installed")
GROUPED = 9  # of all masks of a model, for layers of one kind
OF_A_STEP = {"keep": 2, "remake": 5}  # of a layer's forward and backward, masks fresh


@pytest.fixture
def sm_90(monkeypatch):
    monkeypatch.setenv("PST_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("PST_KERNELS_ARCH", "sm_90")


def model_of(layers: int, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = pst.PSTConfig(**{"sparsity": 0.9} | settings, target_modules=r"\d+", modules_to_save=())
    return pst.replace_linear(nn.Sequential(*(nn.Linear(192, 192) for _ in range(layers))), config)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("layers", [2, 24])
def test_all_masks_of_a_model_take_as_many_launches_as_those_of_two_layers(sm_90, layers):
    with silent(90) as launches:
        model = model_of(layers)
        optimizer, x = trained(model), torch.randn(16, 192)
        model(x).sum().backward()
        launches.clear()
        optimizer.step()
        assert sum(launches.values()) == GROUPED
        assert set(launches.values()) == {1, 4}
        launches.clear()
        pst.refresh_masks(model)
        assert sum(launches.values()) == GROUPED


def test_a_schedule_makes_the_masks_once_a_step(sm_90):
    with silent(90) as launches:
        model = model_of(3)
        schedule, optimizer, x = pst.SparsitySchedule(model, 10), trained(model), torch.randn(16, 192)
        for _ in range(3):
            model(x).sum().backward()
            launches.clear()
            optimizer.step()
            schedule.step()
            assert sum(launches.values()) == GROUPED


def test_a_kept_masked_weight_follows_the_factors_between_two_masks(sm_90):
    with silent(90) as launches:
        model = model_of(2, masked_weight="keep", mask_interval=2)
        optimizer, x = trained(model), torch.randn(16, 192)
        made = []
        for _ in range(4):
            model(x).sum().backward()
            launches.clear()
            optimizer.step()
            of_the_step = sum(launches.values())
            launches.clear()
            with torch.no_grad():
                model(x)
            made.append((of_the_step, dict(launches)))
        assert made == [(0, {"masked_weight_kernel": 2}), (GROUPED, {})] * 2


@pytest.mark.parametrize("way", OF_A_STEP)
def test_a_layer_whose_mask_is_fresh_only_multiplies(sm_90, way):
    with silent(90) as launches:
        model = model_of(4, masked_weight=way)
        x = torch.randn(16, 192, requires_grad=True)
        model(x).sum().backward()
        launches.clear()
        model(x).sum().backward()
        assert sum(launches.values()) == 4 * OF_A_STEP[way]
        launches.clear()
        with torch.no_grad():
            model(x)
        assert sum(launches.values()) == 4 * (0 if way == "keep" else 2)


@pytest.mark.parametrize("way", OF_A_STEP)
@pytest.mark.parametrize("state", ["rested", "fixed"])
def test_a_layer_at_rest_launches_no_more_than_one_that_learns(sm_90, way, state):
    """And M * W' that an exact step keeps is kept."""
    with silent(90) as launches:
        model = model_of(4, masked_weight=way, **({"score_interval": 9} if state == "rested" else {"freeze": 0.2}))
        if state == "fixed":
            for layer in model:
                layer.freeze_mask()
        x = torch.randn(16, 192, requires_grad=True)
        model(x).sum().backward()
        launches.clear()
        model(x).sum().backward()
        assert model[0].scores_rest
        assert sum(launches.values()) == 4 * OF_A_STEP[way], launches


def test_a_model_takes_its_tables_with_it(sm_90):
    with silent(90):
        together.release_groups()
        goes, stays = model_of(2), model_of(2)
        pst.refresh_masks(goes)
        pst.refresh_masks(stays)
        assert len(together._groups) == 2
        first = weakref.ref(goes[0])
        del goes
        gc.collect()
        assert first() is None
        assert len(together._groups) == 1


@pytest.mark.parametrize("pattern", ["2:4", "block:16"])
def test_masks_of_patterns_are_made_after_the_step(sm_90, pattern):
    """As a captured graph of the forward needs it, which looks at nothing."""
    with silent(90) as launches:
        model = model_of(2, pattern=pattern, mask_interval=1, sparsity=0.5)
        optimizer, x = trained(model), torch.randn(16, 192)
        model(x).sum().backward()
        launches.clear()
        optimizer.step()
        assert launches["scores_kernel"] == 2
        launches.clear()
        model(x)
        assert not launches["scores_kernel"]


def test_two_threads_have_memory_of_their_own(sm_90, monkeypatch):
    """Of M * W' made for many tokens: what one thread makes stays until its product is done, whatever another makes."""
    from pst_kernels.triton import matmul

    layers = [pst.PSTLinear(192, 192, config=pst.PSTConfig(masked_weight="remake")) for _ in range(2)]
    together, made = threading.Barrier(2), {}

    def filled(operands, out, platform):
        out.fill_(made.setdefault(threading.get_ident(), float(len(made) + 1)))
        together.wait()  # both are made before either is multiplied by
        return out

    monkeypatch.setattr(matmul, "fill_masked_weight", filled)
    with silent(90):
        operands = [MaskedWeight(layer.weight, layer.factors, layer.pst_mask, layer.scales) for layer in layers]

        def forward(n):
            with torch.no_grad():
                y = matmul.linear_forward(torch.ones(4096, 192), operands[n], None)
            return float(y[0, 0]), 192 * made[threading.get_ident()]

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for found, expected in pool.map(forward, range(2)):
                assert found == expected
