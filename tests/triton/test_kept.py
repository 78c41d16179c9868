"""Kept programs: they are those that the compiler makes, and a change of anything that decides one is noticed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from emulator import emulate, kept, launch, launching  # noqa: E402
from emulator.front_end import FrontEnd  # noqa: E402
from test_layer_emulated import layer, step  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.compiled


@triton.jit
def twice_kernel(x_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i, mask=i < N), mask=i < N)


@triton.jit
def thrice_kernel(x_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 3 * tl.load(x_ptr + i, mask=i < N), mask=i < N)


def front(kernel=twice_kernel, arch: int = 90, n_type: str = "i32", block: int = 32, aligned: bool = True, **options):
    attributes = {(0,): launching.DIVISIBLE} if aligned else {}
    signature = {"x_ptr": "*fp32", "N": n_type, "BLOCK": "constexpr"}
    source = ASTSource(kernel, signature, constexprs={"BLOCK": block}, attrs=attributes)
    return FrontEnd.of(source, GPUTarget("cuda", arch, 32), {"num_warps": 4, **options})


def doubled() -> torch.Tensor:
    x = torch.arange(40, dtype=torch.float32)
    launching._programs.clear()
    launch(twice_kernel, (1,), [x, 37], {"BLOCK": 64}, arch=90)
    return x


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nothing is kept yet; what is asked for here is not for `make record`, under which this may run."""
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "programs")
    monkeypatch.delenv(kept.ASKED_FOR, raising=False)
    kept.kept.cache_clear()
    yield tmp_path
    kept.kept.cache_clear()
    launching._programs.clear()


@pytest.mark.parametrize("settings", [{}, {"pattern": "block:32", "mask_interval": 1}], ids=["weights", "blocks"])
def test_a_kept_program_is_what_the_compiler_makes(arch: int, monkeypatch, settings: dict) -> None:
    """Of the kernels of a training step, compiled here whatever is in Triton's cache."""
    compared, program = set(), kept.program

    def both(front: FrontEnd) -> kept.Ptx:
        found, made = program(front), kept.compiled(front)
        assert found == made
        compared.add(front.source.fn.__name__)
        return found

    monkeypatch.setattr(kept, "program", both)
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    launching._programs.clear()
    with emulate(arch):
        step(layer(**settings), torch.randn(6, 70).to(torch.bfloat16))
    assert len(compared) >= 5, compared


def test_what_decides_a_program() -> None:
    changed = [
        front(thrice_kernel), front(arch=80), front(n_type="i64"), front(block=64), front(aligned=False),
        front(num_warps=2), front(maxnreg=64),
    ]  # fmt: skip
    for digest in (FrontEnd.digest, FrontEnd.source_digest):
        assert digest(front()) == digest(front())
        assert len({digest(front()), *map(digest, changed)}) == len(changed) + 1


def test_a_program_is_kept_and_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.arange(40.0) * torch.where(torch.arange(40) < 37, 2, 1)
    (folder / "asked").mkdir()
    monkeypatch.setenv(kept.ASKED_FOR, str(folder / "asked"))
    assert torch.equal(doubled(), expected)
    kept.keep(folder / "asked")
    monkeypatch.delenv(kept.ASKED_FOR)
    kept.kept.cache_clear()
    monkeypatch.setattr(kept, "compiled", lambda front: pytest.fail("compiled, though it is kept"))
    assert torch.equal(doubled(), expected)


def test_a_program_is_found_where_only_lines_have_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = front()
    (folder / "asked").mkdir()
    (folder / "asked/one.json").write_text(json.dumps(["twice_kernel", "of other lines", one.digest(), (7, "text")]))
    kept.keep(folder / "asked")
    monkeypatch.setattr(kept, "compiled", lambda front: pytest.fail("compiled, though it is kept"))
    assert kept.program(one) == kept.Ptx(7, "text")


def test_what_is_not_kept_is_compiled_and_said(folder: Path) -> None:
    with pytest.warns(UserWarning, match="twice_kernel: .* run `make record`"):
        doubled()


def test_what_another_version_made_is_not_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = front()
    (folder / "asked").mkdir()
    (folder / "asked/one.json").write_text(json.dumps(["twice_kernel", one.source_digest(), one.digest(), (7, "text")]))
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.0.0")
        kept.keep(folder / "asked")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to do: no other version's programs are kept
        assert ".entry twice_kernel" in kept.program(one).text


def test_what_no_test_asks_for_any_more_goes(folder: Path) -> None:
    (folder / "asked").mkdir()
    kept.FOLDER.mkdir()
    (kept.FOLDER / "gone_kernel.json.xz").write_bytes(b"")
    kept.keep(folder / "asked")
    assert list(kept.FOLDER.iterdir()) == []
