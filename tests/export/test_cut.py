"""Parts of packed layers: rows and columns, cut from values and bits, are those of the dense weight."""

from __future__ import annotations

import pytest
import torch

from pst_kernels.export.cut import Part, cut
from pst_kernels.export.packed import Shape, empty, pack
from pst_kernels.layers.block_sparse_linear import BlockSparseLinear
from pst_kernels.layers.sparse_linear import SparseLinear

# no multiples of 8 bits or of a chunk's 128 columns, parts that begin within a chunk, one row or column a part
SHAPES = [(6, 8, 2), (4, 4, 4), (12, 300, 2), (15, 390, 3), (36, 1028, 4), (2, 254, 2)]


def weight(out: int, columns: int, density: float, block: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out + columns)
    sizes = (-(-out // block), -(-columns // block))
    kept = (torch.rand(sizes, generator=generator) < density).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.randn(out, columns, generator=generator) * kept[:out, :columns]


def parts(layer: SparseLinear | BlockSparseLinear, dim: int, count: int):
    """Every part as a layer."""
    values, bits = pack(layer).values()
    for index in range(count):
        part = Part(Shape.of(layer), dim, index, count)
        assert part.refusal() is None
        made = empty(part.shape, 0, False, values.dtype)
        tensors = cut(part, values, bits)
        assert made._wrong(*tensors) is None
        made._take(*tensors)
        yield made


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_of_single_weights(shape, density, dim):
    dense = weight(*shape[:2], density)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = dense.to(dtype)
        found = list(parts(SparseLinear.from_dense(rounded, None), dim, shape[2]))
        for made, expected in zip(found, rounded.chunk(shape[2], dim), strict=True):
            assert torch.equal(made.to_dense(), expected)
            twin = SparseLinear.from_dense(expected, None)  # the same lists in the same order
            assert all(torch.equal(getattr(made, name), getattr(twin, name)) for name in made.PARTS)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("shape", "dim"), [((32, 20), 0), ((20, 32), 1), ((8, 9), 0), ((48, 48), 1)], ids=str)
def test_parts_of_blocks(shape, dim, density):
    """Where the other dimension is not made of whole blocks too."""
    dense = weight(*shape, density, block=4)
    found = list(parts(BlockSparseLinear.from_dense(dense, None, 4), dim, 2))
    for made, expected in zip(found, dense.chunk(2, dim), strict=True):
        assert torch.equal(made.to_dense(), expected)
        assert len(made.weight) == len(BlockSparseLinear.from_dense(expected.contiguous(), None, 4).weight)


def test_what_cannot_be_cut_says_why():
    assert Part(Shape(9, 8), 0, 0, 2).refusal() == "has 9 rows, which do not make 2 equal parts"
    assert Part(Shape(8, 9), 1, 0, 2).refusal() == "has 9 columns, which do not make 2 equal parts"
    blocks = "has 24 rows, which do not make 2 equal parts of whole blocks of 16"
    assert Part(Shape(24, 32, 16), 0, 0, 2).refusal() == blocks
    assert Part(Shape(24, 32, 16), 1, 0, 2).refusal() is None
