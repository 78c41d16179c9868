"""The wheel and the sdist: what is in them. `make package` installs both into an empty environment and uses them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from pages import ROOT

import pst_kernels as pst

BUILD = "from setuptools import build_meta; build_meta.build_sdist('.'); print(build_meta.build_wheel('.'))"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of both, built of a copy, for setuptools writes beside what it reads."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("built")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("pst_kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_alone(built):
    (path,) = built.glob("*.whl")
    wheel = zipfile.ZipFile(path)
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "pst_kernels").rglob("*.py")}
    assert files == sources | {"pst_kernels/py.typed"}
    about = f"pst_kernels-{pst.__version__}.dist-info"
    assert "pst-kernels = pst_kernels.cli:main" in wheel.read(f"{about}/entry_points.txt").decode()
    told = message_from_string(wheel.read(f"{about}/METADATA").decode())
    assert told["Version"] == pst.__version__
    assert told["Requires-Python"] == ">=3.10"
    assert set(told.get_all("Provides-Extra")) >= {"finetune", "demo", "bench", "docs", "dev"}
    needed = {line.partition(";")[0].partition(">")[0] for line in told.get_all("Requires-Dist") if "extra" not in line}
    assert needed == {"torch", "triton", "numpy", "numba", "safetensors"}


def test_the_sdist_builds_without_the_repository(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "pst_kernels/py.typed"}
    assert names >= {str(file.relative_to(ROOT)) for file in (ROOT / "pst_kernels").rglob("*.py")}


def test_one_version_everywhere():
    assert f'version="{pst.__version__}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f"version: {pst.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {pst.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
