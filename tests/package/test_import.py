"""Importing the package: what it needs, what it touches, how long it takes, and the names it promises."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pst_kernels as pst
from pst_kernels import functional

ROOT = Path(pst.__file__).parents[1]


def run(program: str) -> dict:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


BLOCKED = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "transformers", "accelerate", "matplotlib", "rich", "pandas"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from torch import nn
torch.set_num_threads(1)
import pst_kernels as pst

model = pst.replace_linear(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), pst.PSTConfig(sparsity=0.5))
schedule = pst.SparsitySchedule(model, 2)
schedule.step(); schedule.step()
model(torch.randn(3, 8)).sum().backward()
pst.print_trainable_parameters(model)
merged = pst.merge_and_unload(model)
try:
    pst.PSTCallback
    callback = "imported"
except ImportError as error:
    callback = str(error)
print(json.dumps({"zeros": int((merged[0].weight == 0).sum()), "callback": callback}))
"""


@pytest.mark.slow
def test_works_without_triton_and_transformers():
    found = run(BLOCKED)
    assert found["zeros"] == 32
    assert "transformers" in found["callback"]
    assert "pip install 'pst_kernels[finetune]'" in found["callback"]


IMPORTED = """
import json, sys
import torch
from torch.optim import optimizer
import pst_kernels
heavy = ("triton", "numba", "transformers", "accelerate", "matplotlib", "pandas")
loaded = [name for name in heavy if name in sys.modules]
print(json.dumps({
    "loaded": loaded, "cuda": torch.cuda.is_initialized(), "hooks": len(optimizer._global_optimizer_post_hooks),
    "rooms": [name for name in sys.modules if name.startswith(("pst_kernels.triton", "pst_kernels.cpu.compiled."))],
}))
"""


@pytest.mark.slow
def test_is_light_touches_no_device_and_hooks_no_optimizer():
    assert run(IMPORTED) == {"loaded": [], "cuda": False, "hooks": 0, "rooms": []}


def test_every_public_name():
    names = {
        "PSTConfig", "replace_linear", "PSTLinear", "PSTConv1D", "SparsitySchedule", "PSTCallback",
        "print_trainable_parameters", "get_layer_status", "merge_and_unload", "save_pretrained", "load_pretrained",
        "functional", "refresh_masks", "BlockSparseLinear", "SparseLinear", "save_compressed", "load_compressed",
        "Distillation", "DistillationTrainer", "RewindLR", "parameter_groups", "save_sparse", "load_sparse",
    }  # fmt: skip
    assert set(pst.__all__) == names
    assert all(getattr(pst, name) is not None for name in names)


def test_the_typed_program_uses_every_public_name():
    """`make lint` and `make package` check its types."""
    text = Path(__file__).with_name("typed_user.py").read_text(encoding="utf-8")
    names = [f"pst.{name}(" for name in pst.__all__ if name != "functional"]
    names += [f"functional.{name}(" for name in functional.__all__]
    assert not [name for name in names if name not in text and name.replace("(", ".from_linear(") not in text]


def parameters(function) -> list[str]:
    """Names as they are written in a signature, `*` before keyword-only ones, defaults after `=`."""
    found, star = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            found.append("*")
            star = True
        found.append(p.name if p.default is p.empty else f"{p.name}={p.default}")
    return found


