"""KnFu: each client gets its own mixture of the others' soft labels, weighted by how alike their data seems.

A reconstruction. Confirmed from the paper (Seyedmohammadi et al., "KnFu: Effective Knowledge Fusion", 2024,
arXiv 2403.11892): the four steps and their order, an estimated class distribution per client (EPD) computed at the
fusion centre from the uploaded soft labels, personal fusion weights controlled by β = 10. Not known: the closed form of
the EPD, the distance, Eq. (8), whether a client is in its own mixture, the fine-tuning loss, its epochs. Those are
fields below. In round t, for the participants S_t with examples, z_n = f(x; Ω_n), T = 1 by default:

    (a) client n:  local training on D_n
    (b) client n:  z_n, x ∈ D_t                                                            (T_s × C), sent
    (c) server:    p_n = (1/T_s) Σ_x softmax z_n(x);   d_nm = JS(p_n, p_m);
                   w_nm = exp(−β·d_nm) / Σ_{j∈S_t} exp(−β·d_nj);   F̄_n = softmax(Σ_m w_nm z_m)     (personal, sent)
    (d) client n:  fine-tunes on D_t: min T²·KL(softmax(log F̄_n / T) ‖ softmax(z_n / T))

The paper calls β = 10 a temperature. Here it multiplies distances, so a larger β listens to fewer; were it a divisor,
its 10 would be our 0.1, and KnFu nearly FedMD. With the multiplying reading and KL (unbounded: self-weight 0.98 and
more at Dirichlet 0.3) KnFu is local training, since one's own soft labels teach nothing. Hence the default: JS, which
is at most log 2, mixed logits and 20 epochs, chosen on validation in `experiments/knfu_default`. Self-weights and
effective neighbours 1/Σ_m w_nm² are logged every round, and a run whose fusion did next to nothing says so.

`neighbours=classroom` puts ClassroomKD's rule (Sarode et al. 2024, arXiv 2409.20237; `fedfuse.train.mentors`) in the
place of EPDs and mixtures: the server ranks the participants by their loss on the labelled transfer rows, and each
fine-tunes on those that rank no lower, with CE on the rows' labels; down go their M ≤ N − 1 soft labels, M·T_s·C·B_f.

Of texts a class distribution says little, and there d_nm(x) = CE_m(x), nats per byte of the public row x: the weights
softmax_m(−β·CE_m(x)) are PackLLM's (Mavromatis et al. 2024, arXiv 2404.11531) with τ = 1/β, by row, and personal only
by `include_self=false`. Ask for `distance=perplexity fuse_space=prob`: the k likeliest tokens of every place are mixed
and distilled, with the rest as one more bucket, aligned by bytes between tokenisers.

Travels: T_s·C·B_f bytes each way, a client and round; down it is unicast. Texts: T_s·(P·k·(4 + B_id) + 4) up, and down
T_s·P·k·(4 + B_id), P places a row. β = 0 is uniform averaging, β → ∞ self-distillation. Step (d) happens at the start
of the client's next round or evaluation. The EPD tells the server each client's approximate class prior, and is only as
good as the transfer set is class-balanced. Architectures may differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse import (
    FusionClient,
    FusionStrategy,
    Item,
    Layout,
    Records,
    Scope,
    Share,
    Shares,
    Topic,
    UserError,
    Workspace,
    arrays,
    distributions,
    hyper,
    mentors,
    public_text,
    strategy,
    transfer_rows,
)


@dataclass(frozen=True)
class KnFuHyper:
    """Hyper-parameters of KnFu; every one but `beta` is an open choice of the paper."""

    neighbours: str = hyper(
        "epd",
        "who teaches whom: everybody by alike EPDs, or those no worse on the transfer set's labels (ClassroomKD)",
        choices=("epd", "classroom"),
    )
    beta: float = hyper(10.0, "β, inverse temperature of the fusion weights (paper: 10)", low=0)
    epd_source: str = hyper(
        "mean_soft",
        "how p_n is estimated",
        choices=("mean_soft", "argmax_histogram", "oracle_label_histogram"),
    )
    distance: str = hyper(
        "js",
        "d_nm; js is at most log 2, which β = 10 needs; perplexity: of texts",
        choices=("kl_nm", "kl_mn", "sym_kl", "js", "l2", "cosine", "perplexity"),
    )
    include_self: bool = hyper(True, "whether client n is in its own mixture")
    top_k: int | None = hyper(None, "keep only the k nearest clients; null: all", low=1)
    min_weight: float = hyper(0.0, "weights below this are dropped and the rest renormalised", low=0, high=1)
    fuse_space: str = hyper("logit", "what is mixed: probabilities or logits", choices=("prob", "logit"))
    k: int = hyper(16, "of texts: likeliest tokens of a place that travel", low=1)
    finetune_loss: str = hyper("kl", "loss of step (d)", choices=("kl", "ce_soft", "kl+ce_hard"))
    kd_temperature: float = hyper(1.0, "T of step (d)", above=0)
    finetune_epochs: int = hyper(20, "epochs of step (d)", low=0)
    finetune_batch: int = hyper(64, "batch size of step (d)", low=1)


INERT = 0.9  # self-weight from which a mixture is a client's own soft labels, which teach it nothing


def distances(p: Tensor, kind: str) -> Tensor:
    """d_nm between estimated class distributions.

    Parameters
    ----------
    p : Tensor
        EPDs, one a row (N × C); zeros are allowed.
    kind : str
        One of `KnFuHyper.distance`'s choices.

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


