"""FedBN: everything is averaged but the normalisation layers, which stay with their client.

Box (Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021,
arXiv 2102.07623, algorithm 1):

    client k:  loads the common layers over its own, trains, sends every layer that is not BatchNorm
    server:    mean of each of those layers

Travels: (P − P_norm)·B_f bytes each way; neither scale and shift nor running statistics nor counters ever leave. A
model without such layers makes this FedAvg. `norms=all` also keeps GroupNorm and LayerNorm, which the paper leaves out.
The paper's clients have equal shares; here they weigh by examples. There is no server model: it would have no norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedfuse import (
    FusionClient,
    FusionStrategy,
    Item,
    Layout,
    Metrics,
    Records,
    Scope,
    Shares,
    Topic,
    hyper,
    parts,
    strategy,
)


@dataclass(frozen=True)
class FedBNHyper:
    """Hyper-parameters of FedBN."""

    norms: str = hyper("batch", "layers kept: with running statistics, or all norms", choices=("batch", "all"))


def shared_arrays(scope: Scope) -> Layout:
    """Spec: all arrays but those of the norms kept."""
    kept = set(parts.norms(scope.module, scope.hyper.norms == "all"))
    return {name: layout for name, layout in scope.model.items() if name not in kept}


class FedBNClient(FusionClient):
    """Keeps its normalisation layers."""

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Load the common layers and its own norms."""
        self.load({**knowledge["layers"].arrays, **self.state.get("norms", {})}, strict=False)

    def fit(self) -> Metrics:
        """Train all layers; keep the norms."""
        metrics = self.train()
        weights = self.weights()
        kept = [name for name in parts.norms(self.model, self.hyper.norms == "all") if name in weights]
        if kept:
            self.state["norms"] = {name: weights[name] for name in kept}
        return metrics

    def share(self) -> Records:
        """Every layer but the norms."""
        return {"layers": parts.without(self.weights(), parts.norms(self.model, self.hyper.norms == "all"))}


@strategy("fedbn", client=FedBNClient, hyper=FedBNHyper, paper="Li et al. 2021, arXiv 2102.07623")
class FedBN(FusionStrategy):
    """FedAvg of everything but the normalisation layers."""

    topics = {"layers": Topic("state", shared_arrays)}
    records = {"layers": shared_arrays}
    sums = {"layers": "num-examples"}
    heterogeneous = False

    def begin(self) -> None:
        """Publish the initial layers but the norms."""
        kept = parts.norms(self.residents.model(self.architecture), self.hyper.norms == "all")
        self.publish("layers", parts.without(self.residents.initial(self.architecture), kept))

    def fuse(self, shares: Shares) -> None:
        """Mean of the shared layers."""
        self.publish("layers", shares.mean("layers"))
