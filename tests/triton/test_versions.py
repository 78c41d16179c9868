"""The oldest Triton that the kernels take."""

from __future__ import annotations

import pytest

versions = pytest.importorskip("pst_kernels.triton.tiles.versions", reason="triton is not installed")


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0", "3.2.0+git45fff310", "unknown"])
def test_an_older_one_is_refused_with_what_to_do(version: str) -> None:
    with pytest.raises(ImportError, match=r"need triton 3\.6 or newer") as caught:
        versions.require(version)
    for said in (f"found {version};", "pip install 'triton>=3.6'", "PST_KERNELS_BACKEND=torch"):
        assert said in str(caught.value)


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "3.7.1+git", "4.0.0"])
def test_a_newer_one_is_taken(version: str) -> None:
    versions.require(version)
