"""CoFED: clients pseudo-label a shared set by vote, once, and train on it beside their own data.

Box (Cao et al., "Cross-silo heterogeneous model federated multitask learning", Knowledge-Based Systems 2023,
arXiv 2202.08603; code flcao/CoFED). Once, after its local training:

    client k:  for x ∈ D_t the class c = argmax f_k(x), if the two largest probabilities differ by more than α and it
               owns c (has examples of c); else it abstains. Sends its votes and which classes it owns
    server:    x belongs to c if the (weighted) share of votes for c, among the clients that own c, exceeds β
    client k:  takes x with a class it owns, unless two of its classes claim x; trains on private and pseudo-labelled
               examples together, with class weights inverse to frequency

Travels, once: 2·T_s + C bytes up, 6 bytes down for each pair (x, c), a client. Any kind of model may take part.
Placed in rounds here: the vote is a phase of its own at the end of round `vote_round`, by default after half of the
rounds, since the paper votes after complete local training; rounds after it train on both sets. Left open: whether
models start anew then (`restart`). Without a round after the vote it is local training: a `vote_round` that leaves none
is refused, and `rounds=1` noted. `repeat` votes again after each later round; `learn=all` lets clients learn classes
they do not own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse import (
    FusionClient,
    FusionStrategy,
    InvalidArrays,
    Item,
    Layout,
    Metrics,
    Records,
    Scope,
    Shares,
    Topic,
    UserError,
    Workspace,
    arrays,
    hyper,
    strategy,
)


@dataclass(frozen=True)
class CoFEDHyper:
    """Hyper-parameters of CoFED."""

    margin: float = hyper(0.3, "α, least gap of the two largest probabilities (code: 0.3)", low=0, high=1)
    threshold: float = hyper(
        0.3, "β, share of owners' votes that a class must exceed (code: 0.3 CIFAR-100, 0.5 Adult)", low=0, high=1
    )
    weighting: str = hyper("uniform", "weights of the votes", choices=("uniform", "examples"))
    learn: str = hyper("owned", "classes that a client learns from the vote", choices=("owned", "all"))
    restart: bool = hyper(False, "start from the initial weights when pseudo-labels come")
    vote_round: int | None = hyper(
        None, "round at whose end the vote is held; null: half of the rounds, as local training comes first", low=1
    )
    repeat: bool = hyper(False, "vote again at the end of every later round (paper: once)")
    subset: int | None = hyper(None, "T_s, rows drawn for a vote; null: the whole transfer set", low=1)


ABSTAIN = -1


def votes(p: Tensor, owned: Tensor, margin: float) -> Tensor:
    """A client's vote on each row, (T_s,) int16: a class it owns and is sure of, or −1.

    Parameters
    ----------
    p : Tensor
        Its class probabilities (T_s × C).
    owned : Tensor
        Which classes it has examples of (C).
    margin : float
        α.
    """
    top = p.topk(2, dim=1)
    label = top.indices[:, 0]
    sure = (top.values[:, 0] - top.values[:, 1] > margin) & owned[label]
    return torch.where(sure, label, ABSTAIN).to(torch.int16)


def count_votes(labels: Tensor, owned: Tensor, weights: Tensor, threshold: float) -> Tensor:
    """Which pairs (row, class) the vote accepts, (T_s × C) bool.

    Parameters
    ----------
    labels : Tensor
        Votes (N × T_s), −1 for none.
    owned : Tensor
        Who owns what (N × C).
    weights : Tensor
        Of the clients (N).
    threshold : float
        β, of the owners' weight.
    """
    ballots = F.one_hot(labels.long() + 1, owned.shape[1] + 1)[..., 1:] * owned[:, None]
    owners = torch.einsum("n,nc->c", weights.double(), owned.double())
    cast = torch.einsum("n,ntc->tc", weights.double(), ballots.double())
    return cast > threshold * owners  # nobody owns it: 0 > 0, never


def own_pairs(rows: Tensor, labels: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """The accepted pairs of a client's classes, without rows that two of them claim."""
    mine = owned[labels]
    rows, labels = rows[mine], labels[mine]
    single = (torch.bincount(rows) == 1)[rows] if len(rows) else torch.zeros(0, dtype=torch.bool)
    return rows[single], labels[single]


def inverse_frequency(labels: Tensor, classes: int) -> Tensor:
    """Class weights n / (K·n_c) over the K classes that are there; 0 for the others."""
    count = torch.bincount(labels, minlength=classes).float()
    present = count > 0
    return torch.where(present, len(labels) / (present.sum() * count.clamp_min(1)), 0.0)


def accepted_arrays(scope: Scope) -> Layout:
    """Layout of the accepted pairs: at most every row with every class."""
    most = scope.dims["subset"] * scope.dims["classes"]
    return {"rows": ("int32", (-most,)), "labels": ("int16", (-most,))}


