"""FML: each client's own model and a common "meme" model teach each other; only the meme travels.

Box (Shen et al., "Federated Mutual Learning", 2020, arXiv 2006.16765). In round t, client k:

    meme ← meme_t;  for each batch, both at once:
        L_own  = α·CE(own)  + (1 − α)·KL(p_meme ‖ p_own)
        L_meme = β·CE(meme) + (1 − β)·KL(p_own ‖ p_meme)
    sends its meme;       server:  meme_{t+1} ← Σ n_k meme_k / Σ n_k

Travels: P_meme·B_f bytes each way. Each takes the other's predictions on the batch as given. Own models may be of any
architecture, `strategy.meme` is common; where both are of one architecture the meme starts from other weights. Clients
predict with their own model, so the figures on the global set are the mean over those. α = β = 1 is local training
beside FedAvg of the meme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse import (
    FusionClient,
    FusionStrategy,
    Item,
    Metrics,
    Records,
    Residents,
    Shares,
    Topic,
    hyper,
    pair,
    strategy,
)


@dataclass(frozen=True)
class FMLHyper:
    """Hyper-parameters of FML."""

    meme: str = hyper("auto", "architecture of the meme, common to all clients")
    alpha: float = hyper(0.5, "α, weight of the labels in the own model's loss", low=0, high=1)
    beta: float = hyper(0.5, "β, weight of the labels in the meme's loss", low=0, high=1)


class FMLClient(FusionClient):
    """Trains its own model and the meme together."""

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add the meme."""
        return pair.paired(model, hyper.meme, build)

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take the meme; the own model is private."""
        own = self.state.get("own") or pair.private_part(self.weights())
        self.load(pair.joined(own, knowledge["meme"].arrays))

    def fit(self) -> Metrics:
        """Mutual learning on private data."""
        alpha, beta, model = self.hyper.alpha, self.hyper.beta, self.model
        first, second = self.loss("kl"), self.loss("kl")  # each may keep a state of its own

        def mutual(out: tuple[Tensor, Tensor], y: Tensor, rows: Tensor) -> Tensor:
            own, meme = out
            value = alpha * F.cross_entropy(own, y) + beta * F.cross_entropy(meme, y)
            if alpha < 1:
                value = value + (1 - alpha) * first(own, meme, y)
            if beta < 1:
                value = value + (1 - beta) * second(meme, own, y)
            return value

        metrics = self.train(mutual, forward=model.both)  # type: ignore[arg-type]
        self.state["own"] = pair.private_part(self.weights())
        return metrics

    def share(self) -> Records:
        """The meme alone."""
        return {"meme": pair.shared_part(self.weights())}


@strategy("fml", client=FMLClient, hyper=FMLHyper, paper="Shen et al. 2020, arXiv 2006.16765")
class FML(FusionStrategy):
    """Private models and a common one teach each other; the common one is averaged."""

    topics = {"meme": Topic("state", pair.shared_arrays)}
    records = {"meme": pair.shared_arrays}
    sums = {"meme": "num-examples"}

    def __init__(self, hyper: Any, residents: Residents) -> None:
        super().__init__(hyper, residents)
        residents.build(hyper.meme)  # says now if there is no such architecture

    def begin(self) -> None:
        """Publish the initial meme."""
        self.publish("meme", pair.shared_part(self.residents.initial(self.architecture)))

    def fuse(self, shares: Shares) -> None:
        """meme_{t+1} = Σ n_k meme_k / Σ n_k."""
        self.publish("meme", shares.mean("meme"))
