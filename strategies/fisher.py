"""Fisher merging: each weight is averaged by how sure each client is of it.

Box (Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832). In round t:

    client k:  θ_k ← θ; E epochs of SGD;   F_k = (1/n_k) Σ_x Σ_c p(c|x) (∂ log p(c|x)/∂θ_k)²;   sends F_k, F_k θ_k
    server:    θ ← Σ_k λ_k F_k θ_k / Σ_k λ_k F_k,   λ_k = n_k

The diagonal of the Fisher information, weight by weight. F_k is divided by its root mean square: a client that fits its
examples has F near 0 in all weights, and one that does not has hundreds of times as much, so that raw F (`scale=raw`)
lets the client that learnt least decide; the paper's code divides by the norm, which is the same. After that F_k is at
least `floor`, and a weight that no example moves anywhere (a dead unit) gets the plain mean. Where all F_k are equal it
is FedAvg. Two sums, so the same bits for any number of workers. Travels: 2·P·B_f bytes up and P·B_f down, a client and
round; with `rank=r` LoRA's A and B and the head instead of the network. Buffers are averaged.

The paper merges once; here it is done each round, and that is unstable under strong skew: F of a weight grows with the
square of its inputs and of the weights after it, so of each unit the client where it is largest gets the most say, and
networks grow from round to round. On MNIST with clients of two or three classes (seed 0) the clients' training loss
after ten rounds was 1258 with the paper's floor of 1e-6, and with `floor` 0.1, 0.3 and 1 of the root mean square 0.33,
0.39 and 0.10: 1 is the default, under which F only raises what is surer than usual.

Not reproduced of a released code (bloomberg/dataless-model-merging): it squares the mean gradient of a batch, takes the
model's own argmax for the label, and adds 1e-10 to the denominator alone, which draws weights of small F towards 0.
`labels=data` is the empirical Fisher. `samples` bounds the examples, drawn anew each round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedfuse import (
    Arrays,
    InvalidArrays,
    MergingClient,
    MergingHyper,
    MergingStrategy,
    Records,
    Scope,
    Shares,
    UserError,
    Workspace,
    curvature,
    hyper,
    merging,
    parts,
    strategy,
)


@dataclass(frozen=True)
class FisherHyper(MergingHyper):
    """Hyper-parameters of Fisher merging."""

    labels: str = hyper("expected", "classes as the model expects them, or as labelled", choices=("expected", "data"))
    samples: int | None = hyper(64, "examples that F is taken over; null: all", low=1)
    scale: str = hyper(
        "alike", "F_k by its root mean square, as the paper's code has it, or as it is", choices=("alike", "raw")
    )
    floor: float = hyper(1.0, "least entry of F, after that (paper's code, of one merge: 1e-6)", above=0)
    weighting: str = hyper("examples", "weights λ_k = n_k, or all alike", choices=("examples", "uniform"))


def scaled(fisher: Arrays) -> Arrays:
    """F divided by the root mean square of its entries, over all parameters; zeros stay."""
    mean = sum(float(value.square().sum()) for value in fisher.values()) / sum(f.numel() for f in fisher.values())
    return {name: value / mean**0.5 if mean else value for name, value in fisher.items()}


class FisherClient(MergingClient):
    """Sends F_k, and its weights times F_k."""

    def share(self) -> Records:
        """F_k and F_k θ_k of parameters, buffers as they are."""
        h: FisherHyper = self.hyper
        x, y = self.x, self.y
        if h.samples is not None and h.samples < len(x):
            rows = torch.randperm(len(x), generator=self.generator("fisher"))[: h.samples].sort().values.to(x.device)
            x, y = x[rows], y[rows]
        end = self.weights()
        found = curvature.fisher(self.model, x, y, expected=h.labels == "expected")
        found = {n: found[n] for n in merging.parameters(self.model, end) if n in found}  # a frozen one has none
        if h.scale == "alike":
            found = scaled(found)
        f = {
            n: found.get(n, torch.zeros_like(end[n])).clamp_min(h.floor).to(end[n].dtype)
            for n in merging.parameters(self.model, end)
        }
        rest = parts.without(end, parts.parameters(self.model))
        return {"fisher": f, "scaled": {n: f[n] * end[n] for n in f}, "rest": rest}


@strategy("fisher", client=FisherClient, hyper=FisherHyper, paper="Matena and Raffel 2022, arXiv 2111.09832")
class Fisher(MergingStrategy):
    """Mean of each weight, weighted by the clients' Fisher information."""

    records = {"fisher": merging.parameter_arrays, "scaled": merging.parameter_arrays, "rest": merging.rest_arrays}
    uncovered = "looks at private examples outside of training"

    def __init__(self, hyper: FisherHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        if hyper.labels == "expected" and self.scenario.data.dataset.next_token:
            raise UserError("strategy.labels=expected: a token for each of a vocabulary is too many; allowed: data")

    means = ()  # what is fused is a ratio of two sums

    @property
    def sums(self) -> Mapping[str, str | None]:
        """Σ λ F, Σ λ F θ, and the mean of the buffers."""
        return dict.fromkeys(self.records, self.weight)

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """F is positive: a square, or the floor."""
        for name, value in records.get("fisher", {}).items():
            if bool((value <= 0).any()):
                raise InvalidArrays(f"fisher/{name}: not positive")

    def fuse(self, shares: Shares) -> None:
        """θ ← Σ λ F θ / Σ λ F."""
        (f, _), (scaled, _) = shares.total("fisher"), shares.total("scaled")
        merged = {name: (scaled[name] / f[name]).to(self.model[name].dtype) for name in f}
        merged = parts.with_tied(self.workspace.model(self.architecture), merged)
        rest = shares.mean("rest") if len(merged) < len(self.model) else {}  # a model without buffers has none
        self.publish("model", {**merged, **rest})
