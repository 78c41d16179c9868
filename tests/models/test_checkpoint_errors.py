"""Adapter checkpoints that are refused, with the model as it was, and what a killed process leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toys
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pst_kernels as pst
from pst_kernels import files
from pst_kernels.checkpoint import ADAPTER_NAME

ROOT = Path(pst.__file__).parents[1]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(directory: Path, change=lambda tensors: None, **metadata) -> None:
    """Change the tensors or the metadata of a saved adapter."""
    path = directory / ADAPTER_NAME
    tensors, old = load_file(path), metadata_of(path)
    change(tensors)
    save_file(tensors, path, {key: value for key, value in (old | metadata).items() if value is not None})


def flip_a_bit(tensors):
    name = next(name for name in tensors if name.endswith("pst_mask"))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] ^= 1


def move_a_bit_into_the_padding(tensors):
    # of 48 columns, the second word's upper half of each 16 bits is padding: same number of ones, one weight lost
    name = "bert.encoder.layer.0.output.dense.pst_mask"
    word = int(tensors[name][0, 1])
    lost = word & -word
    tensors[name] = tensors[name].clone()
    tensors[name][0, 1] = (word ^ lost) | 1 << 15


def replace(name, change):
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]))


def truncate(directory):
    path = directory / ADAPTER_NAME
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(text):
    return lambda directory: (directory / ADAPTER_NAME).write_bytes(text)


QUERY = "bert.encoder.layer.0.attention.self.query"
REFUSED = {
    "truncated": (truncate, "is damaged"),
    "empty": (overwrite(b""), "is damaged"),
    "not a safetensors file": (overwrite(b"\x80\x04 a pickle, say" * 20), "is damaged"),
    "foreign": (lambda d: save_file({"a": torch.zeros(1)}, d / ADAPTER_NAME), r"not written by pst_kernels.*None"),
    "other format": (lambda d: rewrite(d, format="pt"), r"not written by pst_kernels.*'pt'.*save_pretrained"),
    "newer version": (lambda d: rewrite(d, version="99"), r"has version '99', this pst_kernels reads '1'; update"),
    "no config": (lambda d: rewrite(d, config=None), "is damaged"),
    "broken config": (lambda d: rewrite(d, config="{"), "damaged config"),
    "a list for a config": (lambda d: rewrite(d, config="[1]"), "damaged config"),
    "bad config": (lambda d: rewrite(d, config='{"sparsity": 7}'), r"damaged config: sparsity must be .*got 7"),
    "unknown setting": (lambda d: rewrite(d, config='{"sparsty": 0.5}'), r"'sparsty'.*did you mean 'sparsity'"),
    "flipped mask bit": (lambda d: rewrite(d, flip_a_bit), "is damaged: the mask of .* prunes other"),
    "mask bit in the padding": (lambda d: rewrite(d, move_a_bit_into_the_padding), "is damaged: the mask of"),
    "wrong count": (lambda d: rewrite(d, replace(f"{QUERY}.pst_num_pruned", lambda t: t + 1)), "is damaged: the mask"),
    "mask of another dtype": (lambda d: rewrite(d, replace(f"{QUERY}.pst_mask", lambda t: t.float())), "has dtype"),
    "integer factors": (lambda d: rewrite(d, replace(f"{QUERY}.pst_U", lambda t: t.int())), r"pst_U has dtype .*int32"),
    "a factor missing": (lambda d: rewrite(d, lambda t: t.pop(f"{QUERY}.pst_B")), rf"missing {QUERY}.pst_B;"),
    "the head missing": (lambda d: rewrite(d, lambda t: t.pop("classifier.bias")), "missing classifier.bias"),
    "a stranger": (lambda d: rewrite(d, lambda t: t.update(x=torch.zeros(1))), "unexpected x;"),
    "another rank": (
        lambda d: rewrite(d, replace(f"{QUERY}.pst_U", lambda t: t[:, :4].contiguous())),
        r"pst_U has shape \(32, 4\), the model needs \(32, 8\); check the ranks",
    ),
    "another head": (
        lambda d: rewrite(d, replace("classifier.bias", lambda t: torch.zeros(7))),
        r"classifier.bias has shape \(7,\), the model needs \(3,\)",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    pst.save_pretrained(toys.trained(), directory)
    return directory


@pytest.mark.parametrize("into", ["dense", "converted"])
@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_and_the_model_stays_as_it_was(damage, message, into, saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    model = toys.perturb(pst.replace_linear(toys.seeded()), seed=8) if into == "converted" else toys.seeded()
    before, modules = toys.snapshot(model), {n: type(m) for n, m in model.named_modules()}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=message) as caught:
        pst.load_pretrained(model, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not toys.differences(toys.snapshot(model), before)
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains


FITS_NOT = {
    "ranks": (lambda: pst.replace_linear(toys.seeded(), pst.PSTConfig(weight_rank=4)), "check the ranks"),
    "targets": (
        lambda: pst.replace_linear(toys.seeded(), pst.PSTConfig(target_modules=["query"])),
        "unexpected .*same target",
    ),
    "beta": (
        lambda: pst.replace_linear(toys.seeded(), pst.PSTConfig(beta=0.5)),
        r"beta=0\.5, the checkpoint with beta=1\.0",
    ),
    "another family": (lambda: toys.seeded("roberta"), "missing classifier.dense.bias, .* 97 more; unexpected bert"),
    "another width": (lambda: toys.bert(hidden_size=48), "has shape"),
    "no linears": (lambda: nn.Sequential(nn.ReLU()), "matches no linear layer; the model has none"),
}


@pytest.mark.parametrize(("build", "message"), FITS_NOT.values(), ids=FITS_NOT)
def test_a_model_that_does_not_fit_stays_as_it_was(build, message, saved):
    model = build()
    before, modules = toys.snapshot(model), {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        pst.load_pretrained(model, saved)
    assert not toys.differences(toys.snapshot(model), before)
    assert {n: type(m) for n, m in model.named_modules()} == modules


@pytest.mark.parametrize("kind", ["absent", "empty", "a file"])
def test_no_checkpoint(kind, tmp_path):
    directory = tmp_path / "somewhere"
    if kind == "empty":
        directory.mkdir()
    elif kind == "a file":
        directory.write_text("")
    with pytest.raises(FileNotFoundError, match=rf"somewhere has no {ADAPTER_NAME}; pass a directory written by save_"):
        pst.load_pretrained(toys.seeded(), directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kind", ["dense", "damaged", "wrong rank", "factor missing"])
def test_released_files_that_do_not_fit(name, kind, tmp_path):
    state = toys.seeded().state_dict() if kind == "dense" else toys.released_state(toys.trained())
    if kind == "wrong rank":
        state[f"{QUERY}.weight_U"] = torch.zeros(32, 4)
    if kind == "factor missing":
        del state[f"{QUERY}.mask_scores_B"]
    path = tmp_path / name
    torch.save(state, path) if name.endswith(".bin") else save_file(state, path)
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:-5000])
    model = toys.perturb(pst.replace_linear(toys.seeded()))
    before = toys.snapshot(model)
    messages = {
        "dense": "holds no PST factors", "damaged": "is damaged", "wrong rank": r"pst_U has shape \(32, 4\)",
        "factor missing": "missing .*query.pst_B",
    }  # fmt: skip
    with pytest.raises(ValueError, match=messages[kind]):
        pst.load_pretrained(model, tmp_path)
    assert not toys.differences(toys.snapshot(model), before)


def test_saving_a_model_without_pst_layers(tmp_path):
    with pytest.raises(ValueError, match=r"has no PST layers; call replace_linear"):
        pst.save_pretrained(toys.seeded(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_exception_while_saving_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    model = toys.trained()
    pst.save_pretrained(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        pst.save_pretrained(toys.trained(sparsity=0.5), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(path, {"a": object()})
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~files._umask()


KILLED = """
import os, signal, sys, safetensors.torch, torch
from torch import nn
import pst_kernels as pst
from pst_kernels import files

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path, metadata):
    open(path, "wb").write(b"half a file")
    die()

