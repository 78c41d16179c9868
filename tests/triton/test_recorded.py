"""Rows that are kept: they are those that the compiler gives, and a change of anything that decides one is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("pst_kernels.triton.tools.machine_code")

import recorded  # noqa: E402


@pytest.mark.compiled
@pytest.mark.parametrize("target", recorded.TARGETS)
@pytest.mark.parametrize("files", [recorded.PRODUCTS, recorded.BLOCKS, recorded.SWEEPS], ids=lambda files: files[-1])
def test_a_kept_row_is_what_the_compiler_makes(target: str, files: tuple[str, ...]) -> None:
    """Of the first binary of each kernel for sm_90, and of the first one for the other targets."""
    binaries = kernels.shipped(target, files)
    first = {binary.kernel.__name__: i for i, binary in reversed(list(enumerate(binaries)))}
    for index in first.values() if target == "sm_90" else [0]:
        made = kernels._row(target, files, index, None)
        found = recorded.kept().rows.get(recorded.digest(target, kernels.shipped(target, files)[index]))
        assert found in (None, recorded.values(made)), made.case


def test_both_ways_to_a_row_lead_to_the_same() -> None:
    """Of one binary of each kernel for each target; a way by the source that isn't kept any more is none."""
    for target in recorded.TARGETS:
        for binary in {binary.kernel.__name__: binary for binary in kernels.shipped(target)}.values():
            by_source = recorded.kept().sources.get(recorded.source_digest(target, binary))
            assert by_source in (None, recorded.digest(target, binary)), binary.case


@pytest.mark.parametrize("digest", [recorded.digest, recorded.source_digest])
def test_what_decides_a_row(digest: Callable[..., str]) -> None:
    binary = kernels.shipped("sm_90", recorded.SWEEPS)[0]
    key = digest("sm_90", binary)
    assert key == digest("sm_90", binary)
    changed = [
        ("sm_80", binary),
        ("sm_90", binary._replace(options={**binary.options, "num_warps": 2})),
        ("sm_90", binary._replace(attributes={})),
        ("sm_90", binary._replace(case=binary.case._replace(slots=0.5))),
        ("sm_90", kernels.shipped("sm_90", recorded.SWEEPS)[1]),
    ]
    assert len({key, *(digest(*given) for given in changed)}) == 6


def test_a_row_is_found_wherever_triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    binary = kernels.shipped("sm_90", recorded.SWEEPS)[0]
    here = recorded.digest("sm_90", binary), recorded.source_digest("sm_90", binary)
    monkeypatch.setattr(triton.knobs.nvidia, "libdevice_path", "/another/clone/libdevice.10.bc")
    assert (recorded.digest("sm_90", binary), recorded.source_digest("sm_90", binary)) == here


def test_what_is_not_kept_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, row = [], kernels.Row("sm_90", "k", "c", 4, 2, 40, 0, 0, 0, 8, False, "", None, None, None, 1.0, "file")
    monkeypatch.setattr(recorded, "made", {})
    monkeypatch.setattr(kernels, "_row", lambda *asked: compiled.append(asked[2]) or row)
    keys = [recorded.digest("sm_90", binary) for binary in kernels.shipped("sm_90", recorded.SWEEPS)[:2]]
    rows = {keys[0]: recorded.values(row._replace(registers=50))}
    monkeypatch.setattr(recorded, "kept", lambda: recorded.Kept(rows, {}))
    with pytest.warns(UserWarning, match="make record"):
        found = [recorded.row("sm_90", recorded.SWEEPS, index) for index in (0, 1, 1)]
    assert compiled == [1]
    assert [one.registers for one in found] == [50, 40, 40]
