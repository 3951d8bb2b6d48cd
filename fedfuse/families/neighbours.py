"""Who teaches whom: personal mixtures of what others know, and rules that may take the place of an algorithm's own.

A rule is chosen by a word, and both halves of a strategy ask it the same questions (`Rule`); it keeps nothing. It is
for strategies of one topic and one record, in which `p` are soft labels.

classroom   whoever is no worse on the labelled transfer rows teaches, with CE on their labels: `fedfuse.train.mentors`
            (Sarode et al. 2024, arXiv 2409.20237). Down go M ≤ N − 1 soft labels, M·T_s·C·B_f bytes.
perplexity  of texts: w_nm(x) = softmax_m(−β·CE_m(x)), CE_m(x) in nats per byte of row x. By row these are the weights
            of Mavromatis et al. 2024, arXiv 2404.11531, with τ = 1/β; personal only by `include_self=false`. The k
            likeliest tokens of each place are mixed, with the rest as one more bucket, aligned by bytes between
            tokenisers (`public_text`). Down go T_s·P·k·(4 + B_id) bytes, P places a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.config.registry import without_effect
from fedfuse.core.client import FusionClient
from fedfuse.core.shares import Share
from fedfuse.core.strategy import FusionStrategy
from fedfuse.errors import UserError
from fedfuse.families import public_text
from fedfuse.train import mentors
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import Layout, Scope

Step = Callable[[Tensor, Tensor | None, Tensor], Tensor]  # (logits, labels, rows) → loss, as `distil` asks for
INERT = 0.9  # self-weight from which a mixture is a client's own soft labels, which teach it nothing


def distances(p: Tensor, kind: str) -> Tensor:
    """d_nm between class distributions.

    Parameters
    ----------
    p : Tensor
        One a row (N × C); zeros are allowed.
    kind : str
        `kl_nm` (KL(p_n ‖ p_m)), `kl_mn`, `sym_kl`, `js`, `l2` or `cosine`.

    Returns
    -------
    Tensor
        N × N, zero on the diagonal.
    """
    if kind == "l2":
        return (p[:, None] - p[None]).square().sum(-1).sqrt()
    if kind == "cosine":
        return 1 - F.cosine_similarity(p[:, None], p[None], dim=-1)
    p = p.clamp_min(1e-12)
    p = p / p.sum(-1, keepdim=True)
    log = p.log()
    forward = (p[:, None] * (log[:, None] - log[None])).sum(-1)  # KL(p_n ‖ p_m)
    if kind == "kl_nm":
        return forward
    if kind == "kl_mn":
        return forward.T
    if kind == "sym_kl":
        return (forward + forward.T) / 2
    mid = ((p[:, None] + p[None]) / 2).log()
    return ((p[:, None] * (log[:, None] - mid)).sum(-1) + (p[None] * (log[None] - mid)).sum(-1)) / 2


def weights(d: Tensor, h: Any, able: Tensor | None = None, worth: Tensor | None = None) -> Tensor:
    """w_nm = softmax_m(−β·d_nm), over those that client n may listen to.

    Parameters
    ----------
    d : Tensor
        Distances (N × N).
    h
        Hyper-parameters `beta`, `include_self` (whether n is in its own mixture), `top_k` (only the nearest, or null)
        and `min_weight` (below which a weight is dropped).
    able : Tensor, optional
        Which clients have examples (N) bool; the others get a mixture and are in nobody's. Default: all.
    worth : Tensor, optional
        What each client's share counts for (N), by its staleness; multiplies w_nm before it is normalised.

    Returns
    -------
    Tensor
        N × N, row n is client n's mixture; rows sum to 1.
    """
    n = len(d)
    left_out = torch.zeros(n, n, dtype=torch.bool) if able is None else ~able.expand(n, n)
    if not h.include_self:
        alone = (~left_out).sum(1, keepdim=True) == 1  # with nobody else to listen to, a client is in its own mixture
        left_out = left_out | (torch.eye(n, dtype=torch.bool) & ~alone)
    if h.top_k is not None and h.top_k < n:
        nearest = d.masked_fill(left_out, math.inf).topk(h.top_k, dim=1, largest=False).indices
        left_out |= torch.ones_like(left_out).scatter(1, nearest, False)
    closeness = -h.beta * d if worth is None else -h.beta * d + worth.log()
    w = closeness.masked_fill(left_out, -math.inf).softmax(1)
    if h.min_weight > 0:
        strongest = F.one_hot(w.argmax(1), n).bool()  # somebody always stays
        w = torch.where((w >= h.min_weight) | strongest, w, 0)
        w = w / w.sum(1, keepdim=True)
    return w


def who(everyone: Sequence[Share]) -> tuple[list[int], Tensor, Tensor]:
    """The clients, which of them have examples (N) bool, and what each one's share counts for (N)."""
    able = torch.tensor([s.examples > 0 for s in everyone])
    return [s.client for s in everyone], able, torch.tensor([s.weight for s in everyone], dtype=torch.float64)


