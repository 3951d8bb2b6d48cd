"""Selective-FD: clients speak only of what they know, and the server passes on only what is clear.

Box (Shao, Wu and Zhang, "Selective knowledge sharing for privacy-preserving federated distillation without a good
teacher", Nature Communications 2024, arXiv 2304.01731). In round t:

    client k, once:  a density ratio r_k = p_k / uniform, estimated by KuLSIF on a few private examples; τ_k is the
                     quantile of r_k on private data below which an example counts as unknown
    client k:        CE on private data; sends softmax(f_k(x)) for x ∈ D_t with r_k(x) > τ_k only
    server:          ȳ(x) = mean over the clients that sent x; dropped where nobody did, and where it is ambiguous:
                     ‖ȳ(x) − onehot(argmax ȳ(x))‖₁ = 2·(1 − max ȳ(x)) > τ_server
    client k:        min CE(ȳ, softmax f_k) on the rows that are left, at the start of its next round

KuLSIF (Kanamori, Suzuki, Sugiyama, 2012), k Gaussian of width σ, x_i of n private and u_j of m uniform points:

    r(x) = Σ_j α_j k(x, u_j) + 1/(nλ) Σ_i k(x, x_i),   (K_uu / m + λI) α = −K_ux 1 / (m·n·λ),   λ = m^−½

Travels: (C·B_f + 4) bytes a selected row, each way. Known from the authors' demonstration: σ = 5, m = 250, 5 % of the
private examples, quantile 25 %; it applies no server selector. Left open: τ_server; what uniform means on scaled inputs
(here: the box between the smallest and the largest private value); with such inputs σ = null takes the median distance.
The demonstration solves for α with the matrix in place of its inverse, a port sets λ = m^½: neither is reproduced.
Architectures may differ. Distillation has SGD at 0.01 unless `distil.*` says otherwise: with `train.momentum`'s 0.9 it
goes as far as the demonstration's 0.1 without momentum. At local training's 0.05 it went five times as far, and
convolutions died (docs/distillation.md has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse import (
    FusionClient,
    FusionStrategy,
    InvalidArrays,
    Item,
    Records,
    Scope,
    Shares,
    Topic,
    arrays,
    distributions,
    generator,
    hyper,
    strategy,
    without_effect,
)


@dataclass(frozen=True)
class SelectiveFDHyper:
    """Hyper-parameters of Selective-FD.

    Raises
    ------
    UserError
        If the density ratio has settings, and no client selects by it.
    """

    client_quantile: float | None = hyper(
        0.25, "τ_k as a quantile of r_k on private data; null: no selection", low=0, high=1
    )
    server_threshold: float | None = hyper(
        1.0, "τ_server, largest L1 distance to one-hot, below 2 (ours); null: no selection", low=0, high=2
    )
    width: float | None = hyper(5.0, "σ of the Gaussian kernel; null: the median distance", above=0)
    auxiliary: int = hyper(250, "m, uniform points", low=1)
    fit_share: float = hyper(0.05, "share of the private examples the ratio is fitted on", above=0, high=1)
    subset: int | None = hyper(None, "|D_t|, rows redrawn each round; null: the whole transfer set", low=1)
    distill_epochs: int | None = hyper(
        None,
        "epochs of the distillation; null: as many as make the demonstration's 10 steps a round",
        low=0,
        effort="epochs",
    )
    distill_batch: int = hyper(
        512, "batch size of the distillation (paper: 512)", low=1, only="distill_epochs", effort="batch_size"
    )

    def __post_init__(self) -> None:
        if self.client_quantile is None:
            for name in ("width", "auxiliary", "fit_share"):
                without_effect(self, name, "with strategy.client_quantile=null, where no ratio is estimated")


def kernel(a: Tensor, b: Tensor, width: float) -> Tensor:
    """exp(−‖a_i − b_j‖² / (2σ²)), (A × B)."""
    return (-torch.cdist(a, b).square() / (2 * width**2)).exp()


def kulsif(known: Tensor, uniform: Tensor, width: float) -> Tensor:
    """Solve for KuLSIF's α, (m,).

    Parameters
    ----------
    known, uniform : Tensor
        Points of the numerator (n × d) and of the denominator (m × d), float64.
    width : float
        σ.
    """
    n, m = len(known), len(uniform)
    lam = m**-0.5
    left = kernel(uniform, uniform, width) / m + lam * torch.eye(m, dtype=uniform.dtype, device=uniform.device)
    return torch.linalg.solve(left, -kernel(uniform, known, width).sum(1) / (m * n * lam))


def ratio(x: Tensor, known: Tensor, uniform: Tensor, alpha: Tensor, width: float) -> Tensor:
    """The estimated density ratio r of points x (A × d), (A,)."""
    lam = len(uniform) ** -0.5
    return kernel(x, uniform, width) @ alpha + kernel(x, known, width).sum(1) / (len(known) * lam)


def ensemble(rows: list[Tensor], soft: list[Tensor], total: int, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Mean over the clients that sent a row, without what is ambiguous.

    Parameters
    ----------
    rows : list of Tensor
        Rows that each client sent, of `total`.
    soft : list of Tensor
        Its soft labels on them.
    total : int
    threshold : float or None
        τ_server.

    Returns
    -------
    rows : Tensor
        What is left, ascending (A).
    soft : Tensor
        ȳ on it (A × C), float64.
    """
    added = torch.zeros(total, soft[0].shape[1], dtype=torch.float64)
    senders = torch.zeros(total, dtype=torch.int64)
    for i, p in zip(rows, soft, strict=True):  # a client names a row once, so plain indexing adds
        added[i.long()] += p.double()
        senders[i.long()] += 1
    mean = added / senders.clamp_min(1)[:, None]
    kept = senders > 0
    if threshold is not None:
        kept &= 2 * (1 - mean.amax(1)) <= threshold
    left = kept.nonzero()[:, 0]
    return left, mean[left]


