"""KT-pFL: each client gets its own mixture of everyone's soft predictions, with learned coefficients.

Box (Zhang et al., "Parameterized Knowledge Transfer for Personalized Federated Learning", NeurIPS 2021,
arXiv 2111.02862). With s_n = softmax(f_n(x)/T), x ∈ D_t, and coefficients c (N × N, begun at 1/N), in round t:

    client n:  CE on private data; sends s_n                                                      (T_s × C)
    server:    for the participants  c_n ← c_n − η_c ∇_{c_n} [ D(Σ_m c_nm s_m, s_n) + (ρ/N) ‖c_n − 1/N‖² ]
               target_n = Σ_m c_nm s_m                                                    (personal, sent)
    client n:  min T²·KL(target_n ‖ softmax(f_n/T)) on D_t, at the start of its next round

Travels: T_s·C·B_f bytes each way, a client and round; down it is unicast. Left open by the paper, and the reading here:
D is the divergence of the distillation itself, KL(mixture ‖ s_n); c_n is kept a distribution by projecting each step
onto the simplex (else a target is none); η_c. Participants share the weight their rows give to participants: absent
columns stay as they are, ρ pulls to 1/|S_t|. Of the authors' code, and the default: one step a round, rescaled by row
until it is felt (at KL's or MSE's own scale it is not: all coefficients stay at 1/N), and a penalty that is a mean.
Ours: a step's size is that of the slope without its row's mean, which the projection undoes; theirs counts it.
`distance=mse` and `rows=softmax` (c ← softmax(5·c), once a round, which pulls to uniform) are theirs too; their KL
without T² divided by batch and classes, and alignment rows drawn with replacement, are not reproduced. η_c = 0
freezes c: at 1/N that is FedMD-style averaging. The authors score a client before it distils, which is
`evaluate.moment=trained`; the default scores it after. Architectures may differ. Distillation has Adam at 10⁻³ unless
`distil.*` says otherwise (ours; code: SGD 0.02): with the clients' SGD at 0.05 and momentum, convolutions die within a
few rounds of skew (docs/distillation.md has the figures).

`neighbours=classroom` puts another rule in the place of c: mentors, ranked on the transfer set's labels
(`fedfuse.families.neighbours`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
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
    Workspace,
    arrays,
    distributions,
    hyper,
    neighbours,
    strategy,
    transfer_rows,
    without_effect,
)


@dataclass(frozen=True)
class KTpFLHyper:
    """Hyper-parameters of KT-pFL.

    Raises
    ------
    UserError
        If a step on the coefficients has settings, and none is made.
    """

    temperature: float = hyper(10.0, "T of the soft predictions and of the distillation (code: 10)", above=0)
    rho: float = hyper(0.5, "ρ, pull of the coefficients towards uniform (code: 0.1 to 3)", low=0)
    coefficient_lr: float | None = hyper(
        None, "η_c; null: rescaled by row so that a step is felt (code); 0 freezes the coefficients", low=0
    )
    coefficient_steps: int = hyper(1, "steps on the coefficients a round (code: 1)", low=0)
    distance: str = hyper("kl", "D: KL(mixture ‖ own), or mean squared difference (code)", choices=("kl", "mse"))
    rows: str = hyper(
        "simplex", "rows kept distributions by projection, or by softmax(5·c) (code)", choices=("simplex", "softmax")
    )
    neighbours: str = hyper(
        "learned",
        "who teaches whom: all, by learned coefficients, or those no worse on the transfer set's labels (ClassroomKD)",
        choices=("learned", "classroom"),
    )
    subset: int | None = hyper(None, "T_s, rows redrawn each round; null: the whole transfer set", low=1)
    distill_epochs: int | None = hyper(
        None,
        "epochs of the distillation; null: as many as make the code's 20 steps, which are one of 5000 rows",
        low=0,
        effort="epochs",
    )
    distill_batch: int = hyper(
        256, "batch size of the distillation (code: 256)", low=1, only="distill_epochs", effort="batch_size"
    )

    def __post_init__(self) -> None:
        for frozen, other in (("coefficient_lr", "coefficient_steps"), ("coefficient_steps", "coefficient_lr")):
            for name in () if getattr(self, frozen) != 0 else ("rho", "distance", "rows", other):
                without_effect(self, name, f"with strategy.{frozen}=0, which freezes the coefficients")


def gradient(c: Tensor, s: Tensor, rho: float, distance: str) -> Tensor:
    """∇_c of Σ_n [ D(Σ_m c_nm s_m, s_n) + ρ · mean_m (c_nm − 1/N)² ].

    Parameters
    ----------
    c : Tensor
        Coefficients (N × N).
    s : Tensor
        Soft predictions (N × T_s × C).
    rho : float
    distance : {"kl", "mse"}
        D: mean over x of KL(mixture ‖ s_n), or mean over x and classes of (mixture − s_n)².
    """
    n, rows, classes = s.shape
    mixture = torch.einsum("nm,mtc->ntc", c, s)
    if distance == "mse":
        slope = 2 * (mixture - s) / (rows * classes)
    else:
        slope = (mixture.clamp_min(1e-12).log() - s.clamp_min(1e-12).log() + 1) / rows
    return torch.einsum("ntc,mtc->nm", slope, s) + 2 * rho * (c - 1 / n) / n


def project(c: Tensor) -> Tensor:
    """The nearest distribution to each row (Euclidean projection onto the simplex; Duchi et al., ICML 2008)."""
    ordered = c.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, c.shape[1] + 1, dtype=c.dtype, device=c.device)
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (c - excess.gather(1, last)).clamp_min(0)


def rates(slope: Tensor) -> Tensor:
    """η_c of each row (N × 1), as in the authors' code: five times divided or multiplied by 5 towards a step of 0.01.

    Parameters
    ----------
    slope : Tensor
        ∇_c (N × N). Both ways of keeping a row a distribution undo what is alike in all its entries, which of KL's is
        nearly all at T = 10: a row's step is Σ_m |η_c (∇_nm − mean_j ∇_nj)| / N.
    """
    felt = slope - slope.mean(1, keepdim=True)
    mean, rate = felt.abs().sum(1, keepdim=True) / len(slope), torch.ones(len(slope), 1, dtype=slope.dtype)
    for _ in range(5):
        rate = torch.where(mean * rate > 0.01, rate / 5, rate)
        rate = torch.where(mean * rate < 0.01, rate * 5, rate)
    return rate


def learn(c: Tensor, s: Tensor, h: KTpFLHyper) -> Tensor:
    """The round's steps on the coefficients of its participants (N × N, rows that sum to 1)."""
    steps = 0 if h.coefficient_lr == 0 else h.coefficient_steps
    for _ in range(steps):
        slope = gradient(c, s, h.rho, h.distance)
        c = c - (rates(slope) if h.coefficient_lr is None else h.coefficient_lr) * slope
        c = project(c) if h.rows == "simplex" else c
    return (5 * c).softmax(1) if steps and h.rows == "softmax" else c


