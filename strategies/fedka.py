"""FedKA: clients of labelled domains, and a target domain nobody has labels of: features aligned, labels voted.

Box (Sun, Chong and Ochiai, "Feature Distribution Matching for Federated Domain Generalization", ACML 2022, arXiv
2203.11635; code yuweisunn/federated-knowledge-alignment). Features f(x), class head g, domain head h, global model w_t,
source (x, y) of client k, target inputs x̃ of the unlabelled domain; a(p) = 2/(1 + e^{−γp}) − 1, p from 0 to 1 over the
run; R_a reverses gradients and scales them by a. In round t:

    client k:  min CE(g(f(x)), y) + CE(h(R_a f(x)), 0) + CE(h(R_a f(x̃)), 1)                            (adversarial)
    client k:  min a(p)·MK-MMD²(f(x), f_{w_t}(x̃)), of `accumulate` batches a step, each counting alike    (matching)
    server:    w ← Σ p_k w_k, all weights and statistics, p_k = 1/N (code)
    server:    ŷ(x̃) = the class most w_k vote for, as they were sent; w trains on CE(w(x̃), ŷ) at rate a(p)·η (voting)

    MK-MMD²(u, v) = mean K(u,u) + mean K(v,v) − 2·mean K(u,v), the biased estimate
    K(a, b) = Σ_{i<5} exp(−‖a−b‖²/σ_i), σ_i = σ_0·2^{i−2}, σ_0 the mean squared distance of distinct pooled rows

The target is `data.target=<domain>`, whose train split is then the transfer set; without it, the transfer set.
Everybody sees its inputs, clients too, nobody a label, and it is scored on other rows: the target's test split. Travels
P·B_f bytes each way, P with the domain head, and the target's inputs once: clients make f_{w_t}(x̃) themselves.

Of the code, not reproduced: `=+` for `+=`, by which only the last of each eight batches counted in the matching;
gradients of the matching in w_t, which is fixed here; labels of one domain shifted by one (`data=mixed` refuses other
classes, `data.target` a domain without a class); the target's train split as test; the best round as the result. Ours:
clients pass over all their examples, optimisers are `train.*` and start afresh (code: Adam 3e-4); gradients are
clipped, without which the reversed ones grow at SGD 0.05 until every feature is alike; a client without examples is in
no mean and has no vote; a target row teaches if more than `majority` of the votes agree on it, and a(p) scales the
voting's rate and not its loss: the same under SGD, but Adam does not heed a loss's scale. With all rows (`majority=0`:
tied votes go to the larger summed probability) and the scaled loss, two clients of other digits voted MNIST into one
class within ten rounds of Adam, and training did not leave it (experiments/domains).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse import (
    AveragingStrategy,
    FusionClient,
    Metrics,
    Shares,
    Sum,
    hyper,
    parts,
    strategy,
    training,
    transfer_rows,
)


@dataclass(frozen=True)
class FedKAHyper:
    """Hyper-parameters of FedKA."""

    adversarial: bool = hyper(True, "the feature disentangler: a domain head behind reversed gradients")
    matching: bool = hyper(True, "the embedding matching: MK-MMD to the global model's target features")
    voting: bool = hyper(True, "the federated voting: pseudo-labels of the target for the global model")
    gamma: float = hyper(5.0, "γ of the schedule a(p) (code: 5)", above=0, only="adversarial or matching or voting")
    hidden: int = hyper(100, "hidden units of the domain head (code: 100)", low=1, only="adversarial")
    kernels: int = hyper(5, "Gaussian kernels of MK-MMD (code: 5)", low=1, only="matching")
    accumulate: int = hyper(8, "batches whose matching loss makes one step (code: 8)", low=1, only="matching")
    majority: float = hyper(
        0.5,
        "share of the votes above which a target row's label teaches; 0: every row does (code)",
        low=0,
        high=0.99,
        only="voting with vote_epochs",
    )
    vote_epochs: int = hyper(1, "passes of the global model over the voted target a round", low=0, only="voting")
    vote_batch: int = hyper(16, "target rows a step of that (code: 16)", low=1, only="voting with vote_epochs")
    vote_lr: float | None = hyper(
        0.001, "rate of that (at 0.05 wrong votes collapse it); null: train.lr", above=0, only="voting with vote_epochs"
    )
    clip: float | None = hyper(1.0, "largest gradient norm of a step, against collapse (ours); null: none", above=0)
    weighting: str = hyper("uniform", "all alike (code), or weights n_k", choices=("uniform", "examples"))


def schedule(p: float, gamma: float) -> float:
    """a(p) = 2/(1 + e^{−γp}) − 1: 0 at the start, towards 1."""
    return 2 / (1 + math.exp(-gamma * p)) - 1


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, a: float) -> Tensor:
        ctx.a = a
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.a * grad, None


def reverse(z: Tensor, a: float) -> Tensor:
    """R_a: z forward, −a times its gradient backward."""
    return cast(Tensor, _Reverse.apply(z, a))


def mk_mmd(u: Tensor, v: Tensor, kernels: int = 5) -> Tensor:
    """Biased MK-MMD² of two samples (n × d, m × d); its bandwidths carry no gradient."""
    pooled, n = torch.cat([u, v]), len(u)
    distance = (pooled[:, None] - pooled[None]).square().sum(2)
    first = distance.detach().sum() / (len(pooled) ** 2 - len(pooled))
    first = first.clamp_min(torch.finfo(first.dtype).tiny * 2.0**kernels)  # equal points: all kernels are 1
    k = torch.stack([(-distance / (first * 2.0 ** (i - kernels // 2))).exp() for i in range(kernels)]).sum(0)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


def vote(probabilities: Sequence[Tensor], classes: int) -> tuple[Tensor, Tensor]:
    """ŷ (T,) of the models' probabilities (each T × C), ties by summed probability; and the share of votes it got."""
    votes = torch.stack([F.one_hot(p.argmax(1), classes) for p in probabilities]).sum(0).double()
    among = torch.stack([p.double() for p in probabilities]).mean(0)
    chosen = (votes + among / 2).argmax(1)  # a mean probability is at most 1: half of it breaks ties alone
    return chosen, votes.gather(1, chosen[:, None])[:, 0] / len(probabilities)