class CoFEDClient(FusionClient):
    """Keeps its own model; votes once, then learns from the vote beside its own data."""

    personal = True
    taught: Item | None = None

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Keep the accepted pairs at hand: they are in every message."""
        self.taught = knowledge["pseudo_labels"]

    def owned(self) -> Tensor:
        """Classes this client has examples of (C) bool."""
        return torch.bincount(self.y, minlength=self.classes).cpu() > 0

    def fit(self) -> Metrics:
        """Cross-entropy with inverse-frequency weights on private and pseudo-labelled data."""
        if self.taught is None:
            return self.train()
        h, item = self.hyper, self.taught
        if h.restart and self.state.get("taught") != item.version:
            self.load(self.workspace.initial(self.architecture))
        self.state["taught"] = item.version
        classes = self.owned() if h.learn == "owned" else torch.ones(self.classes, dtype=torch.bool)
        rows, labels = own_pairs(item.arrays["rows"].long().cpu(), item.arrays["labels"].long().cpu(), classes)
        x = torch.cat([self.x, self.transfer[self.subset(h.subset, item.version)[rows]]])
        y = torch.cat([self.y, labels.to(self.y.device)])
        weight = inverse_frequency(y, self.classes)

        def loss(logits: Tensor, labels: Tensor, _: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, weight)

        return {**self.train(loss, x, y), "num-examples": len(self.x), "pseudo_labels": len(rows)}

    def share(self) -> Records:
        """Nothing outside the vote."""
        return {}

    def vote(self) -> Records:
        """Votes on this round's rows, and the classes owned."""
        owned = self.owned()
        p = self.predict(self.transfer[self.subset(self.hyper.subset)]).softmax(1).cpu()
        return {"votes": {"labels": votes(p, owned, self.hyper.margin), "owned": owned}}


@strategy("cofed", client=CoFEDClient, hyper=CoFEDHyper, paper="Cao et al. 2023, arXiv 2202.08603")
class CoFED(FusionStrategy):
    """Co-training: a shared set pseudo-labelled by the vote of the clients that own a class, once."""

    topics = {"pseudo_labels": Topic("state", accepted_arrays)}
    records = {}
    records_vote = {"votes": arrays(labels=("int16", "subset"), owned=("bool", "classes"))}
    of_classes = True
    transfer = "clients"
    discloses = ("label sets",)

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        rounds = self.scenario.config.rounds
        if hyper.vote_round is not None and hyper.vote_round >= rounds:
            raise UserError(
                f"strategy.vote_round={hyper.vote_round}: no round of rounds={rounds} comes after the vote, so that "
                f"nobody learns from it; allowed: a round before the last"
            )

    def phases(self, round: int) -> tuple[str, ...]:
        """The vote ends its round."""
        first = self.hyper.vote_round or (self.scenario.config.rounds + 1) // 2
        return ("train", "vote") if round == first or (self.hyper.repeat and round > first) else ("train",)

    def planned(self) -> str:
        """The round of the vote, where the user says none."""
        return "" if self.hyper.vote_round else "the vote is held in the middle of the rounds"

    def notes(self) -> list[str]:
        """That nobody learns from a vote after the only round, or from one that accepted nothing."""
        if self.scenario.config.rounds > 1:
            voted = self.board.items.get(("pseudo_labels", ""))
            if voted is None or len(voted.arrays["rows"]):
                return []
            return [
                "cofed: the vote accepted no row, so that nobody learned from another; what it has beyond local "
                "training are class weights alone: more training before the vote (train.epochs, rounds), or a lower "
                "strategy.margin or strategy.threshold, lets some in"
            ]
        return ["cofed: rounds=1 has no round after the vote, so that nobody learns from it: this is local training"]

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Votes are for classes, or none."""
        if "votes" in records:
            labels = records["votes"]["labels"]
            if bool(((labels < ABSTAIN) | (labels >= scope.dims["classes"])).any()):
                raise InvalidArrays("votes/labels: not a class")

    def fuse(self, shares: Shares) -> None:
        """Local training leaves nothing to fuse."""

    def fuse_vote(self, shares: Shares) -> None:
        """Count the votes; publish the accepted pairs, by row."""
        everyone = list(shares)
        uniform = self.hyper.weighting == "uniform"
        accepted = count_votes(
            torch.stack([s.records["votes"]["labels"] for s in everyone]),
            torch.stack([s.records["votes"]["owned"] for s in everyone]),
            torch.tensor([1.0 if uniform else s.examples for s in everyone]),
            self.hyper.threshold,
        )
        rows, labels = accepted.nonzero(as_tuple=True)
        self.log("rows/accepted", len(rows))
        self.publish("pseudo_labels", {"rows": rows.int(), "labels": labels.to(torch.int16)})
