"""COMET: clients are clustered by their outputs on a shared set, and drawn to their own cluster's mean.

Box (Cho, Wang, Chirvolu, Joshi, "Communication-Efficient and Model-Heterogeneous Personalized Federated Learning via
Clustered Knowledge Transfer", IEEE JSTSP 17(1), 2023, arXiv 2109.08119; there PerFed-CKT). In round t:

    client k:  sends s_k = softmax(f_k(x)), x ∈ D_t                                              (T_s × C)
    server:    k-means of the participants' outputs into κ clusters; each client gets its own cluster's mean s̄
    client k:  min CE + λ · (1/|D_t|) Σ_x ‖softmax(f_k(x)) − s̄(x)‖²

Travels: T_s·C·B_f bytes each way, a client and round; down it is per client. Known from secondary sources only: that
outputs are probabilities, the squared distance, clustering of whole output matrices, plain means. In a step one batch
of D_t goes beside each private batch, in training mode; absent clients keep their last s̄, on its own round's rows.
`cluster_by=sample` is a port's simplification: for every x, k-means of the N probability vectors; all κ centroids are
broadcast (κ·T_s·C·B_f down) and the client takes the one nearest to its own prediction; `distill=separate` is its own
phase of distillation, and only there `distil.*` has a say. κ = 1 is plain averaging. Clusters are scikit-learn's
k-means++, ten seeded starts, one thread. Architectures may differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse import (
    FusionClient,
    FusionStrategy,
    Item,
    Metrics,
    Records,
    Scope,
    Shares,
    Topic,
    arrays,
    distributions,
    hyper,
    seed_of,
    strategy,
    training,
    without_effect,
)


@dataclass(frozen=True)
class CometHyper:
    """Hyper-parameters of COMET.

    Raises
    ------
    UserError
        If there are epochs of a separate distillation, and none is separate.
    """

    clusters: int = hyper(2, "κ, number of clusters", low=1)
    lam: float = hyper(1.0, "λ, weight of the distance to the cluster's mean", low=0)
    cluster_by: str = hyper("client", "whole outputs of clients, or each sample's (port)", choices=("client", "sample"))
    distill: str = hyper(
        "joint", "beside private training, or before it (port)", choices=("joint", "separate"), only="lam"
    )
    distill_epochs: int = hyper(1, "epochs over D_t, with distill=separate", low=0, effort="epochs")
    distill_batch: int = hyper(64, "batch size on D_t", low=1, only="lam with distill_epochs", effort="batch_size")
    subset: int | None = hyper(None, "T_s, rows redrawn each round; null: the whole transfer set", low=1)

    def __post_init__(self) -> None:
        if self.distill == "joint":
            without_effect(self, "distill_epochs", "with strategy.distill=joint, which goes beside private training")


def cluster(points: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means on one thread: the cluster of each row of `points` (N × …), (N,) int64.

    The same points and seed give the same clusters. There are at most as many clusters as rows.
    """
    if min(clusters, len(points)) == 1:
        return torch.zeros(len(points), dtype=torch.int64)
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    kmeans = KMeans(min(clusters, len(points)), n_init=10, random_state=seed % 2**32)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
        return torch.from_numpy(kmeans.fit_predict(points.double().flatten(1).numpy())).long()


def memberships(s: Tensor, clusters: int, by: str, seed: int) -> Tensor:
    """Who is where: (N, 1) if whole outputs are clustered, (N, T_s) if each sample's are.

    Parameters
    ----------
    s : Tensor
        Soft labels (N × T_s × C).
    clusters : int
        κ.
    by : {"client", "sample"}
    seed : int
    """
    if by == "client":
        return cluster(s, clusters, seed)[:, None]
    return torch.stack([cluster(s[:, i], clusters, seed) for i in range(s.shape[1])], 1)


def means(s: Tensor, member: Tensor, clusters: int) -> Tensor:
    """Mean of each cluster's members (κ × T_s × C), float64; an empty cluster repeats cluster 0."""
    chosen = F.one_hot(member, clusters).double().expand(-1, s.shape[1], -1)  # N × T_s × κ
    count = chosen.sum(0).T[..., None]
    mean = torch.einsum("ntk,ntc->ktc", chosen, s.double()) / count.clamp_min(1)
    return torch.where(count > 0, mean, mean[:1])


