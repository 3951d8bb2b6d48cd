"""DS-FL: distillation-based semi-supervised federated learning with entropy reduction aggregation (ERA).

Box (Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for Communication-Efficient Collaborative
Training with Non-IID Private Data", 2020, arXiv 2008.06180; IEEE TMC 22(1), 2023). In round t, o_t ⊂ D_t unlabelled:

    client k:  trains on its labels; sends p_k(x) = softmax(f_k(x)), x ∈ o_t                              (|o_t| × C)
    server:    p̂ = (1/K) Σ_k p_k;   ERA: q = softmax(p̂ / T), T = 0.1                               (|o_t| × C, to all)
    clients and the server's own model:  distil q on o_t with cross-entropy

Travels: |o_t|·C·B_f bytes each way, a client and round; the indices of o_t follow from the seed and are not sent.
Where the softmax sits changes the method, so it is a field: with `softmax=client` (paper) probabilities are averaged
and ERA takes a second softmax of numbers in [0, 1], so the largest ratio in q is e^(1/T); with `softmax=server` (some
ports) raw logits are averaged and ERA's is the only one, an unbounded sharpener. `aggregation=sa` is plain averaging.
Choices: q of round t is distilled at the start of a client's next round, on the rows of round t; an absent client
distils the newest only; BatchNorm statistics move while distilling, as in training. Architectures may differ; the
server's model has the first client's. Distillation has Adam at 10⁻³ unless `distil.*` says otherwise (ours): with the
clients' SGD at 0.05 and momentum, convolutions die within a few rounds of skew (docs/distillation.md has the figures).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedfuse import (
    FusionClient,
    Item,
    Records,
    Scope,
    Shares,
    StudentStrategy,
    Topic,
    arrays,
    distributions,
    hyper,
    strategy,
    transfer_rows,
    without_effect,
)

ADAM: Any = {"optimizer": "adam", "lr": 1e-3}  # of the distillation, at both ends


@dataclass(frozen=True)
class DSFLHyper:
    """Hyper-parameters of DS-FL.

    Raises
    ------
    UserError
        If there is a temperature, and nothing is sharpened.
    """

    temperature: float = hyper(0.1, "T of ERA; below 1 it sharpens (paper: 0.1)", above=0)
    softmax: str = hyper(
        "client", "where probabilities are made: before the mean or after", choices=("client", "server")
    )
    aggregation: str = hyper("era", "ERA, or simple averaging", choices=("era", "sa"))
    subset: int | None = hyper(None, "|o_t|, rows redrawn each round; null: the whole set (paper: 1000)", low=1)
    distill_epochs: int = hyper(
        5, "epochs of distillation, at clients and server (a known port: 5)", low=0, effort="epochs"
    )
    distill_batch: int = hyper(64, "batch size of distillation", low=1, only="distill_epochs", effort="batch_size")
    server_model: bool = hyper(True, "the server keeps a model of its own and distils it too")

    def __post_init__(self) -> None:
        if self.aggregation == "sa":
            without_effect(self, "temperature", "with strategy.aggregation=sa, which sharpens nothing")


def era(mean: Tensor, temperature: float) -> Tensor:
    """Entropy reduction aggregation, softmax(mean / T) by row.

    Parameters
    ----------
    mean : Tensor
        Mean probabilities (paper) or mean logits (n × C).
    temperature : float
        T; the smaller, the lower the entropy.
    """
    return (mean / temperature).softmax(1)


def aggregate(mean: Tensor, h: DSFLHyper) -> Tensor:
    """Turn the mean of what clients sent into q (n × C)."""
    if h.aggregation == "era":
        return era(mean, h.temperature)
    return mean.softmax(1) if h.softmax == "server" else mean


class DSFLClient(FusionClient):
    """Keeps its own model; distils the sharpened consensus, then trains on its labels."""

    personal = True

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Distil q on its own round's rows."""
        h, item = self.hyper, knowledge["labels"]
        x, y = self.workspace.transfer(self.subset(h.subset, item.version))
        distil = self.loss("soft_ce").towards(item.arrays["p"].to(self.workspace.device))
        self.distil(distil, x, y, epochs=h.distill_epochs, batch_size=h.distill_batch, **ADAM)

    def share(self) -> Records:
        """Outputs on this round's rows, in ascending row order."""
        logits = self.predict(self.workspace.transfer(self.subset(self.hyper.subset))[0])
        return {"labels": {"p": logits.softmax(1) if self.hyper.softmax == "client" else logits}}


@strategy("dsfl", client=DSFLClient, hyper=DSFLHyper, paper="Itahara et al. 2020, arXiv 2008.06180")
class DSFL(StudentStrategy):
    """Mean soft labels on a shared set, sharpened by entropy reduction aggregation."""

    topics = {"labels": Topic("lesson", arrays(p=("subset", "classes")))}
    records = {"labels": arrays(p=("subset", "classes"))}
    sums = {"labels": None}
    of_classes = True
    transfer = "both"
    distils = whole = True

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Rows are distributions, if that is what travels."""
        if scope.hyper.softmax == "client" and "labels" in records:
            distributions("labels", records["labels"]["p"])

    def fuse(self, shares: Shares) -> None:
        """Mean, ERA, and the server's own distillation."""
        total, clients = shares.total("labels")
        q = aggregate(total["p"] / clients, self.hyper).float()
        self.publish("labels", {"p": q})
        if self.hyper.server_model:
            rows = transfer_rows(self.scenario, self.hyper.subset, self.round)
            self.teach(self.loss("soft_ce"), q, rows, **ADAM)
