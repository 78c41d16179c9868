"""The notebook: clean JSON, and its cells run one after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
matplotlib = pytest.importorskip("matplotlib")
NOTEBOOK = Path(__file__).parents[2] / "examples" / "where_the_zeros_lie.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_is_whole_and_without_outputs(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", cell["id"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")
        if cell["cell_type"] == "code":
            assert cell.keys() == {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        else:
            assert cell.keys() == {"cell_type", "id", "metadata", "source"}
            assert cell["cell_type"] == "markdown"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_its_cells_run(notebook, tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setenv("PST_NOTEBOOK", "tiny")
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(pyplot.get_fignums()) == 4
    pyplot.close("all")
    output = capsys.readouterr().out
    assert "18 layers" in output
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "zeros.png"}
    shares, zeros = names["shares"], names["zeros"]
    assert list(names["masks"]) == [2, 4, 6]
    np.testing.assert_array_equal(shares, shares.T)
    np.testing.assert_array_equal(np.diag(shares), 1.0)
    assert 0.0 < shares.min() < 1.0
    weights = np.array([layer.weight.numel() for _, layer in names["pst_layers"](names["model"])])
    assert (zeros[:, -1] * weights).sum() == pytest.approx(0.9 * weights.sum(), abs=len(weights))
    assert len({round(zero, 4) for zero in zeros[:, -1]}) > 3  # one threshold, not one share
