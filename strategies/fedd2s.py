"""FedD2S: layers of local models meet as class distributions without any data, and leave from deep to shallow.

A reconstruction. Confirmed from the paper (Atapour et al., "FedD2S: Personalized Data-Free Federated Knowledge
Distillation", 2024, arXiv 2402.10846): no public data; knowledge goes from clients to server and back in each round;
head models turn what a layer gives into soft labels; both ways are KL plus cross-entropy; deep layers stop taking part
as rounds pass. Not known: every equation, the heads, what exactly goes up, the dropping schedule, all values: ours. So
a result is "FedD2S-style", never the paper's. With layers 1…L from shallow to deep, h_l(x) what layer l gives
(rectified, an image's averaged over its places; h_L the logits), D_nc client n's examples of class c, in round t ≥ 0:

    A_t = {1, …, max(1, L − ⌊t/τ⌋)}                             A_{t+1} ⊆ A_t, the deepest active one leaves first
    client n:  min CE(f(x), y) + Σ_{l∈A_t} [CE(head_l(sg h_l), y) + μ·KL(q_l[y] ‖ head_l(h_l))]
    client n:  for l ∈ A_t, h̄_nlc = mean of h_l over D_nc, s_nlc = mean of softmax head_l(h_l) over D_nc, |D_nc|; sent
    server:    g_l: min over pairs (n, c) held of CE(g_l(h̄_nlc), c) + λ·KL(s̄_lc ‖ g_l(h̄_nlc))
               s̄_lc, q_l[c] = means of s_nlc, of softmax g_l(h̄_nlc), over n by |D_nc|;  q_l sent, l ∈ A_t

sg stops the gradient: heads read a layer without shaping it, so that the federation moves weights by KL alone, and a
layer deeper than all of A_t gets nothing from it. head_l is linear and the client's own, head_L the identity; g_l is
linear and the server's, kept from round to round. Travels, a client and round: up C·Σ_{l∈A_t}(d_l + C)·B_f + 8·C
bytes, down |A_t|·C²·B_f + C: means over a class, never a single example's features, and still a mean over one example
where a class has one. A class nobody holds keeps its last q. There is no server model. One architecture, whose layers
can be put in order (`parts.layers`): else a `UserError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    classwise,
    distributions,
    hyper,
    parts,
    strategy,
    training,
)


@dataclass(frozen=True)
class FedD2SHyper:
    """Hyper-parameters of FedD2S; all are open choices of the paper."""

    tau: int = hyper(3, "τ, rounds after which the deepest active layer leaves the federation", low=1)
    mu: float = hyper(1.0, "μ, weight of the divergence from q at the client", low=0)
    lam: float = hyper(
        1.0, "λ, weight of the divergence from the clients' soft labels at the server", low=0, only="head_epochs"
    )
    temperature: float = hyper(1.0, "T of both divergences", above=0, only="mu or lam with head_epochs")
    head_epochs: int = hyper(20, "epochs of g on the pairs (n, c) a round", low=0, effort="epochs")
    head_batch: int = hyper(32, "pairs a step", low=1, only="head_epochs", effort="batch_size")
    head_lr: float = hyper(0.05, "rate of g, with the optimiser of train.*", above=0, only="head_epochs", effort="lr")


def active(depth: int, round: int, tau: int) -> int:
    """|A_t| of `depth` layers in round t + 1: A_t are the so many shallowest."""
    return max(1, depth - (round - 1) // tau)


def representation(out: Tensor) -> Tensor:
    """h_l (B × d_l): rectified, and the mean over an image's places."""
    return F.relu(out).flatten(2).mean(2) if out.ndim > 2 else F.relu(out)


