"""SCARLET: DS-FL with a soft-label cache that server and clients keep in step, and Enhanced ERA.

Box (Azuma et al., "Soft-Label Caching and Sharpening for Communication-Efficient Federated Distillation", arXiv
2504.19602, IEEE TMC 2026). All hold a cache of labels q_i with the round s_i that made each. In round t, P_t ⊂ D_t:

    requested: R_t = { i ∈ P_t : i not cached, or t − s_i > D }, known to everyone from the cache alone
    client k:  trains on its labels; sends p_k(x_i), i ∈ R_t                                              (|R_t| × C)
    server:    p̄ = (1/K) Σ_k p_k;   Enhanced ERA: q_i = p̄_i^β / Σ_c p̄_ic^β, cached with s_i = t
               sends the q_i, i ∈ R_t, and which cached rows expired                                      (|R_t| × C)
    clients and the server's own model:  distil q on P_t, cached and new

Travels: up |R_t|·C·B_f bytes; down |R_t|·(C·B_f + 4) + 4·|expired| + 4. The cache is a folded topic: a client that was
away gets the increments it missed or the whole, whichever is smaller. Choices: a row older than D is requested anew
and replaced in the same round (the released code drops it and caches again one request later, and at age D exactly
asks for a row whose answer it then does not send); the round's rows follow from the seed, so requests need no bytes.
β = 1 leaves the mean as it is; D = 0 with all rows is DS-FL with that sharpener. Architectures may differ.
Distillation has Adam at 10⁻³ unless `distil.*` says otherwise (ours; code: SGD 0.1 without momentum, on rounds of 1,000
rows): of a tenth of a small transfer set SGD taught the server's student nothing at such a rate, and at the clients'
0.05 with momentum convolutions died (docs/distillation.md has the figures).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedfuse import (
    Arrays,
    FusionClient,
    Item,
    Records,
    Scenario,
    Scope,
    Shares,
    StudentStrategy,
    Topic,
    arrays,
    distributions,
    hyper,
    strategy,
    transfer_rows,
)

ADAM: Any = {"optimizer": "adam", "lr": 1e-3}  # of the distillation, at both ends


@dataclass(frozen=True)
class ScarletHyper:
    """Hyper-parameters of SCARLET."""

    beta: float = hyper(1.5, "β of Enhanced ERA; 1: no sharpening (paper: 1 to 2)", above=0)
    duration: int = hyper(50, "D, rounds for which a cached label is served", low=0)
    subset: int | None = hyper(
        None, "|P_t|, redrawn each round; null: a tenth of the transfer set, as in the paper", low=1
    )
    distill_epochs: int = hyper(5, "epochs of distillation, at clients and server (paper: 5)", low=0, effort="epochs")
    distill_batch: int = hyper(64, "batch size of distillation", low=1, only="distill_epochs", effort="batch_size")
    server_model: bool = hyper(True, "the server keeps a model of its own and distils it too")


def enhanced_era(mean: Tensor, beta: float) -> Tensor:
    """Mean probabilities (n × C) raised to β and renormalised by row."""
    powered = mean**beta
    return powered / powered.sum(1, keepdim=True)


def lookup(cache: Arrays | None, rows: Tensor, round: int, duration: int) -> tuple[Tensor, Tensor]:
    """Find which `rows` the cache serves in a round, and where.

    Parameters
    ----------
    cache : dict of Tensor or None
        `index` (m,) ascending, `p` (m × C), `stamp` (m,): the round that made each row.
    rows : Tensor
        Rows of the transfer set (n,).
    round, duration : int
        A row is served while round − stamp ≤ duration.

    Returns
    -------
    tuple of Tensor
        Whether each row is served (n,), and the cache's positions of those that are.
    """
    if cache is None or len(cache["index"]) == 0:
        return torch.zeros(len(rows), dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    at = torch.searchsorted(cache["index"].long(), rows).clamp_max(len(cache["index"]) - 1)
    served = (cache["index"][at] == rows) & (round - cache["stamp"][at] <= duration)
    return served, at[served]


def merge(cache: Arrays, increment: Arrays) -> Arrays:
    """Fold: drop expired and replaced rows, add the new ones, keep the order of indices."""
    gone = torch.isin(cache["index"], torch.cat([increment["expired"], increment["index"]]))
    stamp = increment["round"].expand(len(increment["index"]))
    index = torch.cat([cache["index"][~gone], increment["index"]])
    order = index.argsort()
    joined = {"p": torch.cat([cache["p"][~gone], increment["p"]]), "stamp": torch.cat([cache["stamp"][~gone], stamp])}
    return {"index": index[order], **{name: value[order] for name, value in joined.items()}}


def round_rows(scenario: Scenario, h: ScarletHyper, round: int) -> Tensor:
    """P_t, ascending."""
    total = 0 if scenario.data.transfer is None else len(scenario.data.transfer)
    return transfer_rows(scenario, h.subset or max(1, (total + 5) // 10), round)


class ScarletClient(FusionClient):
    """Keeps its own model; distils cached and new labels, answers only what is requested."""

    personal = True
    cache: Arrays | None = None

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Hold the cache; distil the rows of its newest round, once."""
        h, item = self.hyper, knowledge["cache"]
        self.cache = {name: value.cpu() for name, value in item.arrays.items()}
        if item.version <= self.state.get("distilled", 0):
            return
        self.state["distilled"] = self.version = item.version
        rows = round_rows(self.scenario, h, item.version)
        served, at = lookup(self.cache, rows, item.version, h.duration)
        x, y = self.workspace.transfer(rows[served])
        distil = self.loss("kl").towards(self.cache["p"][at].to(self.workspace.device))
        self.distil(distil, x, y, epochs=h.distill_epochs, batch_size=h.distill_batch, **ADAM)

    def share(self) -> Records:
        """Probabilities of the requested rows, in ascending order."""
        rows = round_rows(self.scenario, self.hyper, self.round)
        served, _ = lookup(self.cache, rows, self.round, self.hyper.duration)
        wanted = rows[~served]
        if len(wanted) == 0:
            return {"labels": {"p": torch.zeros(0, self.classes)}}
        return {"labels": {"p": self.predict(self.transfer[wanted]).softmax(1)}}