if sys.argv[2] == "half the adapter":
    safetensors.torch.save_file = half
elif sys.argv[2] == "before the rename":
    files.Path.replace = die
else:
    pst.PSTConfig.save_pretrained = die
torch.manual_seed(0)
model = pst.replace_linear(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), pst.PSTConfig(sparsity=0.75))
pst.save_pretrained(model, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half the adapter", "before the rename", "before the config"])
def test_a_process_killed_at_any_moment_of_saving(moment, tmp_path):
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    state = toys.snapshot(dense)
    model = toys.perturb(pst.replace_linear(dense, pst.PSTConfig(sparsity=0.5)))
    pst.save_pretrained(model, tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    fresh.load_state_dict(state)
    loaded = pst.load_pretrained(fresh, tmp_path)
    if moment == "before the config":  # the new adapter is whole, and holds its own config
        assert loaded[0].sparsity == 0.75
    else:
        assert not toys.differences(toys.snapshot(loaded), toys.snapshot(model))
    pst.save_pretrained(model, tmp_path)  # the next save works, whatever lies about
    assert load_file(tmp_path / ADAPTER_NAME)["0.pst_num_pruned"] == 32


SAVER = """
import sys, torch, itertools
from torch import nn
import pst_kernels as pst
torch.manual_seed(0); torch.set_num_threads(1)
model = pst.replace_linear(nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256), nn.Linear(256, 2)))
for i in itertools.count():
    with torch.no_grad():
        model[0].pst_R.fill_(i); model[2].bias.fill_(i)
    pst.save_pretrained(model, sys.argv[1])
    print(i, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
    dense = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256), nn.Linear(256, 2))
    command = [sys.executable, "-c", SAVER, str(tmp_path)]
    saver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        # frozen again and again in the midst of saving, and at last killed there: each time the file must be whole
        done = int(saver.stdout.readline())
        for pause in range(12):
            time.sleep(0.002 + 0.0017 * pause)
            saver.send_signal(signal.SIGSTOP)
            before = done
            _check_whole(tmp_path, dense, before)
            saver.send_signal(signal.SIGCONT)
        saver.send_signal(signal.SIGKILL)
    finally:
        saver.kill()
        saver.wait()
    assert saver.returncode == -signal.SIGKILL
    _check_whole(tmp_path, dense, done)
    pst.save_pretrained(pst.replace_linear(dense), tmp_path)  # and the next save works


def _check_whole(directory: Path, dense: nn.Module, at_least: int) -> None:
    tensors = load_file(directory / ADAPTER_NAME)
    value = tensors["0.pst_R"][0].item()
    assert value >= at_least
    assert torch.equal(tensors["0.pst_R"], torch.full((512,), value))
    assert tensors["2.bias"].tolist() == [value, value]  # of one save, not of two
    loaded = pst.load_pretrained(nn.Sequential(*[nn.Linear(m.in_features, m.out_features) for m in dense]), directory)
    assert loaded[0].pst_R[0] == value
    assert pst.PSTConfig.from_pretrained(directory) == pst.PSTConfig()