def fusion_weights(p: Tensor, h: KnFuHyper, taught: Tensor | None = None, worth: Tensor | None = None) -> Tensor:
    """w_nm = softmax_m(−β·d_nm), with the paper's open choices applied.

    Parameters
    ----------
    p : Tensor
        EPDs (N × C).
    h : KnFuHyper
    taught : Tensor, optional
        Which clients have examples (N) bool; the others get a mixture and are in nobody's. Default: all.
    worth : Tensor, optional
        What each client's share counts for (N), by its staleness; multiplies w_nm before it is normalised.

    Returns
    -------
    Tensor
        N × N, row n is client n's mixture; rows sum to 1.
    """
    return of_distances(distances(p, h.distance), h, taught, worth)


def of_distances(d: Tensor, h: KnFuHyper, taught: Tensor | None = None, worth: Tensor | None = None) -> Tensor:
    """The weights (N × N) of given distances d_nm; the rest as of `fusion_weights`."""
    n = len(d)
    left_out = torch.zeros(n, n, dtype=torch.bool) if taught is None else ~taught.expand(n, n)
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


def estimate(soft: Tensor, h: KnFuHyper) -> Tensor:
    """EPDs p_n (N × C) from soft labels F (N × T_s × C)."""
    if h.epd_source == "argmax_histogram":
        return F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft).mean(1)
    return soft.mean(1)


