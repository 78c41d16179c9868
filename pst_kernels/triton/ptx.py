"""All inline assembly, with what stands in for it where there is none: in the interpreter, for fp32 x, and on AMD GPUs.

A kernel takes its assembly as a constexpr string, empty where Triton's own operations shall do the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A packed pair of weights is ANDed with a pair of masks: PRMT with bit 3 of a selector set fills a byte with a sign
# bit. Columns in a row of the tile: bits p and p + 16 of the word, shifted to 7 and 23 (or 15 and 31 for p >= 8), by
# `shift`. Columns in a column of the tile: the two bits come from two words, of which `select` takes the half with even
# columns or that with odd ones. W itself is an operand only so that its load is pipelined: Triton pipelines what
# reaches a dot's first two operands, and W enters through the accumulator.
_PACK = {
    torch.bfloat16: "cvt.rn.bf16x2.f32 %pair, $2, $1;", torch.float16: "cvt.rn.f16x2.f32 %pair, $2, $1;",
}  # fmt: skip
_ALONG_DEPTH = "shl.b32 %keep, ${word}, ${shift}; prmt.b32 %keep, %keep, %keep, ${select};"
_ALONG_ROWS = (
    "prmt.b32 %keep, ${word}, ${word1}, ${select};"
    " shl.b32 %keep, %keep, ${shift}; prmt.b32 %keep, %keep, %keep, 0xBB99;"
)


def _masking(dtype: torch.dtype, along_rows: bool, wide_weight: bool) -> tuple[str, str]:
    first = 5 if wide_weight else 4  # $3 is a pair of W: one register, or two where it is fp32
    places = {"word": first, "word1": first + 1, "shift": first + 2, "select": first + 4}
    mask = _ALONG_ROWS if along_rows else _ALONG_DEPTH
    for name, place in places.items():
        mask = mask.replace("${" + name + "}", f"${place}")
    return f"{{\n.reg .b32 %pair, %keep;\n{_PACK[dtype]} {mask} and.b32 $0, %pair, %keep;\n}}", "=r" + ",r" * (
        first + 5
    )


# Assembly and constraints of `keep`, by the dtype of x, whether a mask word holds columns of a column of the tile, and
# whether W is fp32.
MASKING = {
    (dtype, along_rows, wide): _masking(dtype, along_rows, wide)
    for dtype in _PACK for along_rows in (False, True) for wide in (False, True)
}  # fmt: skip

# Of `rounded`, by the dtype of x and whether W is fp32. W is an operand for the same reason.
ROUNDING = {
    (dtype, wide): (convert.replace("%pair", "$0"), "=r,r,r,r" + ",r" * wide)
    for dtype, convert in _PACK.items() for wide in (False, True)
}  # fmt: skip

# Of `split`. In one block so that the fp32 parts of a large tile do not all live at once: they would not fit.
SPLITTING = """{
.reg .b32 %first, %second;
cvt.rn.bf16x2.f32 $0, $3, $2;
shl.b32 %first, $0, 16;
and.b32 %second, $0, 0xffff0000;
sub.f32 %first, $2, %first;
sub.f32 %second, $3, %second;
cvt.rn.bf16x2.f32 $1, %second, %first;
}"""


@triton.jit
def widen(b_weight, ASSEMBLY: tl.constexpr):
    """b_weight in fp32."""
    if ASSEMBLY and b_weight.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [b_weight],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return b_weight.to(tl.float32)


@triton.jit
def keep(b_updated, b_weight, b_word, b_shift, b_select, b_x, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """W' where its bit is set, else 0, in the dtype of `b_x`."""
    if ASSEMBLY == "":
        return tl.where(((b_word >> b_shift) & 1) != 0, b_updated, 0.0).to(b_x.dtype)
    return tl.inline_asm_elementwise(
        ASSEMBLY, CONSTRAINTS, [b_updated, b_weight, b_word, b_shift, b_select], dtype=b_x.dtype, is_pure=True, pack=2
    )


@triton.jit
def rounded(b_updated, b_weight, b_x, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """W' in the dtype of `b_x`."""
    if ASSEMBLY == "":
        return b_updated.to(b_x.dtype)
    return tl.inline_asm_elementwise(
        ASSEMBLY, CONSTRAINTS, [b_updated, b_weight], dtype=b_x.dtype, is_pure=True, pack=2
    )


@triton.jit
def used(b):
    """b after an empty use: what makes it, such as a wgmma, is waited for here."""
    return tl.inline_asm_elementwise("", "=f,0", [b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def split(b, FAST: tl.constexpr, SPLIT: tl.constexpr):
    """b as the sum of a high and a low part in bf16, 16 bits together; without FAST b itself, twice."""
    if not FAST:
        return b, b
    elif SPLIT != "":
        return tl.inline_asm_elementwise(
            SPLIT, "=&r,=&r,r,r", [b], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        b_high = b.to(tl.bfloat16)
        return b_high, (b - b_high.to(tl.float32)).to(tl.bfloat16)