@strategy("scarlet", client=ScarletClient, hyper=ScarletHyper, paper="Azuma et al. 2025, arXiv 2504.19602")
class Scarlet(StudentStrategy):
    """Sharpened mean soft labels with a synchronised cache: only uncached rows travel."""

    topics = {
        "cache": Topic(
            "fold",
            arrays(index=("int32", "<=transfer"), p=("<=transfer", "classes"), stamp=("int32", "<=transfer")),
            merge,
            arrays(
                index=("int32", "<=transfer"),
                p=("<=transfer", "classes"),
                expired=("int32", "<=transfer"),
                round=("int32", 1),
            ),
        )
    }
    records = {"labels": arrays(p=("<=transfer", "classes"))}
    of_classes = True
    transfer = "both"
    distils = whole = True

    @property
    def rows_distilled(self) -> int:
        """|P_t|."""
        return len(round_rows(self.scenario, self.hyper, 1))

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Rows are distributions."""
        distributions("labels", records["labels"]["p"])

    def fuse(self, shares: Shares) -> None:
        """Mean and Enhanced ERA of the requested rows into the cache; the server distils the round's rows."""
        h, item = self.hyper, self.board.items.get(("cache", ""))
        cache = None if item is None else item.arrays
        rows = round_rows(self.scenario, h, self.round)
        served, _ = lookup(cache, rows, self.round, h.duration)
        wanted = rows[~served].int()
        total, clients = torch.zeros(len(wanted), self.classes, dtype=torch.float64), 0
        for share in shares:
            p = share.records["labels"]["p"]
            if len(p) != len(wanted):
                self.exclude(share, f"labels/p: {len(p)} rows, {len(wanted)} were requested")
                continue
            if share.examples:  # else it has learnt nothing of its own
                total, clients = total + p.double(), clients + 1
        if clients == 0:
            return
        q, now = enhanced_era(total / clients, h.beta).float(), torch.tensor([self.round], dtype=torch.int32)
        if cache is None:
            self.publish("cache", {"index": wanted, "p": q, "stamp": now.expand(len(wanted))})
        else:
            old = cache["index"][self.round - cache["stamp"] > h.duration]
            expired = old[~torch.isin(old, wanted)]
            self.publish("cache", {"index": wanted, "p": q, "expired": expired, "round": now})
        self.log("cache/requested", len(wanted))
        if h.server_model:
            served, at = lookup(self.published("cache"), rows, self.round, h.duration)
            self.teach(self.loss("kl"), self.published("cache")["p"][at], rows[served], **ADAM)
