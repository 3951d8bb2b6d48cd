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

Another rule may take the place of (c) (`fedfuse.families.neighbours`): `neighbours=classroom`, mentors ranked on the
transfer set's labels; or, of texts, where a class distribution says little, `distance=perplexity fuse_space=prob`:
d_nm(x) = CE_m(x) of each row, PackLLM's weights.

Travels: T_s·C·B_f bytes each way, a client and round; down it is unicast. Texts: T_s·(P·k·(4 + B_id) + 4) up. β = 0 is
uniform averaging, β → ∞ self-distillation. Step (d) happens at the start of the client's next round or evaluation. The
EPD tells the server each client's approximate class prior, and is only as good as the transfer set is class-balanced.
Architectures may differ.
"""

from __future__ import annotations

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
    Shares,
    Topic,
    UserError,
    Workspace,
    arrays,
    distributions,
    hyper,
    neighbours,
    public_text,
    strategy,
    transfer_rows,
    without_effect,
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
    finetune_loss: str = hyper(
        "kl", "loss of step (d)", choices=("kl", "ce_soft", "kl+ce_hard"), only="finetune_epochs"
    )
    kd_temperature: float = hyper(1.0, "T of step (d)", above=0, only="finetune_epochs")
    finetune_epochs: int = hyper(20, "epochs of step (d)", low=0, effort="epochs")
    finetune_batch: int = hyper(64, "batch size of step (d)", low=1, only="finetune_epochs", effort="batch_size")


# what mixes soft labels, and says nothing where mentors teach
MIXING = "beta", "epd_source", "distance", "include_self", "top_k", "min_weight", "finetune_loss", "kd_temperature"


def estimate(soft: Tensor, h: KnFuHyper) -> Tensor:
    """EPDs p_n (N × C) from soft labels F (N × T_s × C)."""
    if h.epd_source == "argmax_histogram":
        return F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft).mean(1)
    return soft.mean(1)


def another(h: KnFuHyper) -> neighbours.Rule | None:
    """The rule in the place of EPDs and their mixtures, if one is asked for."""
    word = "perplexity" if (h.neighbours, h.distance) == ("epd", "perplexity") else h.neighbours
    return neighbours.rule(word, softened=None if h.fuse_space == "logit" else 1.0)


class KnFuClient(FusionClient):
    """Trains alone, then fine-tunes on its own fused soft labels."""

    personal = True

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Step (d): distil F̄_n on D_t."""
        h, item, rule = self.hyper, knowledge["soft_labels"], another(self.hyper)
        rows = self.subset(None, item.version)
        step, x, y = rule.lesson(self, item, rows) if rule else self.lesson(item, rows)
        self.distil(step, x, y, epochs=h.finetune_epochs, batch_size=h.finetune_batch)

    def lesson(self, item: Item, rows: Tensor) -> tuple[neighbours.Step, Tensor, Tensor | None]:
        """T²·KL(F̄_n ‖ softmax z_n), or what `finetune_loss` says, with inputs and labels."""
        h, (x, y) = self.hyper, self.workspace.transfer(rows)
        loss = self.loss("soft_ce" if h.finetune_loss == "ce_soft" else "kl", temperature=h.kd_temperature)
        soft = loss.towards(item.arrays["p"].to(self.workspace.device))

        def beside_labels(logits: Tensor, y: Tensor | None, rows: Tensor) -> Tensor:
            value = soft(logits, y, rows)
            return value if y is None else value + F.cross_entropy(logits, y)

        return beside_labels if h.finetune_loss == "kl+ce_hard" else soft, x, y

    def share(self) -> Records:
        """Step (b): F_n on D_t, as probabilities or logits; with the oracle EPD also the true label histogram."""
        rows = self.subset(None)
        if self.hyper.distance == "perplexity":
            places = self.workspace.texts.places(self.architecture, rows)
            return {"soft_labels": public_text.said(places, self.predict(places.x), self.hyper.k)}
        logits = self.predict(self.workspace.transfer(rows)[0])
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
    """Layout of what a client gets: its mixture, T_s × C, or what another rule teaches."""
    rule = another(scope.hyper)
    return rule.taught(scope) if rule else arrays(p=("subset", "classes"))(scope)


@strategy(
    "knfu", client=KnFuClient, hyper=KnFuHyper, paper="Seyedmohammadi et al. 2024, arXiv 2403.11892 (reconstruction)"
)
class KnFu(FusionStrategy):
    """Personal mixtures of soft labels, weighted by similarity of estimated class distributions (reconstruction)."""

    topics = {"soft_labels": Topic("lesson", fused_arrays)}
    records = {"soft_labels": shared_arrays}
    transfer = "both"  # the server looks at texts, to align them, and at labels, to rank mentors
    aligns = True
    distils = whole = True
    staleness = "newest"

    @property
    def uncovered(self) -> str:  # type: ignore[override]
        """The histogram of their labels."""
        return (
            "looks at private examples outside of training" if self.hyper.epd_source == "oracle_label_histogram" else ""
        )

    def __init__(self, hyper: KnFuHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        texts = self.scenario.data.dataset.next_token
        if rule := another(hyper):
            rule.check(self, *(MIXING if hyper.neighbours == "classroom" else ()))
        if hyper.finetune_loss == "kl+ce_hard" and not self.scenario.config.transfer.labelled and not texts:
            raise UserError("strategy.finetune_loss=kl+ce_hard needs labels: set transfer.labelled=true")
        if not texts:
            without_effect(hyper, "k", "where data are no texts: whole class distributions travel")
        if hyper.beta == 0 and hyper.top_k is None and rule is None:
            for key in ("epd_source", "distance"):
                without_effect(hyper, key, "with strategy.beta=0, where all weigh alike")
        if texts and hyper.distance != "perplexity":
            raise UserError(f"strategy.distance={hyper.distance}: of texts only perplexity says anything")
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
        told = records["soft_labels"].get("histogram")
        if told is not None and bool((told != 0).any()):  # all zeros: a client without examples
            distributions("soft_labels/histogram", told[None])

    def fuse(self, shares: Shares) -> None:
        """Step (c): EPDs, weights, and one mixture for each participant."""
        everyone, h = list(shares), self.hyper
        clients, able, worth = neighbours.who(everyone)
        if not bool(able.any()):
            return
        if rule := another(h):
            rule.fuse(self, everyone, transfer_rows(self.scenario, None, self.round))
            return
        z = torch.stack([s.records["soft_labels"]["p"] for s in everyone])  # N × T_s × C, or probabilities
        if h.epd_source == "oracle_label_histogram":
            p = torch.stack([s.records["soft_labels"]["histogram"] for s in everyone])
        else:
            p = estimate(z.softmax(-1) if h.fuse_space == "logit" else z, h)
        w = neighbours.weights(neighbours.distances(p.double(), h.distance), h, able, worth)
        neighbours.log_mixtures(self, clients, w)
        fused = torch.einsum("nm,mtc->ntc", w, z.double())
        if h.fuse_space == "logit":
            fused = fused.softmax(-1)
        for client, labels in zip(clients, fused.float(), strict=True):
            self.publish("soft_labels", {"p": labels}, to=client)

    def notes(self) -> list[str]:
        """Whether fusion did anything."""
        advice = "a lower strategy.beta, or a bounded strategy.distance as js, lets the others in"
        return neighbours.inert(self, advice)