def nearest(own: Tensor, candidates: Tensor) -> Tensor:
    """Row by row, which of the candidates (κ × T_s × C) is nearest to one's own soft labels (T_s × C)."""
    best = (candidates - own).square().sum(-1).argmin(0)
    return candidates[best, torch.arange(len(own), device=own.device)]


class CometClient(FusionClient):
    """Keeps its own model; its cluster's mean on the shared set regularises it."""

    personal = True
    target: tuple[Tensor, Tensor] | None = None  # rows of the transfer set, and the mean on them

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Keep the cluster's mean, and the rows it stands on, at hand: it is in every message."""
        item = knowledge["means"]
        candidates = item.arrays["p"].to(self.workspace.device)
        rows = self.subset(self.hyper.subset, item.version)
        mean = candidates[0]
        if len(candidates) > 1:
            mean = nearest(self.predict(self.transfer[rows]).softmax(1), candidates)
        self.target = (rows, mean)

    def fit(self) -> Metrics:
        """CE + λ · distance to the mean, in the same steps or one after the other."""
        if self.target is None or self.hyper.lam == 0:
            return self.train()
        h, (rows, target) = self.hyper, self.target
        x, y = self.workspace.transfer(rows)
        # ‖·‖² sums over classes where `mse` takes their mean
        distance = self.loss("mse", weight=float(self.classes)).towards(target)

        def distil(logits: Tensor, y: Tensor | None, i: Tensor) -> Tensor:
            return h.lam * distance(logits, y, i)

        if h.distill == "separate":
            self.distil(distil, x, y, purpose="distil", epochs=h.distill_epochs, batch_size=h.distill_batch)
            return self.train()
        steps = training.batches(len(x), h.distill_batch, 2**30, self.seed, "distil", self.client, self.round)

        def joint(logits: Tensor, labels: Tensor, _: Tensor) -> Tensor:
            i = next(steps).to(x.device)
            return F.cross_entropy(logits, labels) + distil(self.model(x[i]), None if y is None else y[i], i)

        return self.train(joint)

    def share(self) -> Records:
        """s_k on this round's rows, in ascending row order."""
        return {"soft": {"p": self.predict(self.transfer[self.subset(self.hyper.subset)]).softmax(1)}}


@strategy("comet", client=CometClient, hyper=CometHyper, paper="Cho et al. 2023, arXiv 2109.08119")
class Comet(FusionStrategy):
    """Soft labels averaged within clusters of clients, as a regulariser of local training."""

    topics = {"means": Topic("state", arrays(p=("<=clusters", "subset", "classes")))}
    records = {"soft": arrays(p=("subset", "classes"))}
    of_classes = True
    transfer = "clients"

    @property
    def distils(self) -> bool:  # type: ignore[override]
        """Whether there is a distillation apart from private training."""
        return bool(self.hyper.distill == "separate")

    @property
    def uncovered(self) -> str:  # type: ignore[override]
        """The distance to the mean, beside private training."""
        return "trains on private examples with a loss of its own" if self.hyper.lam and not self.distils else ""

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Soft labels are distributions."""
        distributions("soft/p", records["soft"]["p"])

    def fuse(self, shares: Shares) -> None:
        """Cluster, average, and send each client its own cluster's mean, or all of them to everyone."""
        h, everyone = self.hyper, [share for share in shares if share.examples]
        clients = [share.client for share in everyone]
        s = torch.stack([share.records["soft"]["p"] for share in everyone])
        kappa = min(h.clusters, len(clients))
        member = memberships(s, kappa, h.cluster_by, seed_of(self.scenario.seed, "clusters", self.round))
        mean = means(s, member, kappa).float()
        self.log_matrix("similarity", clients, (member[:, None] == member[None]).double().mean(-1))
        if h.cluster_by == "sample":
            self.publish("means", {"p": mean})
            return
        for client, own in zip(clients, member[:, 0].tolist(), strict=True):
            self.publish("means", {"p": mean[own : own + 1]}, to=client)
