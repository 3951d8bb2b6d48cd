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

from dataclasses import dataclass

from fedfuse import Part, PartClient, PartStrategy, hyper, parts, strategy


@dataclass(frozen=True)
class FedBNHyper:
    """Hyper-parameters of FedBN."""

    norms: str = hyper("batch", "layers kept: with running statistics, or all norms", choices=("batch", "all"))
    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


NORMS = Part("norms", "layers", lambda module, hyper: parts.norms(module, hyper.norms == "all"))


class FedBNClient(PartClient):
    """Keeps its normalisation layers."""

    part = NORMS


@strategy("fedbn", client=FedBNClient, hyper=FedBNHyper, paper="Li et al. 2021, arXiv 2102.07623")
class FedBN(PartStrategy):
    """FedAvg of everything but the normalisation layers."""

    staleness = "updates"

    part = NORMS

    def notes(self) -> list[str]:
        """That there is nothing to keep."""
        model, word = self.workspace.model(self.architecture), self.hyper.norms
        if self.part.names(model, self.hyper):
            return []
        more = word == "batch" and parts.norms(model, every=True)
        advice = "strategy.norms=all keeps its GroupNorm and LayerNorm" if more else "model=resnet8_bn has some"
        return [
            f"fedbn: model={self.architecture} has no layer that strategy.norms={word} keeps: this is FedAvg; {advice}"
        ]
