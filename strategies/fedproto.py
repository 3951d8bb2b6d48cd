"""FedProto: clients share the mean embedding of each class, and pull their own embeddings towards everyone's.

Box (Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022, arXiv 2105.00243).
With f_k the embedding (`features`), D_kc client k's examples of class c and N_c the clients that hold c, in round t:

    client k:  min CE + λ · (1/(B·d)) Σ_i ‖f_k(x_i) − P_{y_i}‖²   (nothing for a class without a global prototype)
    client k:  P_kc = (1/|D_kc|) Σ_{x∈D_kc} f_k(x), with the weights as trained; sent with |D_kc|
    server:    P_c = Σ_{k∈N_c} |D_kc|·P_kc / Σ_{k∈N_c} |D_kc|
    predict:   the class of the nearest P_c, of the client's own classes (`among=held`: of all)

Travels: C·(d·B_f + 8) bytes up, C·(d·B_f + 1) down, a client and round; a class that a client lacks is a row of zeros.
Left open by the paper: a class that no participant of a round holds keeps its last prototype. Of the authors' code:
`weighting=holders` is its unweighted mean over holders; its test looks only at classes that the client holds, where the
paper's text says the nearest prototype: the code's way is the default; its accumulation of prototypes while weights
still change is not reproduced. Architectures may differ, embeddings must be of one size d (`model.feature_dim`).
"""

from __future__ import annotations

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
    classwise,
    hyper,
    strategy,
    without_effect,
)


@dataclass(frozen=True)
class FedProtoHyper:
    """Hyper-parameters of FedProto.

    Raises
    ------
    UserError
        If it is said which prototypes to choose from, and the head chooses.
    """

    lam: float = hyper(1.0, "λ, weight of the pull towards prototypes (paper: 1 on MNIST, 0.1 on CIFAR-10)", low=0)
    weighting: str = hyper("count", "mean by |D_kc|, or plain over holders (code)", choices=("count", "holders"))
    inference: str = hyper("prototype", "nearest global prototype, or the own head", choices=("prototype", "head"))
    among: str = hyper(
        "own",
        "prototypes to choose from: of classes the client has examples of (code), or all",
        choices=("own", "held"),
    )

    def __post_init__(self) -> None:
        if self.inference == "head":
            without_effect(self, "among", "with strategy.inference=head, which looks at no prototype")


def nearness(z: Tensor, prototypes: Tensor, held: Tensor) -> Tensor:
    """−‖z_i − P_c‖² (B × C); a class without a prototype stands below all that have one."""
    score = 2 * z @ prototypes.T - prototypes.square().sum(1) - z.square().sum(1, keepdim=True)
    lowest = score.masked_fill(~held, float("inf")).amin(1, keepdim=True)
    return torch.where(held, score, lowest - 1)


class FedProtoClient(FusionClient):
    """Keeps its own model; what is common are the prototypes."""

    personal = True
    prototypes: tuple[Tensor, Tensor] | None = None

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Keep the global prototypes at hand: they are in every message."""
        item = knowledge["prototypes"].arrays
        self.prototypes = (item["means"].to(self.x.device), item["held"].to(self.x.device))

    def fit(self) -> Metrics:
        """CE + λ · pull."""
        if self.prototypes is None or self.hyper.lam == 0:
            return self.train()
        prototypes, held = self.prototypes

        def loss(out: tuple[Tensor, Tensor], y: Tensor, _: Tensor) -> Tensor:
            z, logits = out
            return F.cross_entropy(logits, y) + self.hyper.lam * classwise.pull(z, y, prototypes, held)

        return self.train(loss, forward=self.features_and_logits)

    def share(self) -> Records:
        """P_kc and |D_kc|, of the weights as trained."""
        means, counts = classwise.class_means(self.embed(self.x), self.y, self.classes)
        return {"prototypes": {"means": means, "counts": counts}}

    def predict(self, x: Tensor) -> Tensor:
        """Scores by nearness to the global prototypes; before there are any, the own head's logits."""
        if self.hyper.inference == "head" or self.prototypes is None:
            return super().predict(x)
        means, held = self.prototypes
        if self.hyper.among == "own":
            own = held & (torch.bincount(self.y, minlength=self.classes) > 0)
            held = own if bool(own.any()) else held  # a client without examples has to choose among all
        return nearness(self.embed(x), means, held)


@strategy("fedproto", client=FedProtoClient, hyper=FedProtoHyper, paper="Tan et al. 2022, arXiv 2105.00243")
class FedProto(FusionStrategy):
    """Mean embeddings per class; clients pull theirs towards them and predict the nearest."""

    topics = {"prototypes": Topic("state", arrays(means=("classes", "features"), held=("bool", "classes")))}
    records = {"prototypes": arrays(means=("classes", "features"), counts=("int64", "classes"))}
    means = ("prototypes",)
    needs_features = True
    discloses = ("class counts",)
    same_features = True
    staleness = "newest"

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Counts are counts."""
        classwise.check_counts("prototypes/counts", records["prototypes"]["counts"], scope.dims["examples"])

    def fuse(self, shares: Shares) -> None:
        """P_c over the clients that hold c."""
        taken = list(shares)
        everyone = [share.records["prototypes"] for share in taken]
        counts = torch.stack([r["counts"] for r in everyone])
        weights = counts if self.hyper.weighting == "count" else (counts > 0)
        weights = weights * torch.tensor([[share.weight] for share in taken], dtype=torch.float64)
        means, held = shares.over_holders("prototypes", torch.stack([r["means"] for r in everyone]), weights)
        means = means.float()
        if ("prototypes", "") in self.board.items:
            old = self.published("prototypes")
            means, held = torch.where(held[:, None], means, old["means"]), held | old["held"]
        self.publish("prototypes", {"means": means, "held": held})