class KnFuClient(FusionClient):
    """Trains alone, then fine-tunes on its own fused soft labels."""

    personal = True

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Step (d): distil F̄_n on D_t."""
        h: KnFuHyper = self.hyper
        item = knowledge["soft_labels"]
        if h.distance == "perplexity":
            self._read(item)
            return
        x, y = self.workspace.transfer(self.subset(None, item.version))
        if h.neighbours == "classroom":
            taught = {name: v.to(self.workspace.device) for name, v in item.arrays.items()}
            rule = mentors.objective(taught, self.loss)
            self.distil(rule, x, y, epochs=h.finetune_epochs, batch_size=h.finetune_batch)
            return
        loss = self.loss("soft_ce" if h.finetune_loss == "ce_soft" else "kl", temperature=h.kd_temperature)
        soft = loss.towards(item.arrays["p"].to(self.workspace.device))

        def distil(logits: Tensor, y: Tensor | None, rows: Tensor) -> Tensor:
            value = soft(logits, y, rows)
            if h.finetune_loss == "kl+ce_hard" and y is not None:
                value = value + F.cross_entropy(logits, y)
            return value

        self.distil(distil, x, y, epochs=h.finetune_epochs, batch_size=h.finetune_batch)

    def _read(self, item: Item) -> None:
        """Step (d) on texts."""
        h, texts, rows = self.hyper, self.workspace.texts, self.subset(None, item.version)
        places = texts.places(self.architecture, rows)
        loss = self.loss("soft_ce" if h.finetune_loss == "ce_soft" else "kl", temperature=h.kd_temperature)
        everywhere = torch.ones(len(rows), dtype=torch.bool, device=places.x.device)
        hard = float(h.finetune_loss == "kl+ce_hard")
        step = public_text.lesson(places, item.arrays, everywhere, texts.pieces(self.architecture), loss, hard, 1.0)
        self.distil(step, places.x, None, epochs=h.finetune_epochs, batch_size=h.finetune_batch)

    def share(self) -> Records:
        """Step (b): F_n on D_t, as probabilities or logits; with the oracle EPD also the true label histogram."""
        if self.hyper.distance == "perplexity":
            places = self.workspace.texts.places(self.architecture, self.subset(None))
            return {"soft_labels": public_text.said(places, self.predict(places.x), self.hyper.k)}
        logits = self.predict(self.transfer[self.subset(None)])
        out = {"soft_labels": {"p": logits if self.hyper.fuse_space == "logit" else logits.softmax(1)}}
        if self.hyper.epd_source == "oracle_label_histogram":
            count = torch.bincount(self.y, minlength=self.classes).float()
            out["soft_labels"]["histogram"] = count / count.sum().clamp_min(1)
        return out


def shared_arrays(scope: Scope) -> Layout:
    """Layout of what a client shares: T_s × C, and its label histogram if the oracle EPD asks for it; texts: tokens."""
    if scope.hyper.distance == "perplexity":
        return public_text.said_arrays(scope)
    layout = arrays(p=("subset", "classes"))(scope)
    if scope.hyper.epd_source == "oracle_label_histogram":
        layout |= arrays(histogram=("classes",))(scope)
    return layout


def fused_arrays(scope: Scope) -> Layout:
    """Layout of what a client gets: its mixture, T_s × C (of texts: likeliest tokens), or its mentors' soft labels."""
    if scope.hyper.neighbours == "classroom":
        return mentors.lessons(scope)
    if scope.hyper.distance == "perplexity":
        return {name: array for name, array in public_text.said_arrays(scope).items() if name != "bits"}
    return arrays(p=("subset", "classes"))(scope)


