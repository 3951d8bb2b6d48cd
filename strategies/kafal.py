"""KAFAL: clients with few labels ask for those where their own knowledge and the common model's differ.

Box (Cao et al., "Knowledge-Aware Federated Active Learning with Non-IID Data", ICCV 2023, arXiv 2211.13579). Client k
has labels of some of its examples, c^k_y of class y; z^k and z^s are logits of its model and of the global one. In each
cycle the global model begins anew, T rounds are played, and every client asks for b_k labels:

    client k, KCFU:  min L_bal + 1[not the cycle's first round]·L_comp over T' epochs, from the global model
        L_bal  = CE(softmax(z^k(x) + log c^k), y)                                       on labelled examples
        L_comp = mean_i Γ_i·(1/C)·KL(softmax z^s(x̃_i) ‖ softmax z^k(x̃_i)),              on unlabelled ones,
                 x̃_i = β_i x_i + (1 − β_i) x_j, β_i ~ Beta(2, 2), Γ_i = β_i γ_{ŷ_i} + (1 − β_i) γ_{ŷ_j},
                 ŷ = argmax z^s(x̃), γ_y ∝ 1/c^k_y with Σγ = 1, and 0 for a class without a label
    server:          w ← Σ_k m_k w_k / Σ_k m_k, m_k = Σ_y c^k_y                            (Eq. 7: labelled counts)
    client k, KSAS:  P ∝ c^k_y exp z^k_y, Q ∝ c^k_y exp z^s_y, D(x) = ½[KL(P‖Q) + KL(Q‖P)]   (Eqs. 1 to 3)
                     labels for the b_k unlabelled examples with the largest D

Travels: the model both ways, P·B_f bytes a client and round; no label and no score leaves a client, their number
does. At a cycle's end all clients train, and ask after the new global model came, which the next round does not
send again. Labels, budget and rounds of a cycle are the platform's `labels.*` (paper: 10 %, 5 %, T = 50;
b_k = ⌈budget·n_k⌉).

What the paper's code does otherwise: it mixes a whole batch with one single example (here each with its own partner,
by a permutation), keeps examples that have been labelled since among the unlabelled ones, and takes the logarithm of 0
for a class without labels (here such classes are left out of P and Q). Choices: a cycle begins from the *same* initial
weights; a step's unlabelled batch is drawn afresh, as large as `train.batch_size`. `acquisition` is what the paper
compares with, on the local model: chance, the entropy of softmax z^k, or the core-set of features (Sener and Savarese,
ICLR 2018, greedy k-centre). With all labels known, `update=fedavg` is FedAvg.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse import (
    AnchoredClient,
    AveragingStrategy,
    Metrics,
    Records,
    Shares,
    UserError,
    Workspace,
    hyper,
    strategy,
    training,
    without_effect,
)


@dataclass(frozen=True)
class KAFALHyper:
    """Hyper-parameters of KAFAL.

    Raises
    ------
    UserError
        If L_comp has a weight, and clients train without it.
    """

    acquisition: str = hyper("ksas", "which labels are asked for", choices=("ksas", "random", "entropy", "coreset"))
    update: str = hyper("kcfu", "L_bal + L_comp, or plain cross-entropy", choices=("kcfu", "fedavg"))
    compensation: float = hyper(1.0, "weight of L_comp (paper: 1); nothing in a round of one step", low=0)
    restart: bool = hyper(True, "begin each cycle from the initial weights; false: go on with the global model")

    def __post_init__(self) -> None:
        if self.update == "fedavg":
            without_effect(self, "compensation", "with strategy.update=fedavg, which has no L_comp")


def ksas(local: Tensor, common: Tensor, counts: Tensor) -> Tensor:
    """D of each example (B,) from z^k and z^s (both B × C) and c^k (C,), over the classes that have a label."""
    here = counts > 0
    prior = counts[here].to(local.dtype).log()
    p, q = ((z[:, here] + prior).log_softmax(1) for z in (local, common))
    return ((p.exp() - q.exp()) * (p - q)).sum(1) / 2


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's softmax (B,), in nats."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def farthest(candidates: Tensor, centres: Tensor, size: int) -> Tensor:
    """Rows of candidates (B × d), one after another the farthest from all centres (M × d) and those chosen before."""

    def distance(points: Tensor) -> Tensor:
        return torch.cdist(candidates, points, compute_mode="donot_use_mm_for_euclid_dist")

    nearest = distance(centres).amin(1) if len(centres) else torch.full_like(candidates[:, 0], torch.inf)
    chosen = []
    for _ in range(size):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance(candidates[chosen[-1:]]).squeeze(1))
        nearest[chosen[-1]] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64)


def balanced(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """L_bal of a batch: logits (B × C), labels (B,), c^k (C,); a class without labels has no share in the softmax."""
    return F.cross_entropy(logits + counts.to(logits.dtype).log(), y)


def rarity(counts: Tensor) -> Tensor:
    """γ (C,): inversely proportional to c^k, summing to 1; 0 for a class without labels, and everywhere without any."""
    inverse = torch.where(counts > 0, 1 / counts.clamp_min(1), 0.0)
    return inverse / inverse.sum().clamp_min(torch.finfo(inverse.dtype).tiny)


def compensatory(student: Tensor, teacher: Tensor, beta: Tensor, partner: Tensor, gamma: Tensor) -> Tensor:
    """L_comp of a mixed batch: z^k(x̃) and z^s(x̃) (both B × C), β (B,), the partners j (B,) and γ (C,)."""
    seen = gamma[teacher.argmax(1)]
    weight = beta * seen + (1 - beta) * seen[partner]
    divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    return (weight * divergence.mean(1)).mean()


class KAFALClient(AnchoredClient):
    """Trains on what is labelled and on mixtures of what is not; asks for labels at a cycle's end."""

    partly_labelled = True

    @property
    def counts(self) -> Tensor:
        """c^k: labelled examples of each class (C,)."""
        return torch.bincount(self.y, minlength=self.classes)

    def fit(self) -> Metrics:
        """min L_bal + L_comp, from the global model, or from the initial one where a cycle begins."""
        rounds = self.scenario.config.labels.rounds
        fresh = self.round == 1 or (self.hyper.restart and (self.round - 1) % rounds == 0)
        if fresh:
            self.start = self.workspace.initial(self.architecture)
            self.load(self.start)
        metrics = self.train() if self.hyper.update == "fedavg" else self._update(taught=not fresh)
        if self.round % rounds == 0:
            self.state["local"], self.state["trained"] = self.weights(), self.round
        return metrics

    def _update(self, taught: bool) -> Metrics:
        counts, pool, draw, weight = self.counts, self.unlabelled, self.generator("mixtures"), self.hyper.compensation
        gamma, size = rarity(counts).to(pool.dtype), min(self.training.batch_size, len(pool))
        teacher = copy.deepcopy(self.model)  # z^s: the global model, from which training starts

        def loss(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            value = balanced(logits, y, counts)
            if not taught or not size or not weight:
                return value
            x = pool[torch.randperm(len(pool), generator=draw)[:size].to(pool.device)]
            partner = torch.randperm(size, generator=draw).to(pool.device)
            beta = torch.rand(size, 3, generator=draw).median(1).values.to(x)  # of three uniform numbers: Beta(2, 2)
            share = beta.reshape(-1, *[1] * (x.dim() - 1))
            mixed = share * x + (1 - share) * x[partner]
            student, taught_by = self.model(mixed), training.predict(teacher, mixed)
            return value + weight * compensatory(student, taught_by, beta, partner, gamma)

        return self.train(loss)

    def annotate(self) -> Records:
        """Ask for labels, with this cycle's local model and the new global one; a client without the first waits."""
        if self.state.get("trained") == self.round:
            if size := self.allowance:
                self.reveal(self._chosen(size))
            del self.state["local"], self.state["trained"]
        return {}

    def _chosen(self, size: int) -> Tensor:
        """Rows of the unlabelled pool, by the rule of `acquisition`; of equals the first."""
        rule, pool = self.hyper.acquisition, self.unlabelled
        if rule == "random":
            return torch.randperm(len(pool), generator=self.generator("acquisition"))[:size]
        common = self.predict(pool) if rule == "ksas" else pool
        self.load(self.state["local"])
        if rule == "coreset":
            return farthest(self.embed(pool), self.embed(self.x), size)
        local = self.predict(pool)
        score = ksas(local, common, self.counts) if rule == "ksas" else entropy(local)
        return score.argsort(descending=True, stable=True)[:size]


@strategy("kafal", client=KAFALClient, hyper=KAFALHyper, paper="Cao et al. 2023, arXiv 2211.13579")
class KAFAL(AveragingStrategy):
    """Active learning: labels for what a client and the common model see differently; losses for skewed labels."""

    records_annotate: dict[str, None] = {}

    def __init__(self, hyper: KAFALHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        dataset = self.scenario.data.dataset
        if hyper.update == "kcfu" and dataset.kind == "tokens":
            raise UserError(
                f"strategy.update=kcfu mixes inputs, and data={dataset.name} has tokens; allowed there: fedavg"
            )

    @property
    def needs_features(self) -> bool:  # type: ignore[override]
        """The core-set is one of features."""
        return bool(self.hyper.acquisition == "coreset")

    def _ends(self, round: int) -> bool:
        return round % self.scenario.config.labels.rounds == 0

    def phases(self, round: int) -> tuple[str, ...]:
        """At a cycle's end labels are asked for."""
        return ("train", "annotate") if self._ends(round) else ("train",)

    def cohort(self, round: int, sampled: list[int]) -> list[int]:
        """At a cycle's end all clients take part: each asks with a local model of its own."""
        return list(range(self.scenario.clients)) if self._ends(round) else sampled

    def fuse_annotate(self, shares: Shares) -> None:
        """Nothing is shared: what was labelled stays with the client."""
