"""The compressed file of a sparse model: what was saved comes back bit for bit, in the size of what is kept."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import differences, trained

import pst_kernels as pst
from pst_kernels.export.compressed import load_compressed, save_compressed


def test_a_merged_model_comes_back_bit_for_bit(tmp_path):
    model = pst.merge_and_unload(trained("bert", sparsity=0.9))
    save_compressed(model.state_dict(), tmp_path / "model")
    assert not differences(load_compressed(tmp_path / "model"), dict(model.state_dict()))


def test_size_at_90_percent(tmp_path):
    layer = pst.PSTLinear(384, 1536, config=pst.PSTConfig(sparsity=0.9))
    weight = layer.masked_weight()
    save_compressed({"weight": weight}, tmp_path / "file")
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "file").values())
    kept = weight.numel() - int(weight.numel() * 0.9)
    assert stored == 4 * kept + weight.numel() // 8 + -(-(weight.numel() - kept) // 8)
    assert (tmp_path / "file").stat().st_size < 0.17 * 4 * weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_odd_values_and_shapes(dtype, tmp_path):
    odd = torch.zeros(7, 11, dtype=dtype)
    odd[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-7]).to(dtype)
    state = {
        "odd": odd, "transposed": odd.t(), "all zero": torch.zeros(3, 5, dtype=dtype),
        "0-d": torch.zeros((), dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype), "dense": torch.randn(4, 4).to(dtype), "count": torch.zeros(9).long(),
    }  # fmt: skip
    save_compressed(state, tmp_path / "file")
    assert not differences(load_compressed(tmp_path / "file"), state)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_comes_back_bit_for_bit(dtype, tmp_path):
    bits = torch.zeros(16, 33, dtype=torch.uint8)
    bits[0] = 0x80  # -0.0, or NaN
    bits[1] = torch.arange(33) * 7
    state = {"sparse": bits.view(dtype), "dense": torch.arange(256).to(torch.uint8).view(dtype)}
    save_compressed(state, tmp_path / "file")
    assert not differences(load_compressed(tmp_path / "file"), state)


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass a file written by save_compressed"):
        load_compressed(tmp_path / "none")
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign")
    (tmp_path / "text").write_text("no tensors here")
    save_compressed({"a": torch.eye(9)}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-4])
    tensors = load_file(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    for part, tensor in tensors.items():  # one byte or one value too few
        save_file(tensors | {part: tensor[:-1].clone()}, tmp_path / part, metadata)
    for name in ("foreign", "text", "cut", *tensors):
        with pytest.raises(ValueError, match=r"is damaged or foreign .* write it again with save_compressed"):
            load_compressed(tmp_path / name)