def another(h: KTpFLHyper) -> neighbours.Rule | None:
    """The rule in the place of learned coefficients, if one is asked for."""
    return neighbours.rule(h.neighbours, softened=h.temperature)


class KTpFLClient(FusionClient):
    """Keeps its own model; distils its own mixture, then trains on its own data."""

    personal = True

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """T²·KL(target_n ‖ softmax(f/T)) on the target's own rows."""
        h, item, rule = self.hyper, knowledge["target"], another(self.hyper)
        rows, T = self.subset(h.subset, item.version), h.temperature
        if rule:
            step, x, y = rule.lesson(self, item, rows)
        else:
            x, y = self.workspace.transfer(rows)
            step = self.loss("kl", temperature=T).towards(item.arrays["p"].to(self.workspace.device), softened=T)
        self.distil(
            step, x, y, epochs=h.distill_epochs, batch_size=h.distill_batch, steps=20, optimizer="adam", lr=1e-3
        )

    def share(self) -> Records:
        """s_n = softmax(f_n/T) on this round's rows, in ascending row order."""
        logits = self.predict(self.workspace.transfer(self.subset(self.hyper.subset))[0])
        return {"soft": {"p": (logits / self.hyper.temperature).softmax(1)}}


def targets(scope: Scope) -> Layout:
    """Layout of what a client is taught."""
    rule = another(scope.hyper)
    return rule.taught(scope) if rule else arrays(p=("subset", "classes"))(scope)


@strategy("ktpfl", client=KTpFLClient, hyper=KTpFLHyper, paper="Zhang et al. 2021, arXiv 2111.02862")
class KTpFL(FusionStrategy):
    """Personal mixtures of soft predictions, their N × N coefficients learned at the server."""

    topics = {"target": Topic("lesson", targets)}
    records = {"soft": arrays(p=("subset", "classes"))}
    of_classes = True
    transfer = "clients"
    distils = whole = True

    def __init__(self, hyper: KTpFLHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        if rule := another(hyper):
            rule.check(self, "rho", "coefficient_lr", "coefficient_steps", "distance", "rows", "temperature")

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Soft predictions are distributions."""
        distributions("soft/p", records["soft"]["p"])

    def begin(self) -> None:
        """c_nm = 1/N for every pair of clients."""
        n = self.scenario.clients
        self.state["coefficients"] = torch.full((n, n), 1 / n, dtype=torch.float64)

    def fuse(self, shares: Shares) -> None:
        """Learn the participants' coefficients, mix, send each its own."""
        everyone = [share for share in shares if share.examples]  # the others have learnt nothing of their own
        if rule := another(self.hyper):
            rule.fuse(self, everyone, transfer_rows(self.scenario, self.hyper.subset, self.round))
            return
        clients = [share.client for share in everyone]
        s = torch.stack([share.records["soft"]["p"] for share in everyone]).double()
        grid = torch.meshgrid(torch.tensor(clients), torch.tensor(clients), indexing="ij")
        whole = self.state["coefficients"].clone()
        mass = whole[grid].sum(1, keepdim=True)  # what the rows give to participants; the rest stays where it is
        c = torch.where(mass > 0, whole[grid] / mass.where(mass > 0, 1.0), 1 / len(clients))
        c = learn(c, s, self.hyper)
        whole[grid] = mass * c
        self.state["coefficients"] = whole
        self.log_matrix("similarity", clients, c)
        for client, target in zip(clients, torch.einsum("nm,mtc->ntc", c, s).float(), strict=True):
            self.publish("target", {"p": target}, to=client)
