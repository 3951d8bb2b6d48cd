"""Flower's own strategies under our loop: sampling, commits, resume and traffic are ours, the rule is theirs.

Every `flwr_*` strategy builds the class of `flwr.serverapp.strategy` that it is named after, hands it the cohort as
a grid (`fraction_train=1`: the platform has sampled already), sends the keys it adds to the training configuration
(`proximal-mu`), and gives it the shares as Flower replies (see `fedfuse.families.flower_rules`).

Travels: the model both ways, P·B_f bytes a client and round. Server learning rates are Flower's defaults; the clients'
rate is `train.lr`. Readings of ours: integer buffers (BatchNorm's counters) never reach Flower's rules, which would
turn them into floats or, in Krum, into distance; their mean is rounded. Nor do BatchNorm's running statistics reach the
rules that step beyond the mean or short of it (FedAvgM, FedAdagrad, FedAdam, FedYogi, QFedAvg): these are averaged, as
under FedAvgM's momentum a variance becomes negative. A client without examples has no say. Where fewer answer than
Krum, multi-Krum or Bulyan need the model stays, and notes say so; Flower's Krum would go on. A cohort below the rule's
minimum is refused before the run; Flower would wait for ever. The published model has the model's own dtypes: FedAdam
computes in float64 and is rounded once a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedfuse import FlowerClient, FlowerHyper, FlowerStrategy, Metrics, hyper, record, strategy


class QFedAvgClient(FlowerClient):
    """Also says the loss of the model it received, F_k(w_t), as `train_loss` (Li et al. 2020, alg. 2)."""

    def fit(self) -> Metrics:
        """Score w_t on the training examples, then train."""
        loss = float(self.objective(self.predict(self.x), self.y)) if len(self.x) else 0.0
        return {**super().fit(), "train_loss": loss}


@strategy("flwr_fedavg", client=FlowerClient, hyper=FlowerHyper, paper="McMahan et al. 2017, arXiv 1602.05629")
class FlowerFedAvg(FlowerStrategy):
    """Flower's FedAvg: weighted mean of the clients' models."""


@dataclass(frozen=True)
class FedProxHyper(FlowerHyper):
    """Hyper-parameters of Flower's FedProx."""

    proximal_mu: float = hyper(0.01, "μ, weight of the proximal term; 0 is FedAvg", low=0)


@strategy("flwr_fedprox", client=FlowerClient, hyper=FedProxHyper, paper="Li et al. 2020, arXiv 1812.06127")
class FlowerFedProx(FlowerStrategy):
    """Flower's FedProx: FedAvg with a proximal term at the clients."""

    rule = "FedProx"


@dataclass(frozen=True)
class FedAvgMHyper(FlowerHyper):
    """Hyper-parameters of Flower's FedAvgM."""

    server_learning_rate: float = hyper(1.0, "server learning rate", above=0)
    server_momentum: float = hyper(0.9, "server momentum (Flower's default 0 is FedAvg)", low=0, high=1)


@strategy("flwr_fedavgm", client=FlowerClient, hyper=FedAvgMHyper, paper="Hsu et al. 2019, arXiv 1909.06335")
class FlowerFedAvgM(FlowerStrategy):
    """Flower's FedAvgM: FedAvg with server momentum."""

    rule = "FedAvgM"
    steps = True
    kept = ("current_arrays", "momentum_vector")

    def revive(self, name: str, kept: Mapping[str, torch.Tensor]) -> Any:
        """`current_arrays` is a record, `momentum_vector` a list in the model's order."""
        if name == "current_arrays":
            return record(self.ruled(dict(kept)))
        return [kept[str(i)].numpy().copy() for i in range(len(kept))]


@dataclass(frozen=True)
class FedAdagradHyper(FlowerHyper):
    """Hyper-parameters of Flower's FedAdagrad."""

    eta: float = hyper(0.1, "η, server learning rate", above=0)
    tau: float = hyper(1e-3, "τ, degree of adaptivity", above=0)


@strategy("flwr_fedadagrad", client=FlowerClient, hyper=FedAdagradHyper, paper="Reddi et al. 2021, arXiv 2003.00295")
class FlowerFedAdagrad(FlowerStrategy):
    """Flower's FedAdagrad: Adagrad on the mean update."""

    rule = "FedAdagrad"
    steps = True
    kept = ("m_t", "v_t")


@dataclass(frozen=True)
class FedAdamHyper(FedAdagradHyper):
    """Hyper-parameters of Flower's FedAdam."""

    beta_1: float = hyper(0.9, "β₁, first moment", low=0, high=0.9999)
    beta_2: float = hyper(0.99, "β₂, second moment", low=0, high=0.9999)