def clipped(largest: float | None) -> Callable[[nn.Module], None] | None:
    """An `after_backward` that scales the gradient to a norm of at most `largest`."""
    if largest is None:
        return None

    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), largest)

    return clip


class FedKAClient(FusionClient):
    """Trains on its own domain, and draws its features towards the target's."""

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add the domain head, if it is used."""
        if hyper.adversarial and hasattr(model, "features"):
            with parts.seeded_by(model, "domain head"):
                model.domain_head = nn.Sequential(
                    nn.Linear(int(model.feature_dim), hyper.hidden), nn.BatchNorm1d(hyper.hidden), nn.ReLU(),  # type: ignore[arg-type]
                    nn.Linear(hyper.hidden, 2),
                )  # fmt: skip
        return model

    def fit(self) -> Metrics:
        """The class and domain losses, then a pass of matching to what w_t makes of the target."""
        h: FedKAHyper = self.hyper
        target = self.transfer[self.subset(None).to(self.workspace.device)]
        fixed = self.embed(target) if h.matching else target
        if h.adversarial:
            loss = self._adversarial(target)
            metrics = self.train(loss, forward=self.features_and_logits, after_backward=clipped(self.hyper.clip))
        else:
            metrics = self.train(after_backward=clipped(self.hyper.clip))
        if h.matching:
            size = self.training.batch_size
            matched = self.train(
                self._matching(fixed, size),
                forward=lambda x: x,
                after_backward=clipped(self.hyper.clip),
                batch_size=size * h.accumulate,
                purpose="matching",
            )
            if matched["steps"]:
                metrics["loss/matching"] = matched["loss"]
        return metrics

    def _progress(self, size: int) -> Callable[[], float]:
        """a(p), a step further at each call of so many steps in the round."""
        before, after = self.scenario.span(self.round)
        steps = max(1, self.training.epochs * len(training.sizes_of(len(self.x), size)))
        done = iter(range(steps))
        return lambda: schedule(before + (after - before) * next(done, steps) / steps, self.hyper.gamma)

    def _drawn(self, purpose: str, rows: int) -> Callable[[int], Tensor]:
        """Draws target rows without replacement, so many as a source batch has or all there are."""
        draw = self.generator(purpose)
        return lambda n: torch.randperm(rows, generator=draw)[:n].to(self.workspace.device)

    def _adversarial(self, target: Tensor) -> Callable[[tuple[Tensor, Tensor], Tensor, Tensor], Tensor]:
        """CE(g(f(x)), y) and CE(h(R_a f), domain) of as many target rows."""
        model, draw = cast(Any, self.model), self._drawn("target", len(target))
        a = self._progress(self.training.batch_size)

        def loss(out: tuple[Tensor, Tensor], y: Tensor, _: Tensor) -> Tensor:
            source, logits = out
            aimed, value = model.features(target[draw(len(y))]), F.cross_entropy(logits, y)
            if min(len(source), len(aimed)) < 2:  # the head's BatchNorm cannot train on one row
                return value
            strength = a()
            said = [model.domain_head(reverse(z, strength)) for z in (source, aimed)]
            return value + domain_loss(*said)

        return loss

    def _matching(self, fixed: Tensor, size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """a(p)·MK-MMD², the mean over the batches of one step."""
        model, draw = cast(Any, self.model), self._drawn("matching", len(fixed))
        a = self._progress(size * self.hyper.accumulate)

        def loss(x: Tensor, _: Tensor, rows: Tensor) -> Tensor:
            pieces = x.split(training.sizes_of(len(x), size))
            found = [mk_mmd(model.features(piece), fixed[draw(len(piece))], self.hyper.kernels) for piece in pieces]
            return a() * torch.stack(found).mean()

        return loss


def domain_loss(source: Tensor, target: Tensor) -> Tensor:
    """CE(h(source), 0) + CE(h(target), 1), each a mean over its rows."""
    zero, one = source.new_zeros(len(source)).long(), source.new_ones(len(target)).long()
    return F.cross_entropy(source, zero) + F.cross_entropy(target, one)


@strategy("fedka", client=FedKAClient, hyper=FedKAHyper, paper="Sun et al. 2022, arXiv 2203.11635")
class FedKA(AveragingStrategy):
    """Domain-adversarial features, MK-MMD to an unlabelled target domain, and votes on its labels."""

    needs_features = True
    transfer = "both"

    @property
    def sums(self) -> Any:
        """Votes need every model; else the mean is enough."""
        return {} if self.hyper.voting else super().sums

    def planned(self) -> str:
        """The schedule."""
        return "a(p), the weight of the adversarial and matching losses and of the voting's rate"

    def fuse(self, shares: Shares) -> None:
        """The mean, and a pass of it over the target with the labels that most clients' models give."""
        h = self.hyper
        if not h.voting:
            return super().fuse(shares)
        rows = transfer_rows(self.scenario, None, self.round).to(self.workspace.device)
        target, _ = self.workspace.transfer(rows)
        total, said, batch = Sum(), [], self.scenario.config.evaluate.batch_size
        for share in shares:
            if not share.examples:  # w_t as it was sent: that is neither a vote nor an update
                continue
            sent = share.records["model"]
            total.add(share.group, sent, float(share.examples) if h.weighting == "examples" else 1.0)
            model = self.workspace.loaded(self.architecture, sent)
            said.append(training.predict(model, target, batch).softmax(1))
        mean = total.mean()
        labels, agreed = vote(said, self.classes)
        self.log("votes/agreement", agreed.mean().item())
        a = schedule(self.scenario.span(self.round)[1], h.gamma)
        model, sure = self.workspace.loaded(self.architecture, mean), agreed > h.majority
        rate = self.scenario.config.train.lr if h.vote_lr is None else h.vote_lr
        learnt = self.train(model, target[sure], labels[sure], lambda z, y, _: F.cross_entropy(z, y), purpose="vote",
                            epochs=h.vote_epochs, batch_size=h.vote_batch, lr=a * rate,
                            after_backward=clipped(h.clip))  # fmt: skip
        self.publish("model", learnt)
