"""U and V over lists of kept weights: W' where a weight is kept, and dU and dV from G = gy^T x there.

Without the compiled passes they come from dense products.
"""

from __future__ import annotations

from torch import Tensor

from ..operands import compute_dtype
from . import scratch
from .sparse_rows import SparseRows, compiled_passes


def kept_values(lists: SparseRows, U: Tensor, V: Tensor, beta: float, added: Tensor | None) -> Tensor:
    """W' = W + beta U V where kept, and `added` to it, in fp32 (float64 for a float64 weight); the values are W."""
    base = lists.values.to(compute_dtype(lists.values.dtype))
    passes = compiled_passes(lists.values)
    if passes is not None:
        added = None if added is None else added.detach().to(base.dtype).contiguous()
        return passes.low_rank.values_of(base, lists[1:], U, V, beta, added)
    update = (U.to(base.dtype) @ V.to(base.dtype))[lists.places()]
    values = base.add(update, alpha=beta)
    return values if added is None else values + added


def factor_gradients(G: SparseRows, U: Tensor, V: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """dU = beta G V^T (out, r) and dV = beta U^T G (r, in); G's values, and these, are fp32."""
    passes = compiled_passes(G.values)
    if passes is not None:
        return passes.low_rank.factor_gradients(G.values, G[1:], U, V, beta, scratch.get)
    dense = G.to_dense()
    return dense @ V.to(dense.dtype).t() * beta, U.to(dense.dtype).t() @ dense * beta
