"""FedAvg: clients train the common model, the server takes the mean.

Box (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
arXiv 1602.05629). In round t, for the sampled clients S_t:

    client k:  w_k ← w_t; E epochs of SGD on (1/n_k) Σ ℓ(w; x, y)
    server:    w_{t+1} ← Σ_{k∈S_t} n_k w_k / Σ_{k∈S_t} n_k

Travels: the model both ways, P·B_f bytes a client and round (P parameters and buffers, B_f bytes each).
Choice: `weighting=uniform` takes every client alike. Buffers are averaged as parameters are; integer ones keep their
dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse import AveragingStrategy, FusionClient, hyper, strategy


@dataclass(frozen=True)
class FedAvgHyper:
    """Hyper-parameters of FedAvg."""

    weighting: str = hyper("examples", "weights n_k, or all alike", choices=("examples", "uniform"))


@strategy("fedavg", client=FusionClient, hyper=FedAvgHyper, paper="McMahan et al. 2017, arXiv 1602.05629")
class FedAvg(AveragingStrategy):
    """Weighted mean of the clients' models."""

    staleness = "updates"
