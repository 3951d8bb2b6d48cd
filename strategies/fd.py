"""FD, federated distillation: clients exchange one mean output per label, no model and no public data.

Box (Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated Distillation and Augmentation under
Non-IID Private Data", 2018, arXiv 1811.11479). The paper's "logit vector" is the softmax-normalised output. In round t:

    client i:  min CE(F(w, x), y) + γ·CE(F(w, x), F̂_y^(i)); adds each training sample's output to its label's sum as it
               trains and sends the per-label means F̄_ℓ^(i)                                              (C × C)
    server:    F̂_ℓ^(i) = (Σ_j F̄_ℓ^(j) − F̄_ℓ^(i)) / (M_ℓ − 1), over the M_ℓ clients that hold label ℓ      (C × C)

Travels: C²·B_f + C bytes each way, a client and round (the C bytes say which labels are held); down it is unicast.
What the paper leaves open, and the reading here: labels missing at a client (a label's divisor counts its holders; a
label that no other client holds is not distilled), γ (1), a client that was absent (it gets the mean over all holders).
Fields for other choices: `leave_one_out=false` and `space=logit` average raw outputs over all holders, as PFLlib and
HtFLlib do; they feed those raw logits to cross-entropy as if they were probabilities, here they are softened first.
Architectures may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse import (
    Arrays,
    FusionClient,
    FusionStrategy,
    InvalidArrays,
    Item,
    Metrics,
    Records,
    Scope,
    Shares,
    Topic,
    arrays,
    distributions,
    hyper,
    strategy,
)


@dataclass(frozen=True)
class FDHyper:
    """Hyper-parameters of FD."""

    gamma: float = hyper(1.0, "γ, weight of the distillation term (λ in ports; the paper gives no value)", low=0)
    leave_one_out: bool = hyper(True, "a client's own outputs stay out of its targets (paper; ports: false)")
    space: str = hyper("prob", "what is averaged (paper: softmax outputs; ports: logits)", choices=("prob", "logit"))
    collect: str = hyper(
        "training", "outputs of the training passes (paper), or of one pass afterwards", choices=("training", "after")
    )


def label_means(outputs: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum of outputs per label (C × C) and examples per label (C), in float64."""
    member = F.one_hot(y, classes).double()  # a product, not index_add: the same bits on a GPU as well
    return member.T @ outputs.double(), member.sum(0)


def targets(means: Tensor, held: Tensor, leave_one_out: bool = True) -> tuple[Tensor, Tensor]:
    """F̂ of every client, from all clients' per-label means.

    Parameters
    ----------
    means : Tensor
        F̄ (N × C × C); rows of labels that a client does not hold are ignored.
    held : Tensor
        N × C, whether client i holds label ℓ.
    leave_one_out : bool

    Returns
    -------
    tuple of Tensor
        F̂ (N × C × C) in float64, and whether there is a target for (i, ℓ) (N × C); rows without one are 0.
    """
    own = held.double()
    means = means.double() * own[..., None]
    total, holders = means.sum(0, keepdim=True), own.sum(0, keepdim=True)
    if leave_one_out:
        total, holders = total - means, holders - own
    total, holders = total.expand_as(means), holders.expand_as(own)
    known = holders > 0
    return torch.where(known[..., None], total / holders.clamp_min(1)[..., None], 0.0), known


class FDClient(FusionClient):
    """Keeps its own model; pulls each example's output towards what the others give for its label."""

    personal = True
    known: Arrays | None = None

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Hold F̂ ready for `fit`."""
        self.known = {k: v.to(self.workspace.device) for k, v in knowledge["labels"].arrays.items()}

    def fit(self) -> Metrics:
        """CE(F, y) + γ·CE(F, F̂_y), collecting outputs per label on the way."""
        h: FDHyper = self.hyper
        soft, known = self.loss("soft_ce"), self.known
        self.total, self.count = label_means(self.x.new_zeros(0, self.classes), self.y[:0], self.classes)

        def step(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            if h.collect == "training":
                self._collect(logits.detach(), y)
            value = F.cross_entropy(logits, y)
            if known is None or h.gamma == 0:
                return value
            there = known["held"][y].bool()
            if not bool(there.any()):
                return value
            compare = soft if h.space == "logit" else soft.from_probabilities  # logits are softened by the loss
            distilled = compare(logits[there], known["p"][y[there]], y[there])
            return value + h.gamma * distilled * (there.sum() / len(y))

        metrics = self.train(step)
        if h.collect == "after" or metrics["steps"] == 0:
            self._collect(self.predict(self.x), self.y)
        return metrics

    def _collect(self, logits: Tensor, y: Tensor) -> None:
        outputs = logits.double() if self.hyper.space == "logit" else logits.double().softmax(1)
        total, count = label_means(outputs, y, self.classes)
        self.total += total
        self.count += count

    def share(self) -> Records:
        """F̄ and the labels it has a row for."""
        means = self.total / self.count.clamp_min(1)[:, None]
        return {"labels": {"p": means.float(), "held": (self.count > 0).to(torch.uint8)}}


@strategy("fd", client=FDClient, hyper=FDHyper, paper="Jeong et al. 2018, arXiv 1811.11479")
class FD(FusionStrategy):
    """Per-label mean outputs, to each client those of the others (leave-one-out)."""

    topics = {"labels": Topic("state", arrays(p=("classes", "classes"), held=("uint8", "classes")))}
    of_classes = True
    records = {"labels": arrays(p=("classes", "classes"), held=("uint8", "classes"))}
    discloses = ("label sets",)

    @property
    def of_logits(self) -> bool:  # type: ignore[override]
        """Whether raw outputs are averaged."""
        return self.hyper.space == "logit"

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Rows of held labels are distributions, the others are 0."""
        for name, content in records.items():
            held = content["held"].bool()
            if bool((content["held"] > 1).any()) or bool(content["p"][~held].any()):
                raise InvalidArrays(f"{name}: rows and the labels said to be held do not fit together")
            if scope.hyper.space == "prob":
                distributions(name, content["p"][held])

    def fuse(self, shares: Shares) -> None:
        """F̂ for everyone; whoever was absent is in no mean, so it gets the mean over all holders."""
        everyone = {share.client: share.records["labels"] for share in shares}
        nothing = {"p": torch.zeros(self.classes, self.classes), "held": torch.zeros(self.classes)}
        whole = [everyone.get(client, nothing) for client in range(self.scenario.clients)]
        means, held = torch.stack([w["p"] for w in whole]), torch.stack([w["held"].bool() for w in whole])
        fused, known = targets(means, held, self.hyper.leave_one_out)
        for client, (p, there) in enumerate(zip(fused.float(), known, strict=True)):
            self.publish("labels", {"p": p, "held": there.to(torch.uint8)}, to=client)