def log_mixtures(server: FusionStrategy, clients: list[int], w: Tensor) -> None:
    """Log who listens to whom: w_nm, how much a client keeps for itself, and how many it amounts to, 1/Σ_m w_nm²."""
    server.log_matrix("similarity", clients, w)
    own, neighbours = w.diagonal(), 1 / w.square().sum(1)
    for name, values in (("weight/self", own), ("weight/neighbours", neighbours)):
        for client, value in zip(clients, values.tolist(), strict=True):
            server.log(name, value, client, scope="client")
        server.log(name, float(values.mean()))
    server.state["weights"] = {"self": float(own.mean()), "neighbours": float(neighbours.mean())}


def inert(server: FusionStrategy, advice: str) -> list[str]:
    """A note with this advice if the last round's mixtures (`log_mixtures`) were next to clients' own soft labels."""
    last = server.state.get("weights")
    if last is None or last["self"] < INERT or server.scenario.cohort_size == 1:
        return []
    return [
        f"{server.name}: fusion did next to nothing: in the last round clients kept {last['self']:.3f} of their "
        f"mixtures for themselves ({last['neighbours']:.2f} effective neighbours); {advice}"
    ]


class Rule(Protocol):
    """What takes the place of an algorithm's own rule, in both halves."""

    def check(self, server: FusionStrategy, *idle: str) -> None:
        """Refuse what it cannot do, and other values than the default of hyper-parameters that are idle beside it.

        Raises
        ------
        UserError
            Naming the first.
        """

    def taught(self, scope: Scope) -> Layout:
        """Layout of what a client is taught."""

    def lesson(self, client: FusionClient, item: Item, rows: Tensor) -> tuple[Step, Tensor, Tensor | None]:
        """How a client learns from it, on those rows of the transfer set: objective, inputs, labels."""

    def fuse(self, server: FusionStrategy, everyone: Sequence[Share], rows: Tensor) -> None:
        """Publish to each of those who shared what it is taught; one of them at least has examples."""


