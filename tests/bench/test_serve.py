"""`python -m bench serve` on a tiny model: a row for each contestant, from folders that were loaded."""

import json

import pytest
import torch
import toys

from bench import __main__ as bench
from bench.speed import serve


def test_a_small_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "MODELS", {"tiny": lambda layers: toys.gpt2(n_embd=128, n_layer=layers or 1)})
    monkeypatch.setattr(serve, "_loading", lambda place: {"load_s": 1.0, "load_mb": 2.0})
    size = ["--prompt", "5", "--new-tokens", "2", "--rounds", "1", "--batches", "1", "2", "--sparsities", "0", "0.75"]
    arguments = ["serve", "--models", "tiny", "--layers", "1", *size, "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    assert "tiny, 1 layers" in capsys.readouterr().out
    rows = json.loads((tmp_path / "serve.json").read_text())["rows"]
    measured = [row for row in rows if row["device"] == "cpu"]
    assert [(row["what"], row["batch"]) for row in measured] == [
        (what, batch) for what in (serve.DENSE, serve.INT8, serve.SPARSE, serve.BLOCK) for batch in (1, 2)
    ]
    assert all(row["tokens_s"] > 0 and row["ratio"] > 0 for row in rows)
    disk = {row["what"]: row["disk_mb"] for row in measured}
    assert disk[serve.BLOCK] < disk[serve.SPARSE] < disk[serve.DENSE]
    assert disk[serve.INT8] is None
    assert bench.main([*arguments, "--show"]) == 0


@pytest.mark.slow
def test_loading_is_measured_in_a_fresh_process(tmp_path):
    from pst_kernels import save_sparse

    model = toys.seeded("gpt2")
    for layer in serve.block_linears(model).values():
        with torch.no_grad():
            serve._prune(layer.weight, 0.5, 1)
            assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
    save_sparse(model, tmp_path)
    found = serve._loading(tmp_path)
    assert found["load_s"] > 0
    assert found["load_mb"] >= 0
