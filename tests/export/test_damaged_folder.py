"""Folders that are damaged, cut, mixed up or foreign: one error each, before anything is loaded."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from test_folder import contents, zeroed

import pst_kernels as pst
from pst_kernels.export import checked
from pst_kernels.export.packed import Shape

REFUSED = (ValueError, OSError, RuntimeError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("whole")
    pst.save_sparse(zeroed(), where, max_shard_size=12_000)
    return where


def digest(where):
    return json.loads((where / "config.json").read_text())["quantization_config"]["digest"]


def damage(data: bytes, dice: random.Random) -> bytes:
    """A flipped bit, a byte more or less, a stretch of zeros, another stretch of itself, or the end cut off."""
    place, length = dice.randrange(len(data)), dice.randrange(1, 64)
    stretch = data[place : place + length]
    kind = dice.randrange(6)
    if kind == 0 or (kind == 3 and not any(stretch)):
        return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + bytes([dice.randrange(256)]) + data[place:]
    if kind == 2:
        return data[:place] + data[place + 1 :]
    if kind == 3:
        return data[:place] + bytes(len(stretch)) + data[place + length :]
    other = dice.randrange(len(data) - len(stretch))
    if kind == 4 and data[other : other + len(stretch)] != stretch:
        return data[:place] + data[other : other + len(stretch)] + data[place + length :]
    return data[:place]


def test_none_of_200_damaged_files_loads(folder, tmp_path):
    """All by the check that loading starts with, and some of them by from_pretrained."""
    dice, whole = random.Random(0), contents(folder)
    files = sorted(name for name in whole if name.endswith(".safetensors"))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    paths = [tmp_path / name for name in files]
    assert checked.check(paths, digest(folder))
    for number in range(200):
        name = dice.choice(files)
        (tmp_path / name).write_bytes(damage(whole[name], dice))
        with pytest.raises(ValueError, match=r"is damaged|lacks files"):
            checked.check(paths, digest(folder))
        if number % 20 == 0:
            with pytest.raises(ValueError, match=r"save the folder again"):
                pst.load_sparse(tmp_path)
        (tmp_path / name).write_bytes(whole[name])
    assert pst.load_sparse(tmp_path)


def test_a_damaged_config_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    about = config["quantization_config"]
    for change, error in (
        ({"version": 2}, r"has version 2, this pst_kernels reads 1; update pst_kernels"),
        ({"digest": None}, r"has a damaged quantization_config"),
        ({"digest": "00000000"}, r"lacks files, or holds some of another save"),
        ({"extra": 1}, r"has a damaged quantization_config"),
        ({"quant_method": "pst_kernels.hg"}, r"was not written by save_sparse"),
    ):
        config["quantization_config"] = about | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=error):
            pst.load_sparse(tmp_path)
    config["quantization_config"] = about
    for name in ("BertTokenizer", "Unheard", 3):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        with pytest.raises(ValueError, match=f"has no class {name}"):
            pst.load_sparse(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"the folder does not fit its config: .* is Linear \(40, 32\)"):
        pst.load_sparse(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config)[:-9])
    with pytest.raises(OSError, match="not a valid JSON file"):
        pst.load_sparse(tmp_path)


def test_missing_mixed_and_foreign_files_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    files = sorted(tmp_path.glob("*.safetensors"))
    kept, last = files[-1].read_bytes(), files[-1]
    last.unlink()
    with pytest.raises(REFUSED):
        pst.load_sparse(tmp_path)
    with pytest.raises(ValueError, match="lacks files"):
        checked.check(files[:-1], digest(folder))
    pst.save_sparse(zeroed(sparsity=0.8), tmp_path / "other", max_shard_size=12_000)
    shutil.copy(tmp_path / "other" / last.name, last)
    with pytest.raises(ValueError, match=r"save the folder again"):
        pst.load_sparse(tmp_path)
    save_file(load_file(tmp_path / "other" / last.name), last, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is damaged or foreign \(its metadata are not"):
        pst.load_sparse(tmp_path)
    last.write_bytes(kept)
    assert pst.load_sparse(tmp_path)


def test_bits_that_are_none_of_the_layers(tmp_path):
    """Files whose sums are right, but not what they say."""
    bits = torch.tensor([[0b101, 0], [0b1, 0b1]], dtype=torch.uint8)
    good = {"a.weight": torch.ones(4), "a.weight_bits": bits}

    def check(tensors, shape=Shape(2, 9)):  # noqa: B008
        sums = checked.checksums(tensors)
        save_file(tensors, tmp_path / "file", checked.metadata({"a": shape}, sums))
        return checked.check([tmp_path / "file"], checked.digest_of(sums))

    assert check(good) == {"a": (Shape(2, 9), 4)}
    for change, shape in (
        ({"a.weight": torch.ones(3)}, Shape(2, 9)),
        ({"a.weight": torch.ones(2, 2)}, Shape(2, 9)),
        ({"a.weight_bits": bits | 0b110}, Shape(2, 9)),
        ({"a.weight_bits": bits[:1].clone()}, Shape(2, 9)),
        ({"a.weight_bits": bits.to(torch.int8)}, Shape(2, 9)),
        ({}, Shape(2, 8)),
        ({}, Shape(2, 9, 4)),
    ):
        with pytest.raises(ValueError, match="save the folder again"):
            check(good | change, shape)
    with pytest.raises(ValueError, match="save the folder again"):
        check({"a.weight": torch.ones(4)})


def test_a_failed_save_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch):
    import safetensors.torch

    shutil.copytree(folder, tmp_path / "folder")
    before = contents(tmp_path / "folder")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        pst.save_sparse(zeroed(sparsity=0.5), tmp_path / "folder")
    assert contents(tmp_path / "folder") == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert toys.logits(pst.load_sparse(tmp_path / "folder"), "bert") is not None
