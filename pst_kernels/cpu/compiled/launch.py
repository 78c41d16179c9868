"""What fallback.py asks of the compiled passes: scores, candidates of a bracket, M * W', and the factor gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pst_kernels.masks.packing import packed_width

from ..row_blocks import GEMM_ROWS, buffers, row_blocks
from ..select import Bracket, Candidates
from . import kernels as passes
from .arguments import Frame, share_rows, share_rows_of_sums

SHARES = 8  # of the rows of G that are there at once: each has its own sums over rows, as large as the factors
MOST_CANDIDATES = 8  # one in so many weights; where there are more, as in ties of millions, the pass runs again


class CompiledScores:
    """Scores that `selection.select` searches; the mask, and M * W' if it is wanted, follow what it finds.

    `packed` (out, words) is the packed mask; `masked`, fp32 or bf16 (out, in), may be None.
    """

    def __init__(
        self, weight, U, V, A, B, R, C, beta: float, alpha1: float, alpha2: float,
        packed: Tensor, masked: Tensor | None,
    ):  # fmt: skip
        self.frame = Frame(weight, U, V, beta)
        self.frame.set_scores(A, B, R, C, alpha1, alpha2)
        self.packed, self.masked = packed, masked
        self.frame.set(packed=packed)
        if masked is not None:
            self.frame.set(masked=masked)
        self.shape = weight.shape
        self.share = share_rows(*weight.shape)

    def gather(self, bracket: Bracket) -> Candidates:
        in_a_share = self.share * self.shape[1]
        usual = in_a_share // MOST_CANDIDATES
        found, most = self._gather(bracket, usual + passes.ROOM)
        return found if most <= usual else self._gather(bracket, in_a_share + passes.ROOM)[0]

    def _gather(self, bracket: Bracket, capacity: int) -> tuple[Candidates, int]:
        """The candidates, and how many the share with most has; more than `capacity` are not all there."""
        shares = -(-self.shape[0] // self.share)
        device = self.packed.device
        scores = buffers.get("candidates", (shares, capacity), torch.float32, device)
        places = buffers.get("places", (shares, capacity), torch.int64, device)
        below, found = np.empty(shares, np.int64), np.empty(shares, np.int64)
        self.frame.set(
            lower=bracket.lower, upper=bracket.upper, candidates=scores, places=places, capacity=capacity,
            below=below.ctypes.data, found=found.ctypes.data,
        )  # fmt: skip
        self.frame.run(passes.prune, self.share)
        candidates = Candidates(
            int(below.sum()),
            np.concatenate([row[:n] for row, n in zip(scores.numpy(), found, strict=True)]),
            np.concatenate([row[:n] for row, n in zip(places.numpy(), found, strict=True)]),
        )
        return candidates, int(found.max())

    def prune(self, found: Candidates, value: float, count: int) -> int:
        return passes.drop_first(found.scores, found.index, np.float32(value), count, *self._results())

    def drop(self, places: np.ndarray) -> None:
        passes.drop(places, *self._results())

    def _results(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """The packed mask, its columns, and M * W', flat, as fp32 and as bf16: what there is of them."""
        floats, halves = np.empty(0, np.float32), np.empty(0, np.uint16)
        if self.masked is not None and self.masked.dtype == torch.float32:
            floats = self.masked.view(-1).numpy()
        elif self.masked is not None:
            halves = self.masked.view(torch.uint16).view(-1).numpy()
        return self.packed.view(torch.uint32).numpy(), self.shape[1], floats, halves

    def all(self) -> np.ndarray:
        self._gather(Bracket(-np.inf, -np.inf), 0)  # keeps every weight; how many are at -inf is of no interest
        return self.scores().view(-1).numpy()

    def scores(self) -> Tensor:
        out = torch.empty(self.shape, dtype=torch.float32)
        self.frame.set(scores=out)
        self.frame.run(passes.scores, self.share)
        return out


def scores(weight, U, V, A, B, R, C, beta: float, alpha1: float, alpha2: float) -> Tensor:
    nothing = torch.empty(0, dtype=torch.int32)
    return CompiledScores(weight, U, V, A, B, R, C, beta, alpha1, alpha2, nothing, None).scores()


def masked_into(out: Tensor, weight: Tensor, U: Tensor, V: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Fill `out`, fp32 or bf16 (out, in), with M * W'."""
    frame = Frame(weight, U, V, beta)
    frame.set(packed=mask.contiguous(), masked=out)
    frame.run(passes.masked_weight, share_rows(*weight.shape))
    return out


def factor_gradients(
    gy: Tensor, x: Tensor, weight, U, V, A, B, mask: Tensor, beta: float, alpha1: float, alpha2: float,
    through_magnitude: bool, masked: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The six factor gradients from G = gy^T x, of which a group of rows exists at a time; `masked` gets M * W'."""
    out, columns = weight.shape
    frame = Frame(weight, U, V, beta)
    score = frame.set_score_factors(A, B, alpha1)
    up = len(frame.V)
    dU, dA, dR = torch.empty(out, up), torch.empty(out, score), torch.empty(out)
    parts = up + score + 1
    group_rows = -(-out // -(-out // GEMM_ROWS))
    rows = share_rows_of_sums(group_rows, SHARES)
    partial = buffers.get("partial sums", (-(-group_rows // rows), parts, columns), torch.float32, gy.device).zero_()
    gradients = buffers.get("gradient", (group_rows, columns), gy.dtype, gy.device)
    frame.set(
        packed=mask.contiguous(), through_magnitude=int(through_magnitude), dU=dU, dA=dA, dR=dR, partial=partial,
        gradient=gradients,
    )  # fmt: skip
    if masked is not None:
        frame.set(masked=masked)
    for group in row_blocks(0, out, group_rows):
        torch.mm(gy[:, group].T, x, out=gradients[: group.stop - group.start])
        frame.run(passes.gradients, rows, group.start, group.stop)
    dV, dB = partial[:, : V.shape[0]].sum(0), partial[:, up : up + B.shape[0]].sum(0)
    dC = partial[:, up + score].sum(0)
    return dU[:, : V.shape[0]] * beta, dV, dA[:, : B.shape[0]] * alpha1, dB, dR.mul_(alpha2), dC.mul_(alpha2)


def new_mask(weight: Tensor) -> Tensor:
    """Room for the packed mask of a weight."""
    return torch.empty((weight.shape[0], packed_width(weight.shape[1])), dtype=torch.int32)
