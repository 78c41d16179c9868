"""Every shipped kernel compiles for gfx942."""

from __future__ import annotations

import pytest

kernels = pytest.importorskip("pst_kernels.triton.tools.machine_code")

import recorded  # noqa: E402

ARCHITECTURE = "gfx942"


@pytest.mark.compiled
@pytest.mark.parametrize("files", recorded.FILES, ids=lambda files: files[-1])
def test_every_binary_becomes_machine_code(files: tuple[str, ...]) -> None:
    binaries, rows = kernels.shipped(ARCHITECTURE, files), recorded.report(ARCHITECTURE, files)
    assert [row.case for row in rows] == [binary.case.name for binary in binaries]
    assert {row.case: row.error for row in rows if row.error} == {}
    assert all(row.registers for row in rows)


def test_every_kernel_is_asked_for() -> None:
    def named(*files: tuple[str, ...]) -> set[tuple[str, str]]:
        return {(binary.kernel.__name__, binary.case.name) for binary in kernels.shipped(ARCHITECTURE, *files)}

    asked = set().union(*(named(files) for files in recorded.FILES))
    assert named() <= asked
    some = {"gather_kernel", "radix_histogram_kernel", "refine_kernel", "bracket_kernel", "mask_kernel"}
    assert some <= {kernel for kernel, _ in asked}


@pytest.mark.compiled
def test_machine_code_is_compiled_here_too() -> None:
    """Of the first kernel, whatever is kept."""
    binary = kernels.shipped(ARCHITECTURE)[0]
    assert binary.compile(kernels.gpu_target(ARCHITECTURE)).asm["hsaco"]