class Classroom:
    """Mentors by rank.

    Parameters
    ----------
    softened : float or None
        The temperature of the probabilities that clients share; None where they share logits.
    """

    def __init__(self, softened: float | None) -> None:
        self.softened = softened

    def check(self, server: FusionStrategy, *idle: str) -> None:
        """Labels are there to rank by, at the server too."""
        h = server.hyper
        if not server.scenario.config.transfer.labelled:
            raise UserError(f"strategy.neighbours={h.neighbours} ranks by labels: set transfer.labelled=true")
        for name in idle:
            without_effect(h, name, f"with strategy.neighbours={h.neighbours}")
        server.transfer, server.workspace.transfer_declared = "both", True  # type: ignore[misc]

    def taught(self, scope: Scope) -> Layout:
        """A client's own standing, and its mentors' soft labels, weights and temperatures."""
        return mentors.lessons(scope)

    def lesson(self, client: FusionClient, item: Item, rows: Tensor) -> tuple[Step, Tensor, Tensor | None]:
        """CE on the rows' labels, and KL to each mentor."""
        taught = {name: v.to(client.workspace.device) for name, v in item.arrays.items()}
        step = mentors.objective(taught, client.loss, softened=self.softened or 1.0)
        return step, *client.workspace.transfer(rows)

    def fuse(self, server: FusionStrategy, everyone: Sequence[Share], rows: Tensor) -> None:
        """Rank by the rows' labels, and send each the soft labels of its mentors."""
        (record,), (topic,) = server.records, server.topics
        clients, able, worth = who(everyone)
        sent = torch.stack([s.records[record]["p"] for s in everyone])
        p = (sent.softmax(-1) if self.softened is None else sent).double()
        logits = sent.double() if self.softened is None else self.softened * p.log()
        w = mentors.standing(logits, server.workspace.tensors("transfer")[1].cpu()[rows], worth)
        server.log_matrix("similarity", clients, mentors.mentors(w, able) * w)
        for n, client in enumerate(clients):
            server.publish(topic, mentors.lesson(n, p, w, able), to=client)


class Perplexity:
    """Mixtures of texts by what each model makes of each row; a record is as of `public_text.said`.

    Hyper-parameters: those of `weights`, `k`, `kd_temperature` and `finetune_loss`, which is `ce_soft`, or KL, with the
    rows' own tokens besides (`kl+ce_hard`) or without.
    """

    def check(self, server: FusionStrategy, *idle: str) -> None:
        """There are texts; what is idle is known to the strategy."""
        if not server.scenario.data.dataset.next_token:
            raise UserError("strategy.distance=perplexity: perplexity is of texts")

    def taught(self, scope: Scope) -> Layout:
        """A mixture's likeliest tokens of each place."""
        return {name: array for name, array in public_text.said_arrays(scope).items() if name != "bits"}

    def lesson(self, client: FusionClient, item: Item, rows: Tensor) -> tuple[Step, Tensor, Tensor | None]:
        """Distil the mixture, in the client's own tokens."""
        h, texts = client.hyper, client.workspace.texts
        places = texts.places(client.architecture, rows)
        loss = client.loss("soft_ce" if h.finetune_loss == "ce_soft" else "kl", temperature=h.kd_temperature)
        everywhere = torch.ones(len(rows), dtype=torch.bool, device=places.x.device)
        hard, pieces = float(h.finetune_loss == "kl+ce_hard"), texts.pieces(client.architecture)
        return public_text.lesson(places, item.arrays, everywhere, pieces, loss, hard, 1.0), places.x, None

    def fuse(self, server: FusionStrategy, everyone: Sequence[Share], rows: Tensor) -> None:
        """Mix by row, in each client's own tokens."""
        (record,), (topic,) = server.records, server.topics
        h, texts, names = server.hyper, server.workspace.texts, server.scenario.architectures
        clients, able, worth = who(everyone)
        sizes = texts.places(names[clients[0]], rows).ends.amax(1).cpu()
        bits = torch.stack([s.records[record]["bits"].double().cpu() for s in everyone])
        by_row = [weights(ce.expand(len(ce), -1), h, able, worth) for ce in public_text.nats(bits, sizes).T]
        w = torch.stack(by_row, 2)  # N × N × T_s
        log_mixtures(server, clients, w.mean(2))
        said = [public_text.Said(names[s.client], s.records[record]) for s in everyone]
        for client, mixture in zip(clients, public_text.mixtures(texts, said, w, rows, h.k), strict=True):
            server.publish(topic, mixture, to=client)


def rule(word: str, softened: float | None = 1.0) -> Rule | None:
    """The rule of that name, for soft labels shared at that temperature (None: as logits); None for any other word."""
    known: dict[str, Rule] = {"classroom": Classroom(softened), "perplexity": Perplexity()}
    return known.get(word)
