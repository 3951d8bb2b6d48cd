"""FedGen: the server learns a generator of features from the clients' heads; clients train on its samples.

Box (Zhu, Hong and Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", ICML 2021,
arXiv 2105.10056). With f the body (`features`), g the head, n_kc client k's examples of class c, in round t:

    client k:  sends its model and (n_kc)_c
    server:    w ← Σ n_k w_k / Σ n_k;  G: (ε, c) ↦ z learns, on c uniform over the classes held, ε ~ N(0, I),
               min  Σ_k mean_i (n_kc_i / Σ_j n_jc_i) · CE(g_k(z_i), c_i)  +  η · diversity
               diversity = exp(− mean_ij ‖z_i − z_j‖₁/d · ‖ε_i − ε_j‖²/d_ε)
    client k:  min CE + α_t · (B_G/B) · CE(g(G(ε, c')), c')  +  β_t · KL(softmax g(G(ε, y)) ‖ softmax g(f(x)))
               with α_t = α_0 · 0.98^t, β_t = β_0 · 0.98^t and c' uniform over the classes held, B_G samples a step

Travels: P·B_f bytes and C counts of 8 bytes up, (P + P_G)·B_f and C flags down, a client and round. Each client's own
head teaches the generator. Left out: the adversarial term of the paper, 0 in the authors' code. Of that code:
`noise=uniform`; the regularisers act in the first 20 mini-batches of a round (its `early_stop` counts what it calls
epochs, of one mini-batch each); the generator's step size falls by 0.98 a round; α_0 = β_0 = 10 belongs to its local
rate of 0.01 without momentum (at 0.05 and 0.9 the model collapses to chance, so 1 is the default); steps and batch of
the generator (its "50 ensemble epochs" are read as 50 steps). Optimisers start afresh each round. One architecture,
since models are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedfuse import (
    Arrays,
    AveragingStrategy,
    FusionClient,
    Item,
    Layout,
    Metrics,
    Records,
    Scope,
    Shares,
    Sum,
    Topic,
    arrays,
    classwise,
    hyper,
    layout_of,
    model_arrays,
    model_topic,
    seed_of,
    strategy,
)


@dataclass(frozen=True)
class FedGenHyper:
    """Hyper-parameters of FedGen."""

    alpha: float = hyper(1.0, "α_0, weight of the cross-entropy on generated features (code: 10 at lr 0.01)", low=0)
    beta: float = hyper(1.0, "β_0, weight of the divergence from predictions on generated features (as α_0)", low=0)
    decay: float = hyper(0.98, "factor of α and β a round", low=0, high=1, only="alpha or beta")
    diversity: float = hyper(1.0, "η, weight of the diversity term", low=0, only="generator_steps")
    regularised_steps: int | None = hyper(
        20,
        "first mini-batches of a round with regularisers; null: all (code: 20, called epochs there)",
        low=0,
        only="alpha or beta",
    )
    generator_steps: int = hyper(50, "steps of the generator a round", low=0)
    generator_batch: int = hyper(32, "B_G, generated samples a step, at server and clients", low=2)
    generator_lr: float = hyper(3e-4, "Adam's step size for the generator", low=0, only="generator_steps")
    generator_lr_decay: float = hyper(
        0.98, "factor of that step size a round (code: 0.98)", above=0, high=1, only="generator_steps"
    )
    generator_decay: float = hyper(1e-2, "weight decay of the generator", low=0, only="generator_steps")
    hidden: int = hyper(256, "hidden units of the generator", low=1)
    noise_dim: int = hyper(32, "d_ε, size of the noise", low=1)
    noise: str = hyper("gaussian", "ε: N(0, I), or uniform on [0, 1] (code)", choices=("gaussian", "uniform"))


class Generator(nn.Module):
    """G(ε, c): noise and a class to features.

    Parameters
    ----------
    classes, features : int
        C and d.
    h : FedGenHyper
        Its sizes.
    """

    def __init__(self, classes: int, features: int, h: FedGenHyper) -> None:
        super().__init__()
        self.classes, self.uniform, self.noise_dim = classes, h.noise == "uniform", h.noise_dim
        self.body = nn.Sequential(
            nn.Linear(h.noise_dim + classes, h.hidden), nn.BatchNorm1d(h.hidden), nn.ReLU(),
            nn.Linear(h.hidden, features),
        )  # fmt: skip

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Features (B × d)."""
        return self.body(torch.cat([noise, F.one_hot(labels, self.classes).to(noise)], 1))

    def draw(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Noise (n × d_ε)."""
        drawn = torch.rand if self.uniform else torch.randn
        return drawn(n, self.noise_dim, generator=generator).to(device)


def ensemble_loss(logits: list[Tensor], labels: Tensor, counts: Tensor) -> Tensor:
    """Σ_k mean_i (n_kc_i / Σ_j n_jc_i) · CE(logits_k,i, c_i).

    Parameters
    ----------
    logits : list of Tensor
        Of each client's head (B × C).
    labels : Tensor
        c (B); each is held by somebody.
    counts : Tensor
        n_kc (N × C).
    """
    weights = counts.double() / counts.sum(0).clamp_min(1)
    parts = [
        (w[labels].to(z.dtype) * F.cross_entropy(z, labels, reduction="none")).mean()
        for w, z in zip(weights, logits, strict=True)
    ]
    return torch.stack(parts).sum()


def diversity_loss(z: Tensor, noise: Tensor) -> Tensor:
    """exp(− mean_ij ‖z_i − z_j‖₁/d · ‖ε_i − ε_j‖²/d_ε): small where different noise gives different features."""
    far = (z[:, None] - z[None]).abs().mean(2)
    return (-(far * (noise[:, None] - noise[None]).square().mean(2)).mean()).exp()


def draw_labels(held: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Classes uniform over those that are held, (n,) int64."""
    classes = held.nonzero()[:, 0]
    return classes[torch.randint(len(classes), (n,), generator=generator)]


def generator_arrays(scope: Scope) -> Layout:
    """Layout of the generator, and of which classes it has learnt."""
    net = Generator(scope.dims["classes"], scope.dims["features"], scope.hyper)
    return {**layout_of(net.state_dict()), "held": ("bool", (scope.dims["classes"],))}


class FedGenClient(FusionClient):
    """Trains the common model on its data and, through its head, on generated features."""

    taught: tuple[Generator, Tensor] | None = None  # the generator, in evaluation mode, and the classes it knows

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Load the common model and the generator."""
        super().receive(knowledge)
        if "generator" in knowledge:
            values = dict(knowledge["generator"].arrays)
            held = values.pop("held").cpu()
            net = Generator(self.classes, int(cast(Any, self.model).feature_dim), self.hyper).to(self.workspace.device)
            net.load_state_dict(values)
            self.taught = (net.eval().requires_grad_(False), held)

    def fit(self) -> Metrics:
        """CE + α_t · CE on generated features + β_t · divergence from what the head makes of them."""
        h: FedGenHyper = self.hyper
        if self.taught is None or h.alpha == h.beta == 0:
            return self.train()
        (net, held), head = self.taught, cast(Any, self.model).head
        fade, distance, draw = h.decay**self.round, self.loss("kl"), self.generator("features")
        device, left = self.workspace.device, math.inf if h.regularised_steps is None else h.regularised_steps

        def loss(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
            nonlocal left
            value, left = F.cross_entropy(logits, y), left - 1
            if left < 0:
                return value
            wanted = draw_labels(held, h.generator_batch, draw).to(device)
            made = head(net(net.draw(h.generator_batch, draw, device), wanted))
            value = value + h.alpha * fade * h.generator_batch / len(y) * F.cross_entropy(made, wanted)
            with torch.no_grad():
                target = head(net(net.draw(len(y), draw, device), y))
            return value + h.beta * fade * distance(logits, target, y)

        return self.train(loss)

    def share(self) -> Records:
        """The model, and how many examples of each class there are."""
        counts = torch.bincount(self.y, minlength=self.classes)
        return {"model": self.weights(), "counts": {"counts": counts}}


@strategy("fedgen", client=FedGenClient, hyper=FedGenHyper, paper="Zhu et al. 2021, arXiv 2105.10056")
class FedGen(AveragingStrategy):
    """FedAvg with a server-side generator of features, taught by the clients' heads."""

    topics = {"model": model_topic(), "generator": Topic("state", generator_arrays)}
    records = {"model": model_arrays, "counts": arrays(counts=("int64", "classes"))}
    sums = {}  # `fuse` looks at every model
    needs_features = of_logits = True
    discloses = ("class counts",)

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Counts are counts."""
        classwise.check_counts("counts", records["counts"]["counts"], scope.dims["examples"])

    def begin(self) -> None:
        """The common model, and a generator that is not published before it has learnt."""
        super().begin()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.scenario.seed, "generator"))
            self.state["generator"] = self._generator().state_dict()

    def _generator(self) -> Generator:
        features = int(cast(Any, self.workspace.model(self.architecture)).feature_dim)
        return Generator(self.classes, features, self.hyper)

    def fuse(self, shares: Shares) -> None:
        """Average the models; teach the generator with every client's own head."""
        total, heads, counts = Sum(), [], []
        for share in shares:  # the heads are all that is kept of a model, so it is summed here and not by `sums`
            model = share.records["model"]
            total.add(share.group, model, float(share.examples))
            heads.append({k.removeprefix("head."): v for k, v in model.items() if k.startswith("head.")})
            counts.append(share.records["counts"]["counts"])
        self.publish("model", total.mean())
        seen = torch.stack(counts)
        held = seen.sum(0) > 0
        if bool(held.any()) and self.hyper.generator_steps:
            self.teach(heads, seen, held)
            self.publish("generator", {**self.state["generator"], "held": held})

    def teach(self, heads: list[Arrays], counts: Tensor, held: Tensor) -> None:
        """Train the generator on what the clients' heads say of its samples."""
        h, device = self.hyper, self.workspace.device
        net, head = self._generator().to(device), cast(Any, self.workspace.model(self.architecture)).head
        net.load_state_dict(self.state["generator"])
        taught_by = [{k: v.to(device) for k, v in values.items()} for values in heads]
        lr = h.generator_lr * h.generator_lr_decay ** (self.round - 1)
        optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=h.generator_decay)
        draw, counts = self.generator("generator"), counts.to(device)
        net.train()
        for _ in range(h.generator_steps):
            labels = draw_labels(held, h.generator_batch, draw).to(device)
            noise = net.draw(h.generator_batch, draw, device)
            z = net(noise, labels)
            taught = ensemble_loss([functional_call(head, values, (z,)) for values in taught_by], labels, counts)
            value = taught + h.diversity * diversity_loss(z, noise)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        self.log("loss/generator", taught.item())
        self.state["generator"] = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
