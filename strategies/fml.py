"""FML: each client's own model and a common "meme" model teach each other; only the meme travels.

Box (Shen et al., "Federated Mutual Learning", 2020, arXiv 2006.16765). In round t, client k:

    meme ← meme_t;  for each batch, both at once:
        L_own  = α·CE(own)  + (1 − α)·KL(p_meme ‖ p_own)
        L_meme = β·CE(meme) + (1 − β)·KL(p_own ‖ p_meme)
    sends its meme;       server:  meme_{t+1} ← Σ n_k meme_k / Σ n_k

Travels: P_meme·B_f bytes each way. Each takes the other's predictions on the batch as given. Own models may be of any
architecture, `strategy.meme` is common; where both are of one architecture the meme starts from other weights, but for
what a directory or a checkpoint gives both. Clients predict with their own model; the figure on the global set is the
meme's. α = β = 1 is local training beside FedAvg of the meme.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fedfuse import CompanionClient, CompanionStrategy, Metrics, hyper, strategy


@dataclass(frozen=True)
class FMLHyper:
    """Hyper-parameters of FML."""

    meme: str = hyper("auto", "architecture of the meme, common to all clients")
    alpha: float = hyper(0.5, "α, weight of the labels in the own model's loss", low=0, high=1)
    beta: float = hyper(0.5, "β, weight of the labels in the meme's loss", low=0, high=1)


class FMLClient(CompanionClient):
    """Trains its own model and the meme together."""

    averaged = "meme"

    def mutual(self) -> Metrics:
        """Both losses at once."""
        alpha, beta, model = self.hyper.alpha, self.hyper.beta, self.model
        first, second = self.loss("kl"), self.loss("kl")  # each may keep a state of its own

        def loss(out: tuple[Tensor, Tensor], y: Tensor, rows: Tensor) -> Tensor:
            own, meme = out
            value = alpha * F.cross_entropy(own, y) + beta * F.cross_entropy(meme, y)
            if alpha < 1:
                value = value + (1 - alpha) * first(own, meme, y)
            if beta < 1:
                value = value + (1 - beta) * second(meme, own, y)
            return value

        return self.train(loss, forward=model.both)  # type: ignore[arg-type]


@strategy("fml", client=FMLClient, hyper=FMLHyper, paper="Shen et al. 2020, arXiv 2006.16765")
class FML(CompanionStrategy):
    """Private models and a common one teach each other; the common one is averaged."""

    averaged = "meme"
    of_classes = of_logits = True