@strategy(
    "knfu",
    client=KnFuClient,
    hyper=KnFuHyper,
    paper="Seyedmohammadi et al. 2024, arXiv 2403.11892 (reconstruction)",
)
class KnFu(FusionStrategy):
    """Personal mixtures of soft labels, weighted by similarity of estimated class distributions (reconstruction)."""

    topics = {"soft_labels": Topic("lesson", fused_arrays)}
    records = {"soft_labels": shared_arrays}
    transfer = "both"  # the server looks at texts, to align them, and at labels, to rank mentors
    aligns = True
    distils = whole = True
    staleness = "newest"

    def __init__(self, hyper: KnFuHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        texts = self.scenario.data.dataset.next_token
        if hyper.neighbours == "classroom":
            labelled, idle = self.scenario.config.transfer.labelled, ("beta", "epd_source", "distance", "include_self")
            mentors.check(hyper, labelled, *idle, "top_k", "min_weight", "finetune_loss", "kd_temperature")
        if hyper.finetune_loss == "kl+ce_hard" and not self.scenario.config.transfer.labelled and not texts:
            raise UserError("strategy.finetune_loss=kl+ce_hard needs labels: set transfer.labelled=true")
        if texts != (hyper.distance == "perplexity"):
            allowed = "of texts only perplexity says anything" if texts else "perplexity is of texts"
            raise UserError(f"strategy.distance={hyper.distance}: {allowed}")
        for name, needed in (("fuse_space", "prob"), ("epd_source", "mean_soft")):
            if texts and getattr(hyper, name) != needed:
                raise UserError(f"strategy.{name}={getattr(hyper, name)}: of texts allowed is {needed}")

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Soft labels are distributions (logits may be anything finite)."""
        if scope.hyper.distance == "perplexity":
            public_text.examine("soft_labels", records["soft_labels"], scope.dims["vocabulary"])
        elif scope.hyper.fuse_space == "prob":
            distributions("soft_labels/p", records["soft_labels"]["p"])

    def fuse(self, shares: Shares) -> None:
        """Step (c): EPDs, weights, and one mixture for each participant."""
        everyone = list(shares)
        if self.hyper.distance == "perplexity":
            self._fuse_texts(everyone)
            return
        knowledge = torch.stack([s.records["soft_labels"]["p"] for s in everyone])  # F: N × T_s × C
        soft = knowledge.softmax(-1) if self.hyper.fuse_space == "logit" else knowledge
        taught = torch.tensor([s.examples > 0 for s in everyone])
        if not bool(taught.any()):
            return
        worth = torch.tensor([s.weight for s in everyone], dtype=torch.float64)
        clients = [s.client for s in everyone]
        if self.hyper.neighbours == "classroom":
            self._rank(clients, soft.double(), knowledge.double(), taught, worth)
            return
        if self.hyper.epd_source == "oracle_label_histogram":
            p = torch.stack([s.records["soft_labels"]["histogram"] for s in everyone])
        else:
            p = estimate(soft, self.hyper)
        w = fusion_weights(p.double(), self.hyper, taught, worth)
        self.log_matrix("similarity", clients, w)
        self._say(clients, w)
        fused = torch.einsum("nm,mtc->ntc", w, knowledge.double())
        if self.hyper.fuse_space == "logit":
            fused = fused.softmax(-1)
        for client, labels in zip(clients, fused.float(), strict=True):
            self.publish("soft_labels", {"p": labels}, to=client)

    def _rank(self, clients: list[int], soft: Tensor, sent: Tensor, taught: Tensor, worth: Tensor) -> None:
        """Let those who know the transfer rows no worse teach each participant."""
        labels = self.workspace.tensors("transfer")[1].cpu()[transfer_rows(self.scenario, None, self.round)]
        w = mentors.standing(sent if self.hyper.fuse_space == "logit" else sent.log(), labels, worth)
        self.log_matrix("similarity", clients, mentors.mentors(w, taught) * w)
        for n, client in enumerate(clients):
            self.publish("soft_labels", mentors.lesson(n, soft, w, taught), to=client)

    def _fuse_texts(self, everyone: list[Share]) -> None:
        """Step (c) of texts: weights by what each model makes of each row, mixtures in each client's own tokens."""
        h, texts, names = self.hyper, self.workspace.texts, self.scenario.architectures
        taught = torch.tensor([s.examples > 0 for s in everyone])
        if not bool(taught.any()):
            return
        rows = transfer_rows(self.scenario, None, self.round)
        sizes = texts.places(names[everyone[0].client], rows).ends.amax(1).cpu()
        bits = torch.stack([s.records["soft_labels"]["bits"].double().cpu() for s in everyone])
        worth = torch.tensor([s.weight for s in everyone], dtype=torch.float64)
        ce = public_text.nats(bits, sizes)
        by_row = [of_distances(d.expand(len(d), -1), h, taught, worth) for d in ce.T]
        w = torch.stack(by_row, 2)  # N × N × T_s
        clients = [s.client for s in everyone]
        self.log_matrix("similarity", clients, w.mean(2))
        self._say(clients, w.mean(2))
        said = [public_text.Said(names[s.client], s.records["soft_labels"]) for s in everyone]
        mixtures = public_text.mixtures(texts, said, w, rows, h.k)
        for client, mixture in zip(clients, mixtures, strict=True):
            self.publish("soft_labels", mixture, to=client)

    def _say(self, clients: list[int], w: Tensor) -> None:
        """Log how much of its mixture each client keeps for itself, and how many clients it amounts to, 1/Σ_m w_nm²."""
        own, neighbours = w.diagonal(), 1 / w.square().sum(1)
        for name, values in (("weight/self", own), ("weight/neighbours", neighbours)):
            for client, value in zip(clients, values.tolist(), strict=True):
                self.log(name, value, client, scope="client")
            self.log(name, float(values.mean()))
        self.state["weights"] = {"self": float(own.mean()), "neighbours": float(neighbours.mean())}

    def notes(self) -> list[str]:
        """Whether fusion did anything."""
        last = self.state.get("weights")
        if last is None or last["self"] < INERT or self.scenario.cohort_size == 1:
            return []
        return [
            f"knfu: fusion did next to nothing: in the last round clients kept {last['self']:.3f} of their mixtures "
            f"for themselves ({last['neighbours']:.2f} effective neighbours); a lower strategy.beta, or a bounded "
            f"strategy.distance as js, lets the others in"
        ]