class SelectiveFDClient(FusionClient):
    """Keeps its own model; speaks of the rows that look like its own data."""

    personal = True

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Cross-entropy with the ensemble's soft labels, on the rows that are left of the lesson's own."""
        h, item = self.hyper, knowledge["ensemble"]
        x, y = self.workspace.transfer(self.subset(h.subset, item.version)[item.arrays["rows"].long().cpu()])
        distil = self.loss("soft_ce").towards(item.arrays["p"].to(self.workspace.device))
        self.distil(
            distil, x, y, epochs=h.distill_epochs, batch_size=h.distill_batch, steps=10, optimizer="sgd", lr=0.01
        )

    def known(self) -> Tensor:
        """Which rows of the whole transfer set look like this client's data (T,) bool; estimated once."""
        if "known" not in self.state:
            self.state["known"] = self._estimate().cpu()
        return self.state["known"].cpu()

    def _estimate(self) -> Tensor:
        h, x = self.hyper, self.x
        if h.client_quantile is None or not len(x):
            return torch.full((len(self.transfer),), h.client_quantile is None)
        draw = generator(self.seed, "selector", self.client)  # the same in every round
        fitted = torch.randperm(len(x), generator=draw)[: math.ceil(h.fit_share * len(x))]
        some = x[fitted].flatten(1).double()
        box = torch.rand(h.auxiliary, some.shape[1], generator=draw, dtype=torch.float64).to(x.device)
        uniform = x.min() + (x.max() - x.min()) * box
        width = h.width or float(torch.cdist(some, uniform).median()) or 1.0
        alpha = kulsif(some, uniform, width)

        def of(points: Tensor) -> Tensor:  # in pieces: float64 copies of whole image sets are large
            parts = points.split(self.scenario.config.evaluate.batch_size)
            return torch.cat([ratio(part.flatten(1).double(), some, uniform, alpha, width) for part in parts])

        return of(self.transfer) > of(x).quantile(h.client_quantile)

    def share(self) -> Records:
        """Soft labels of the known ones of this round's rows; rows count within the round's subset."""
        subset = self.subset(self.hyper.subset)
        rows = self.known()[subset].nonzero()[:, 0]
        logits = self.predict(self.transfer[subset[rows]])
        return {"soft": {"rows": rows.int(), "p": logits.softmax(1)}}


@strategy("selectivefd", client=SelectiveFDClient, hyper=SelectiveFDHyper, paper="Shao et al. 2024, arXiv 2304.01731")
class SelectiveFD(FusionStrategy):
    """Soft labels from the clients that know a sample; ambiguous ones are dropped."""

    topics = {"ensemble": Topic("lesson", arrays(rows=("int32", "<=subset"), p=("<=subset", "classes")))}
    records = {"soft": arrays(rows=("int32", "<=subset"), p=("<=subset", "classes"))}
    of_classes = True
    transfer = "clients"
    distils = whole = True
    uncovered = "looks at private examples outside of training"

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Rows are rows of the round's subset, each once, with a distribution each."""
        rows, p = records["soft"]["rows"], records["soft"]["p"]
        if len(rows) != len(p):
            raise InvalidArrays(f"soft: {len(rows)} rows are named, {len(p)} are there")
        if len(rows) and (
            int(rows[0]) < 0 or int(rows[-1]) >= scope.dims["subset"] or not bool((rows.diff() > 0).all())
        ):
            raise InvalidArrays("soft/rows: not ascending rows of the subset")
        distributions("soft/p", p)

    def fuse(self, shares: Shares) -> None:
        """ȳ over senders that have examples; published unless nothing is left."""
        everyone = [share.records["soft"] for share in shares if share.examples]  # the others have learnt nothing
        total = self.scenario.rows_of(self.hyper.subset)
        rows, soft = ensemble(
            [r["rows"] for r in everyone], [r["p"] for r in everyone], total, self.hyper.server_threshold
        )
        self.log("rows/sent", sum(len(r["rows"]) for r in everyone))
        self.log("rows/kept", len(rows))
        if len(rows):
            self.publish("ensemble", {"rows": rows.int(), "p": soft.float()})