FACTORS = ["weight", "U", "V", "A", "B", "R", "C"]
SCALES = ["*", "beta=1.0", "alpha1=1.0", "alpha2=1.0"]
SIGNATURES = {
    "PSTConfig": (pst.PSTConfig, [
        "sparsity=0.9", "initial_sparsity=0.0", "weight_rank=8", "score_rank=8", "beta=1.0", "alpha1=1.0", "alpha2=1.0",
        "through_magnitude=True", "warmup=0.1", "cooldown=0.3", "target_modules=all-linear", "exclude_modules=None",
        "modules_to_save=None", "train_bias=False", "adapter_dtype=torch.float32", "pattern=unstructured",
        "mask_interval=1", "recompute_input=True", "masked_weight=auto",
        "products=auto", "score_interval=1", "freeze=0.0", "train_kept=False", "allocation=uniform",
        "magnitude=plain", "dropout=None", "embedding_rank=0",
    ]),
    "replace_linear": (pst.replace_linear, ["model", "config=None"]),
    "refresh_masks": (pst.refresh_masks, ["model"]),
    "merge_and_unload": (pst.merge_and_unload, ["model", "safe_merge=False", "*", "format=dense"]),
    "save_pretrained": (pst.save_pretrained, ["model", "directory"]),
    "load_pretrained": (pst.load_pretrained, ["model", "directory"]),
    "save_sparse": (pst.save_sparse, [
        "model", "directory", "*", "format=sparse", "tokenizer=None", "max_shard_size=50GB",
    ]),
    "print_trainable_parameters": (pst.print_trainable_parameters, ["model"]),
    "get_layer_status": (pst.get_layer_status, ["model"]),
    "SparsitySchedule": (pst.SparsitySchedule, [
        "model", "total_steps", "step_count=0", "*", "kind=cubic", "first=0.7", "events=4", "restart=False",
    ]),
    "PSTCallback": (pst.PSTCallback, ["restart=False", "*", "kind=cubic", "first=0.7", "events=4", "rewind=True"]),
    "scores": (functional.scores, [*FACTORS, *SCALES]),
    "kth_value": (functional.kth_value, ["scores", "k"]),
    "prune_mask": (functional.prune_mask, [*FACTORS, "num_pruned", *SCALES]),
    "unpack_mask": (functional.unpack_mask, ["packed", "in_features"]),
    "pst_linear": (functional.pst_linear, [
        "x", "weight", "bias", *FACTORS[1:], "mask", *SCALES, "through_magnitude=True",
    ]),
}  # fmt: skip


@pytest.mark.parametrize(("function", "expected"), SIGNATURES.values(), ids=SIGNATURES)
def test_signatures(function, expected):
    assert parameters(function) == expected
    assert inspect.getdoc(function)


def test_layers_have_the_promised_parts():
    from transformers.pytorch_utils import Conv1D

    linear = pst.PSTLinear.from_linear(nn.Linear(40, 24))
    conv = pst.PSTConv1D.from_linear(Conv1D(24, 40))
    assert isinstance(linear, nn.Linear)
    for layer in (linear, conv):
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if name.startswith("pst_")}
        assert shapes == {
            "pst_U": (24, 8), "pst_V": (8, 40), "pst_A": (24, 8), "pst_B": (8, 40), "pst_R": (24,), "pst_C": (40,),
        }  # fmt: skip
        state = layer.state_dict()
        assert (state["pst_mask"].dtype, tuple(state["pst_mask"].shape)) == (torch.int32, (24, 2))
        assert (state["pst_num_pruned"].dtype, tuple(state["pst_num_pruned"].shape)) == (torch.int64, ())
        assert state.keys() == {"weight", "bias", *shapes, "pst_mask", "pst_num_pruned"}
        assert layer.sparsity == 0.9
        assert (layer.mask.dtype, tuple(layer.mask.shape)) == (torch.bool, (24, 40))
    for method in ("merge", "unmerge"):
        assert callable(getattr(linear, method))
    assert {"step", "sparsity", "state_dict", "load_state_dict"} <= set(dir(pst.SparsitySchedule))
    assert {"to_dict", "from_dict", "save_pretrained", "from_pretrained"} <= set(dir(pst.PSTConfig))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sparsity": 0.5, "target_modules": ["query"], "exclude_modules": r".*\.0\..*", "modules_to_save": ("a", "b")},
        {"adapter_dtype": torch.bfloat16, "target_modules": {"b", "a"}, "mask_interval": 4, "train_bias": True},
    ],
    ids=["defaults", "lists", "sets"],  # not str: the order of a set differs between pytest-xdist's workers
)
def test_config_round_trips(settings, tmp_path):
    config = pst.PSTConfig(**settings)
    assert pst.PSTConfig.from_dict(config.to_dict()) == config
    assert pst.PSTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path / "new")
    assert pst.PSTConfig.from_pretrained(tmp_path / "new") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pst_config.json"]


@pytest.mark.parametrize("name", ["float32", "torch.bfloat16", "float16", torch.float64])
def test_adapter_dtype_by_name(name):
    assert str(pst.PSTConfig(adapter_dtype=name).adapter_dtype).endswith(str(name).removeprefix("torch."))
