"""Distillation objectives between vocabularies that differ. Rows are places that were aligned by byte offsets before.

s, t: logits of student and teacher, (B, V_s) and (B, V_t), at places that both predict (`fedfuse.data.alignment`); a
row may have one column more than its vocabulary, for what is left to 1 (`fedfuse.train.next_token.merged`). Between
equal vocabularies, which is what they are unless `across` says otherwise, `gold` is `js` and `xtoken` is `kl`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.errors import UserError
from fedfuse.train.divergences import JS, divergence
from fedfuse.train.next_token import TINY
from fedfuse.train.objective import Loss, log_softened


class Vocabulary(NamedTuple):
    """What a tokenizer's tokens spell, by id (b"" for those that spell nothing), and how it cuts bytes into ids."""

    pieces: Sequence[bytes]
    encode: Callable[[bytes], Sequence[int]]


class Across(Loss):
    """An objective that can be told the two vocabularies; before that they are one."""

    same_width = False

    def across(self, student: Vocabulary, teacher: Vocabulary) -> Across:
        """Tell whose vocabularies the columns are of; returns itself."""
        self.sizes = len(student.pieces), len(teacher.pieces)
        return self

    def rest_of(self, student: Tensor, teacher: Tensor) -> bool:
        """Whether rows have a last column for what is left to 1.

        Raises
        ------
        UserError
            If the columns are neither the two vocabularies' nor one vocabulary's.
        """
        widths, sizes = (student.shape[1], teacher.shape[1]), getattr(self, "sizes", None)
        if sizes is None and widths[0] == widths[1]:
            return False
        if sizes is not None and widths in (sizes, (sizes[0] + 1, sizes[1] + 1)):
            return widths != sizes
        told = "one vocabulary" if sizes is None else f"vocabularies of {sizes[0]} and {sizes[1]}"
        raise UserError(
            f"loss={type(self).__name__.lower()}: {widths[0]} and {widths[1]} columns do not fit {told}; allowed is "
            f"one column a token, and one more on both sides for the rest"
        )


def sorted_difference(p: Tensor, q: Tensor) -> Tensor:
    """Σ_i |p↓(i) − q↓(i)| of each row, the shorter one filled with zeros."""
    width = max(p.shape[1], q.shape[1])
    p, q = (F.pad(one.sort(1, descending=True).values, (0, width - one.shape[1])) for one in (p, q))
    return (p - q).abs().sum(1)


class ULD(Across):
    """Mean of Σ_i |p_s↓(i) − p_t↓(i)|, each side's probabilities falling. Boizard et al. 2024, arXiv 2402.12030.

    The paper adds it to cross-entropy with a weight λ. Names of classes play no part: it is 0 where both sides are
    equally sure, of whatever. The released code cuts the longer text off and compares place i with place i + 1.
    """

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        return sorted_difference(
            (student / self.temperature).softmax(1), (teacher / self.temperature).softmax(1)
        ).mean()  # fmt: skip


class GOLD(Across):
    """w · JS over tokens of equal bytes + (1 − w) · sorted differences over the others, w = |matched| / V_t.

    As trl's GOLD, with one thing corrected: each side's tokens without a partner are one bucket of the first term, so
    that both are distributions and JS is at most log 2. Groups that are merged before (`next_token.merged`) are not
    renormalised: their last column is what is left, and a partner of the other side's.
    """

    def across(self, student: Vocabulary, teacher: Vocabulary) -> GOLD:
        """Match tokens of equal bytes, the first of equals."""
        super().across(student, teacher)
        where: dict[bytes, int] = {}
        for i, piece in enumerate(student.pieces):
            if piece:
                where.setdefault(piece, i)
        taken: dict[int, int] = {}
        for i, piece in enumerate(teacher.pieces):
            if piece in where:
                taken.setdefault(where[piece], i)
        self.matched = torch.tensor(sorted(taken.items()), dtype=torch.int64).reshape(-1, 2)
        return self

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        rest = self.rest_of(student, teacher)
        pairs = getattr(self, "matched", None)
        if pairs is None:
            pairs = torch.arange(student.shape[1])[:, None].expand(-1, 2)
        size = teacher.shape[1] - rest
        weight = len(pairs) / size
        if rest:
            pairs = torch.cat([pairs, torch.tensor([[student.shape[1] - 1, size]])])
        sides, alone = [], []
        for column, logits in enumerate((student, teacher)):
            p = log_softened(logits, self.temperature).exp()
            mine = pairs[:, column].to(p.device)
            left = torch.ones(p.shape[1], dtype=torch.bool, device=p.device).index_fill(0, mine, False)
            alone.append(p[:, left])
            sides.append(torch.cat([p[:, mine], alone[-1].sum(1, keepdim=True)], 1).clamp_min(TINY).log())
        first = JS().value(sides[0], sides[1], None)
        return weight * first + (1 - weight) * sorted_difference(*alone).mean()


@dataclass(eq=False)
class XToken(Across):
    """T² · mean KL(p_t ‖ Wᵀ p_s), W (V_s × V_t) by cutting each token with the other tokenizer: P-KL, arXiv 2605.21699.

    A student's token puts its probability on the first pieces that the teacher's tokenizer makes of its bytes, by
    0.9·0.1^i; what the student's tokenizer makes of the teacher's tokens is added, rows are normalised. Tokens that
    spell nothing have no row: their probability is lost, which KL punishes. W = I is `kl`.

    Parameters
    ----------
    pieces
        Most pieces of a token that count.
    kept
        Most entries of a row.
    """

    pieces: int = 4
    kept: int = 32

    positive = ("temperature", "pieces", "kept")

    def across(self, student: Vocabulary, teacher: Vocabulary) -> XToken:
        """Make W."""
        super().across(student, teacher)
        self.projection = projection(student, teacher, int(self.pieces), int(self.kept))
        return self

    def value(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the unweighted loss."""
        rest, T = self.rest_of(student, teacher), self.temperature
        log_s, log_t = (student / T).log_softmax(1), log_softened(teacher, T)
        W = getattr(self, "projection", None)
        if W is not None:
            p = log_s.exp()
            W = W.to(p.device, p.dtype)
            projected = p[:, : len(W)] @ W
            log_s = torch.cat([projected, p[:, len(W) :]], 1).clamp_min(TINY).log() if rest else _log(projected)
        return T * T * divergence(log_t, log_s).mean()


def projection(student: Vocabulary, teacher: Vocabulary, pieces: int = 4, kept: int = 32) -> Tensor:
    """W (V_s × V_t) float64 of `XToken`: rows sum to 1, or to 0 for a token without bytes or a partner."""
    W = torch.zeros(len(student.pieces), len(teacher.pieces), dtype=torch.float64)
    for i, piece in enumerate(student.pieces):
        for j, weight in _cut(teacher.encode(piece) if piece else (), pieces):
            W[i, j] += weight
    for j, piece in enumerate(teacher.pieces):
        for i, weight in _cut(student.encode(piece) if piece else (), pieces):
            W[i, j] += weight
    if kept < W.shape[1]:
        W = torch.zeros_like(W).scatter(1, (top := W.topk(kept, dim=1)).indices, top.values)
    return W / W.sum(1, keepdim=True).clamp_min(TINY)


def _cut(ids: Sequence[int], pieces: int) -> list[tuple[int, float]]:
    weights = [0.9 * 0.1**i for i in range(min(len(ids), pieces))]
    return [(i, weight / sum(weights)) for i, weight in zip(ids, weights, strict=False)]


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(TINY).log()


LOSSES: dict[str, type[Loss]] = {"uld": ULD, "gold": GOLD, "xtoken": XToken}
