"""FedPer: a common body, a private head, trained together.

Box (Arivazhagan et al., "Federated Learning with Personalization Layers", 2019, arXiv 1912.00818, algorithms 1–2):

    client k:  loads the body w_B, keeps its head w_Pk; trains both jointly; sends w_B
    server:    w_B ← Σ n_k w_Bk / Σ n_k

Travels: P_body·B_f bytes each way; the head never leaves. The personalisation layers are the model's `head` (the paper
tries the last one to four blocks of a network). There is no server model: it would have no head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedfuse import FusionClient, FusionStrategy, Item, Metrics, Records, Shares, Topic, hyper, parts, strategy


@dataclass(frozen=True)
class FedPerHyper:
    """Hyper-parameters of FedPer."""

    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


class FedPerClient(FusionClient):
    """Keeps its head."""

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Load the common body and its own head."""
        self.load({**knowledge["body"].arrays, **self.state.get("head", {})}, strict=False)

    def fit(self) -> Metrics:
        """Train body and head jointly; keep the head."""
        metrics = self.train()
        weights = self.weights()
        self.state["head"] = {name: weights[name] for name in parts.head(self.model) if name in weights}
        return metrics

    def share(self) -> Records:
        """The body."""
        return {"body": parts.without(self.weights(), parts.head(self.model))}


@strategy("fedper", client=FedPerClient, hyper=FedPerHyper, paper="Arivazhagan et al. 2019, arXiv 1912.00818")
class FedPer(FusionStrategy):
    """FedAvg of the body; heads are private, trained jointly with it."""

    topics = {"body": Topic("state", parts.body_arrays)}
    records = {"body": parts.body_arrays}
    heterogeneous = False
    needs_features = True

    @property
    def sums(self) -> Mapping[str, str | None]:
        """The mean is all that `fuse` needs."""
        return {"body": "num-examples" if self.hyper.weighting == "examples" else None}

    def begin(self) -> None:
        """Publish the initial body."""
        initial = self.residents.initial(self.architecture)
        self.publish("body", parts.without(initial, parts.head(self.residents.model(self.architecture))))

    def fuse(self, shares: Shares) -> None:
        """w_B = Σ n_k w_Bk / Σ n_k."""
        self.publish("body", shares.mean("body"))
