"""Every shipped kernel compiles for gfx942: one binary a kernel by default, every binary with the slow tests."""

from __future__ import annotations

import pytest

kernels = pytest.importorskip("pst_kernels.triton.tools.machine_code")

import recorded  # noqa: E402

ARCHITECTURE = "gfx942"


@pytest.mark.compiled
def test_every_kernel_becomes_machine_code() -> None:
    first = {binary.kernel.__name__: binary for binary in reversed(kernels.shipped(ARCHITECTURE))}
    assert {"gather_kernel", "radix_histogram_kernel", "refine_kernel", "bracket_kernel", "mask_kernel"} <= set(first)
    for binary in first.values():
        assert binary.compile(kernels.gpu_target(ARCHITECTURE)).asm["hsaco"], binary.kernel.__name__


@pytest.mark.compiled
def test_every_selection_and_mask_binary_compiles() -> None:
    rows = recorded.report(ARCHITECTURE, files=("select", "mask"))
    assert len(rows) == len(kernels.shipped(ARCHITECTURE, ("select", "mask")))
    assert {row.case: row.error for row in rows if row.error} == {}