def followed(model: Any, count: int, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """h_1 … h_count and the logits of a batch; the deepest layer's are the logits."""
    found: list[Tensor] = []
    names = list(model.depths)

    def keep(module: nn.Module, given: Any, out: Tensor) -> None:
        found.append(representation(out))

    hooks = [model.get_submodule(name).register_forward_hook(keep) for name in names[: min(count, len(names) - 1)]]
    try:
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return ([*found, logits] if count == len(names) else found), logits


class SideBySide(nn.Module):
    """h_1 … h_count of a network as one row (B × Σ d_l)."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model, self.count = model, count

    def forward(self, x: Tensor) -> Tensor:
        """The row."""
        return torch.cat(followed(self.model, self.count, x)[0], 1)


def federated(heads: Sequence[Callable[[Tensor], Tensor]], given: Sequence[Tensor], y: Tensor, q: Tensor, held: Tensor,
              distance: Any) -> Tensor:  # fmt: skip
    """Σ_l KL(q_l[y] ‖ head_l(h_l)) over examples of a class that has a q; the mean over the whole batch."""
    there = held[y]
    value = given[0].new_zeros(())
    if bool(there.any()):
        for head, h, soft in zip(heads, given, q, strict=False):
            value = value + distance.from_probabilities(head(h[there]), soft[y[there]], y[there])
    return value * there.to(value).mean()


class FedD2SClient(FusionClient):
    """Keeps its model and the heads of its layers; learns its active layers' class distributions from the others."""

    personal = True
    known: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Put the layers in order and give each but the last a linear head.

        Raises
        ------
        UserError
            Where they cannot be ordered.
        """
        depths = parts.layers(model)
        classes = int(model(torch.zeros(2, *cast(Any, model).input_shape)).shape[1])
        with parts.seeded_by(model, "layer heads"):
            heads = nn.ModuleList(nn.Linear(width, classes) for width in list(depths.values())[:-1])
        model.depths, model.layer_heads = depths, heads  # type: ignore[assignment]
        return model

    @property
    def _active(self) -> int:
        return active(len(cast(Any, self.model).depths), self.round, self.hyper.tau)

    @property
    def _heads(self) -> list[Callable[[Tensor], Tensor]]:
        return [*cast(Any, self.model).layer_heads, lambda logits: logits]

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Hold q ready for `fit`."""
        item = knowledge["labels"].arrays
        self.known = (item["q"].to(self.workspace.device), item["held"].to(self.workspace.device))

    def fit(self) -> Metrics:
        """CE, the active layers' heads, and μ·KL to q."""
        count, known, heads = self._active, self.known, self._heads
        distance = self.loss("kl", temperature=self.hyper.temperature)

        def loss(out: tuple[list[Tensor], Tensor], y: Tensor, _: Tensor) -> Tensor:
            given, logits = out
            value = F.cross_entropy(logits, y)
            for head, h in zip(heads[:-1], given, strict=False):
                value = value + F.cross_entropy(head(h.detach()), y)
            if known is not None and self.hyper.mu:
                value = value + self.hyper.mu * federated(heads, given, y, *known, distance)
            return value

        return self.train(loss, forward=lambda x: followed(self.model, count, x))

    def share(self) -> Records:
        """h̄, s and |D_nc|, side by side from shallow to deep."""
        given = self._given(self.x)
        with torch.no_grad():
            soft = [head(h).softmax(1) for head, h in zip(self._heads, given, strict=False)]
        means = [classwise.class_means(h, self.y, self.classes) for h in given]
        spoken = [classwise.class_means(p, self.y, self.classes)[0] for p in soft]
        h, p = torch.cat([mean for mean, _ in means], 1), torch.stack(spoken)
        return {"layers": {"h": h, "p": p, "counts": means[0][1]}}

    def _given(self, x: Tensor) -> tuple[Tensor, ...]:
        side_by_side = SideBySide(self.model, self._active)
        h = training.predict(side_by_side, x, self.scenario.config.evaluate.batch_size)
        return h.split(list(cast(Any, self.model).depths.values())[: self._active], 1)


def uploaded(scope: Scope) -> Layout:
    """At most all layers' class means, side by side, and soft labels; the round says how many."""
    depths, classes = scope.module.depths, scope.dims["classes"]
    widths, count = sum(depths.values()), len(depths)
    soft = (-count, classes, classes)
    return {"h": ("float32", (classes, -widths)), "p": ("float32", soft), "counts": ("int64", (classes,))}


def told(scope: Scope) -> Layout:
    """q of at most all layers, and which classes have one."""
    classes = scope.dims["classes"]
    soft = (-len(scope.module.depths), classes, classes)
    return {"q": ("float32", soft), "held": ("bool", (classes,))}


@strategy(
    "fedd2s",
    client=FedD2SClient,
    hyper=FedD2SHyper,
    paper="Atapour et al. 2024, arXiv 2402.10846 (reconstruction)",
)
class FedD2S(FusionStrategy):
    """Data-free distillation layer by layer, deep layers leaving first."""

    topics = {"labels": Topic("state", told)}
    records = {"layers": uploaded}
    heterogeneous = False
    distils = True
    discloses = ("class counts",)

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Counts are counts, soft labels of classes that are there are distributions, and shapes fit each other."""
        layers = records["layers"]
        widths = list(scope.module.depths.values())
        classwise.check_counts("layers/counts", layers["counts"], scope.dims["examples"])
        count, wide = len(layers["p"]), layers["h"].shape[1]
        if wide != sum(widths[:count]):
            raise InvalidArrays(f"layers/h: {wide} columns for {count} layers, expected {sum(widths[:count])}")
        distributions("layers/p", layers["p"][:, layers["counts"] > 0])

    def fuse(self, shares: Shares) -> None:
        """Teach each active layer's g on the clients' class means, and publish what it makes of each class."""
        widths = list(cast(Any, self.workspace.model(self.architecture)).depths.values())
        count = active(len(widths), self.round, self.hyper.tau)
        found = []
        for share in shares:
            if len(share.records["layers"]["p"]) == count:
                found.append(share.records["layers"])
            else:
                self.exclude(share, f"layers/p: {len(share.records['layers']['p'])} layers, expected {count}")
        if not found:
            return
        counts = torch.stack([one["counts"] for one in found])
        held, heads = counts.sum(0) > 0, self.state.get("heads", {})
        q = [
            self._taught(str(layer), heads, h, torch.stack([one["p"][layer] for one in found]), counts)
            for layer, h in enumerate(torch.stack([one["h"] for one in found]).split(widths[:count], 2))
        ]
        self.state["heads"] = heads
        fresh = torch.stack(q)
        if ("labels", "") in self.board.items:
            old = self.published("labels")
            fresh = torch.where(held[:, None], fresh, old["q"][:count])
            held = held | old["held"]
        self.publish("labels", {"q": fresh, "held": held})

    def _taught(self, layer: str, heads: dict[str, Any], h: Tensor, p: Tensor, counts: Tensor) -> Tensor:
        """q_l (C × C), and g_l a round further."""
        settings, device = self.hyper, self.workspace.device
        g = nn.utils.skip_init(nn.Linear, h.shape[2], self.classes)
        if layer in heads:
            g.load_state_dict(heads[layer])
        else:
            g.load_state_dict({name: torch.zeros_like(value) for name, value in g.state_dict().items()})
        g.to(device)
        there = counts > 0
        x, y = h[there].to(device), there.nonzero()[:, 1].to(device)
        teacher = classwise.mean_over_holders(p, counts)[0].float().to(device)
        distance = self.loss("kl", temperature=settings.temperature)

        def loss(z: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
            return F.cross_entropy(z, labels) + settings.lam * distance.from_probabilities(z, teacher[labels], labels)

        heads[layer] = self.distil(g, x, y, loss, purpose=f"head {layer}", epochs=settings.head_epochs,
                                   batch_size=settings.head_batch, lr=settings.head_lr)  # fmt: skip
        with torch.no_grad():
            soft = g(h.to(device)).softmax(2).cpu()
        return classwise.mean_over_holders(soft, counts)[0].float()

    def notes(self) -> list[str]:
        """What kind of result it is."""
        return ["FedD2S-style: a reconstruction, whose equations, heads and schedule are ours and not the paper's"]