@strategy("flwr_fedadam", client=FlowerClient, hyper=FedAdamHyper, paper="Reddi et al. 2021, arXiv 2003.00295")
class FlowerFedAdam(FlowerStrategy):
    """Flower's FedAdam: Adam on the mean update."""

    rule = "FedAdam"
    steps = True
    kept = ("m_t", "v_t")


@dataclass(frozen=True)
class FedYogiHyper(FedAdamHyper):
    """Hyper-parameters of Flower's FedYogi."""

    eta: float = hyper(0.01, "η, server learning rate", above=0)


@strategy("flwr_fedyogi", client=FlowerClient, hyper=FedYogiHyper, paper="Reddi et al. 2021, arXiv 2003.00295")
class FlowerFedYogi(FlowerStrategy):
    """Flower's FedYogi: Yogi on the mean update."""

    rule = "FedYogi"
    steps = True
    kept = ("m_t", "v_t")


@strategy("flwr_fedmedian", client=FlowerClient, hyper=FlowerHyper, paper="Yin et al. 2018, arXiv 1803.01498")
class FlowerFedMedian(FlowerStrategy):
    """Flower's FedMedian: coordinate-wise median."""

    rule = "FedMedian"


@dataclass(frozen=True)
class FedTrimmedAvgHyper(FlowerHyper):
    """Hyper-parameters of Flower's FedTrimmedAvg."""

    beta: float = hyper(0.2, "share cut off at both ends, below 0.5", low=0, high=0.4999)


@strategy(
    "flwr_fedtrimmedavg",
    client=FlowerClient,
    hyper=FedTrimmedAvgHyper,
    paper="Yin et al. 2018, arXiv 1803.01498",
)
class FlowerFedTrimmedAvg(FlowerStrategy):
    """Flower's FedTrimmedAvg: coordinate-wise trimmed mean."""

    rule = "FedTrimmedAvg"


@dataclass(frozen=True)
class KrumHyper(FlowerHyper):
    """Hyper-parameters of Flower's Krum and Bulyan."""

    num_malicious_nodes: int = hyper(0, "f, clients assumed malicious", low=0)


@strategy("flwr_krum", client=FlowerClient, hyper=KrumHyper, paper="Blanchard et al. 2017, arXiv 1703.02757")
class FlowerKrum(FlowerStrategy):
    """Flower's Krum: the one update nearest to its n − f − 2 neighbours; needs 2f + 3 clients."""

    rule = "Krum"

    @property
    def quorum(self) -> int:
        """2f + 3."""
        return int(2 * self.hyper.num_malicious_nodes + 3)


@dataclass(frozen=True)
class MultiKrumHyper(KrumHyper):
    """Hyper-parameters of Flower's MultiKrum."""

    num_nodes_to_select: int = hyper(2, "m, updates averaged (Flower's default 1 is Krum)", low=1)


@strategy(
    "flwr_multikrum",
    client=FlowerClient,
    hyper=MultiKrumHyper,
    paper="Blanchard et al. 2017, arXiv 1703.02757",
)
class FlowerMultiKrum(FlowerStrategy):
    """Flower's MultiKrum: mean of the m best updates by Krum's score; needs 2f + 3 and m + f clients."""

    rule = "MultiKrum"

    @property
    def quorum(self) -> int:
        """2f + 3, and m of those that are not malicious."""
        f = self.hyper.num_malicious_nodes
        return int(max(2 * f + 3, self.hyper.num_nodes_to_select + f))


@strategy("flwr_bulyan", client=FlowerClient, hyper=KrumHyper, paper="El Mhamdi et al. 2018, arXiv 1802.07927")
class FlowerBulyan(FlowerStrategy):
    """Flower's Bulyan: MultiKrum, then the mean of values nearest the median; needs 4f + 3 clients."""

    rule = "Bulyan"

    @property
    def quorum(self) -> int:
        """4f + 3."""
        return int(4 * self.hyper.num_malicious_nodes + 3)


@dataclass(frozen=True)
class QFedAvgHyper(FlowerHyper):
    """Hyper-parameters of Flower's QFedAvg."""

    q: float = hyper(0.1, "q, degree of fairness; 0 takes every client alike", low=0)
    client_learning_rate: float | None = hyper(None, "1/L of the paper; null: train.lr", above=0, only="q")


@strategy("flwr_qfedavg", client=QFedAvgClient, hyper=QFedAvgHyper, paper="Li et al. 2020, arXiv 1905.10497")
class FlowerQFedAvg(FlowerStrategy):
    """Flower's QFedAvg: clients with a higher loss weigh more."""

    rule = "QFedAvg"
    steps = True
    metrics = {"train_loss": (0, 1e30)}
    uncovered = "looks at private examples outside of training"

    def options(self) -> dict[str, Any]:
        """The clients' learning rate unless another was given."""
        given = super().options()
        return {
            **given,
            "client_learning_rate": given["client_learning_rate"] or self.scenario.config.train.lr,
        }
