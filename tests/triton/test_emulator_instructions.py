"""Single instructions of the emulator, and its checks, on PTX written by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from emulator import Block, MemoryFault, Stats, Unsupported
from emulator.decoding import Decoder
from emulator.formats import f32_to_bf16
from emulator.memory import Global
from emulator.parsing import parse

TEXT = """
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 in, .param .u64 .ptr .global .align 1 out) .reqntid 32
{{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .f32 %f<9>; .reg .b64 %rd<9>;
ld.param.b64 %rd1, [in]; ld.param.b64 %rd2, [out];
mov.u32 %r90, %tid.x; mul.wide.u32 %rd3, %r90, 16; add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3;
ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];
{body}
st.global.b32 [%rd2], %r5;
ret;
}}"""


def run(body: str, *operands: object, shared: int = 1024) -> tuple[np.ndarray, Stats]:
    """%r5 of 32 threads, which find up to four operands (32-bit numbers, one or one a thread) in %r1 to %r4."""
    program = parse(TEXT.format(body=body), shared)
    given, out = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 4, dtype=torch.int32)
    for i, operand in enumerate(operands):
        word = np.broadcast_to(np.asarray(operand), 32)
        word = word.astype(np.int64).astype(np.uint32) if word.dtype.kind in "iu" else word.astype(np.float32)
        given[:, i] = torch.from_numpy(np.ascontiguousarray(word).view(np.int32))
    memory, stats = Global([given, out]), Stats()
    parameters = {name: np.full(32, memory.address(t), np.uint64) for name, t in (("in", given), ("out", out))}
    with np.errstate(all="ignore"):
        Block(program, Decoder(program, 32), memory, parameters, (0, 0, 0), (1, 1, 1), stats).run()
    memory.copy_back()
    return out[:, 0].numpy().view(np.uint32), stats


def first(body: str, *operands: object) -> int:
    return int(run(body, *operands)[0][0])


@pytest.mark.parametrize(
    ("instruction", "operands", "expected"),
    [
        ("add.s16x2 %r5, %r1, %r2", (0x7FFF_0001, 0x0001_FFFF), 0x8000_0000),
        ("sub.s32 %r5, %r1, %r2", (1, 2), 0xFFFF_FFFF),
        ("mul.lo.s32 %r5, %r1, %r2", (-3, 5), -15),
        ("mul.hi.u32 %r5, %r1, %r2", (0xFFFF_FFFF, 0xFFFF_FFFF), 0xFFFF_FFFE),
        ("mul.hi.s32 %r5, %r1, %r2", (-1, 5), -1),
        ("mad.lo.s32 %r5, %r1, %r2, %r3", (-3, 5, 16), 1),
        ("div.s32 %r5, %r1, %r2", (-7, 2), -3),
        ("div.u32 %r5, %r1, %r2", (7, 0), -1),
        ("rem.s32 %r5, %r1, %r2", (-7, 2), -1),
        ("min.s32 %r5, %r1, %r2", (-1, 1), -1),
        ("min.u32 %r5, %r1, %r2", (-1, 1), 1),
        ("abs.s32 %r5, %r1", (-9,), 9),
        ("shl.b32 %r5, %r1, %r2", (3, 31), 0x8000_0000),
        ("shl.b32 %r5, %r1, %r2", (3, 32), 0),
        ("shl.b32 %r5, %r1, 4", (3,), 48),
        ("shr.u32 %r5, %r1, %r2", (-1, 40), 0),
        ("shr.s32 %r5, %r1, %r2", (-2, 40), -1),
        ("shr.s32 %r5, %r1, 1", (-2,), -1),
        ("shf.l.wrap.b32 %r5, %r1, %r2, 8", (0x1200_0000, 0x34), 0x3412),
        ("shf.r.clamp.b32 %r5, %r1, %r2, 40", (0x12, 0x34), 0x34),
        ("bfe.u32 %r5, %r1, 4, 8", (0xABCDE,), 0xCD),
        ("bfe.s32 %r5, %r1, 4, 8", (0xABCDE,), 0xFFFF_FFCD),
        ("bfe.s32 %r5, %r1, 28, 8", (0xF000_0000,), -1),
        ("bfi.b32 %r5, %r1, %r2, 4, 8", (0xFAB, 0x12345), 0x12AB5),
        ("prmt.b32 %r5, %r1, %r2, 0x7054", (0x44332211, 0x88776655), 0x88116655),
        ("prmt.b32 %r5, %r1, %r2, 0xCBA9", (0x80007F80, 0x80), 0xFFFF0000),
        ("lop3.b32 %r5, %r1, %r2, %r3, 0xCA", (0xFF00, 0x1234, 0x5678), 0x1278),  # a ? b : c
        ("not.b32 %r5, %r1", (5,), 0xFFFF_FFFA),
        ("popc.b32 %r5, %r1", (0xF0F0,), 8),
        ("brev.b32 %r5, %r1", (1,), 0x8000_0000),
        ("clz.b32 %r5, %r1", (0x10,), 27),
        ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r5, {%h2, %h1}", (0x1234_5678,), 0x5678_1234),
        ("cvt.s64.s32 %rd5, %r1; shr.u64 %rd5, %rd5, 40; cvt.u32.u64 %r5, %rd5", (-1,), 0xFF_FFFF),
        ("cvt.u16.u32 %h1, %r1; cvt.s32.s16 %r5, %h1", (0x1FFFE,), -2),
        ("cvt.rzi.s32.f32 %r5, %r1", (-2.7,), -2),
        ("cvt.rni.s32.f32 %r5, %r1", (2.5,), 2),
        ("cvt.rzi.s32.f32 %r5, %r1", (1e20,), 0x7FFF_FFFF),
        ("cvt.rzi.u32.f32 %r5, %r1", (-1.0,), 0),
        ("cvt.rzi.s32.f32 %r5, %r1", (np.nan,), 0),
        ("cvt.rn.bf16x2.f32 %r5, %r1, %r2", (1.0, -2.0), 0x3F80_C000),
        ("cvt.rn.f16x2.f32 %r5, %r1, %r2", (1.0, -2.0), 0x3C00_C000),
        ("cvt.rna.tf32.f32 %r5, %r1", (1 + 2**-11,), 0x3F80_2000),
        ("min.f32 %f1, %r1, %r2; mov.b32 %r5, %f1", (np.nan, 1.0), 0x3F80_0000),
        ("max.NaN.f32 %f1, %r1, %r2; cvt.rzi.s32.f32 %r5, %f1", (np.nan, 1.0), 0),
        ("fma.rn.f32 %r5, %r1, %r1, %r2", (1 + 2**-12, -(1 + 2**-11)), 0x3380_0000),  # 2^-24, one rounding
        ("fma.rn.bf16x2 %r5, %r1, %r1, %r2", (0x4000_4040, 0x3F80_3F80), 0x40A0_4120),  # 2 2 + 1, 3 3 + 1
        ("setp.lt.and.s32 %p1|%p2, %r1, %r2, 1; selp.b32 %r5, 1, 0, %p2", (1, 2), 0),
        ("setp.ne.f32 %p1, %r1, %r1; selp.b32 %r5, 1, 0, %p1", (np.nan,), 0),
        ("setp.neu.f32 %p1, %r1, %r1; selp.b32 %r5, 1, 0, %p1", (np.nan,), 1),
        ("setp.lo.u32 %p1, %r1, %r2; selp.b32 %r5, 1, 0, %p1", (-1, 1), 0),
        ("mov.u32 %r5, memory", (), 0x1000),
        ("add.u32 %r5, %r77, 0", (), 0xFFFF_FFFF),  # never written: poison
    ],
)  # fmt: skip
def test_value(instruction: str, operands: tuple, expected: int) -> None:
    assert first(instruction + ";", *operands) == expected & 0xFFFF_FFFF


LANES = np.arange(32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1", LANES ^ 1),
        ("shfl.sync.up.b32 %r5, %r1, 2, 0, -1", np.where(LANES < 2, LANES, LANES - 2)),
        ("shfl.sync.down.b32 %r5, %r1, 2, 31, -1", np.where(LANES > 29, LANES, LANES + 2)),
        ("shfl.sync.idx.b32 %r5, %r1, 3, 0x181f, -1", LANES // 8 * 8 + 3),  # segments of eight lanes
        ("setp.lt.u32 %p1, %r1, 4; vote.sync.ballot.b32 %r5, %p1, -1", np.full(32, 15)),
        ("setp.lt.u32 %p1, %r1, 4; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r5, 1, 0, %p2", np.zeros(32)),
        ("redux.sync.add.s32 %r5, %r1, -1", np.full(32, 496)),
        ("redux.sync.max.u32 %r5, %r1, -1", np.full(32, 31)),
        ("elect.sync %r9|%p1, -1; selp.b32 %r5, 1, 0, %p1", LANES == 0),
        ("setp.lt.u32 %p1, %r1, 4; mov.u32 %r5, 7; @!%p1 mov.u32 %r5, %r1", np.where(LANES < 4, 7, LANES)),
        # a branch that some take, and where they meet
        ("setp.lt.u32 %p1, %r1, 4; mov.u32 %r5, 1;\n@%p1 bra $A;\nadd.u32 %r5, %r5, 4;\n$A:\nadd.u32 %r5, %r5, 1",
         np.where(LANES < 4, 2, 6)),
        # a loop that each thread leaves at its own time
        ("mov.u32 %r5, 0;\n$L:\nadd.u32 %r5, %r5, 2; setp.lt.u32 %p1, %r5, %r1;\n@%p1 bra $L",
         np.maximum(2, LANES + LANES % 2)),
        # what a lane finds is what those before it have left
        ("st.shared.b32 [memory], 0; atom.shared.add.u32 %r5, [memory], %r1", LANES * (LANES - 1) // 2),
        ("st.shared.b32 [memory], 0; red.shared.max.u32 [memory], %r1; ld.shared.b32 %r5, [memory]", np.full(32, 31)),
        ("st.shared.b32 [memory], 5; atom.shared.cas.b32 %r5, [memory], 5, %r1", np.where(LANES == 0, 5, 0)),
        ("st.shared.b32 [memory], 5; atom.shared.exch.b32 %r5, [memory], %r1", np.where(LANES == 0, 5, LANES - 1)),
        ("ld.shared.b32 %r5, [memory+4]", np.full(32, 0xFFFF_FFFF)),  # shared memory is poisoned
        ("st.shared.b32 [memory], %r1; ld.shared.b32 %r5, [memory]", np.full(32, 31)),
    ],
)  # fmt: skip
def test_lanes(instruction: str, expected: np.ndarray) -> None:
    assert run(instruction + ";", LANES)[0].tolist() == expected.astype(np.uint32).tolist()


def test_mma() -> None:
    """Column 0 of a is g + 1 in rows g < 8, row 0 of b is 2 g: an outer product, of which lane 4 g + t finds columns
    2 t and 2 t + 1 of rows g and g + 8."""
    g, t = LANES // 4, LANES % 4
    a, b = (f32_to_bf16(np.where(t == 0, value, 0).astype(np.float32)) for value in (g + 1, 2 * g))
    text = (
        "mov.u32 %r9, 0; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, "
        "{%r1, %r9, %r9, %r9}, {%r2, %r9}, {%r3, %r3, %r3, %r3}; mov.b32 %r5, "
    )
    found = [run(text + f"%f{i};", a, b, 1.0)[0].view(np.float32).tolist() for i in (1, 2, 3, 4)]
    assert found[0] == (1 + (g + 1) * 4 * t).tolist()
    assert found[1] == (1 + (g + 1) * 2 * (2 * t + 1)).tolist()
    assert found[2] == found[3] == [1.0] * 32


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ("ld.global.b32 %r5, [%rd1+4096];", MemoryFault, "outside every tensor"),
        ("ld.global.b32 %r5, [%rd1+65536];", MemoryFault, "global access outside memory"),
        ("ld.global.b32 %r5, [%rd1+-65536];", MemoryFault, "global access outside memory"),
        ("mov.u64 %rd4, 0; ld.global.b32 %r5, [%rd4];", MemoryFault, "global access outside memory"),
        ("ld.global.b32 %r5, [%rd1+2];", MemoryFault, "misaligned 4-byte global"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd1+4];", MemoryFault, "misaligned 8-byte global"),
        ("st.shared.b32 [memory+1024], %r1;", MemoryFault, "shared access outside memory"),
        ("mov.u32 %r5, memory; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6,%r7,%r8,%r9}, [%r5+1024];", MemoryFault,
         "shared"),
        ("mov.u32 %r5, memory; stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5+8], {%r6,%r7,%r8,%r9};", MemoryFault,
         "misaligned 16-byte shared"),
        ("setp.lt.u32 %p1, %r90, 4;\n@%p1 bra $A;\nbar.sync 0;\n$A:\nadd.u32 %r5, %r1, 1;", RuntimeError, "barrier"),
        ("trap;", RuntimeError, "trap"),
        ("tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r5}, [%r1];", Unsupported, "tcgen05"),
        ("mov.u32 %r5, %clock;", Unsupported, "%clock"),
        ("add.sat.s32 %r5, %r1, %r2;", Unsupported, "sat"),
    ],
)  # fmt: skip
def test_fault(body: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        run(body, LANES)


def test_unsupported_instructions_matter_only_where_they_are_reached() -> None:
    assert first("bra $A;\ntcgen05.fence;\n$A:\nmov.u32 %r5, 3;") == 3


def test_inactive_lanes_may_have_any_address() -> None:
    body = "setp.lt.u32 %p1, %r90, 2; mov.u32 %r5, 9; @!%p1 mov.u64 %rd1, 0; @%p1 ld.global.b32 %r5, [%rd1];"
    found, stats = run(body, 5)
    assert found.tolist() == [5, 5] + [9] * 30
    assert stats.load_bytes == 32 * 16 + 2 * 4
    assert stats.store_bytes == 32 * 4


def test_counts() -> None:
    _, stats = run("add.u32 %r5, %r1, 1; bar.sync 0; setp.lt.u32 %p1, %r90, 0; @%p1 add.u32 %r5, %r5, 1;")
    assert stats.ops["add"] == 2 + 1  # the predicated one is reached by no thread
    assert stats.instructions == 7 + 4 + 2
    assert stats.ops["st"] == 1
    assert "bar" not in stats.ops
