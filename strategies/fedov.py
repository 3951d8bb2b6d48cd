"""FedOV: clients learn what they do not know, once; for each row the server asks those who know, and distils.

Box (Diao, Li and He, "Towards Addressing Label Skews in One-Shot Federated Learning", ICLR 2023;
Xtra-Computing/FedOV, MIT). Networks have C + 1 outputs z, the last one "unknown"; h = f(x) are features, so that
z(x) = g(h); CE is a mean over the batch:

    client k:  min  CE(z(x), y)  +  CE(z(D x), C)  +  CE(z(x) − 10⁴·1_y, C)  +  λ·CE(g(β h_i + (1−β) h_j), C)[y_i ≠ y_j]
                    +  CE(z(adv(D x)), C),      β ~ U(0, 1), a row's partner j drawn from its batch; sends its model
               D destroys an image by one of: crop (0.1 to 0.33 of it, enlarged), blur (σ 10 to 100), erase (0.33 to
               0.5 of it), cut and paste, rotation by a multiple of 90°
               adv: steps of x ← x + α·sign ∇_x CE(z(x), C), so that outliers look the most known
    server:    on x ∈ D_t, unlabelled and known to it only: M(x), the m clients with the least p_k(C|x);
               q(x) = Σ_{k∈M(x)} p_k(1…C | x), renormalised;      student: min KL(q ‖ σ(s(x)))

Travels: P·B_f bytes up, a client, and the student's down. One student an architecture, from its initial weights.
Choices: λ = 0.01 and 5 steps of α = 0.002 are the code's; its bound ε = 0.5 on them cannot bind and is left out. Each
row draws its own D; erased pixels are 0 in units of the input; the pasted patch is a square of 0.1 to 0.33 of the
image. m and the student's effort are ours: the released code scores m = 1 … 10 on the test set and distils on test
images, this one does neither. Fewer than m clients all vote. Further rounds: see `OneShotStrategy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    Ensemble,
    FusionClient,
    Metrics,
    OneShotStrategy,
    UserError,
    Workspace,
    hyper,
    one_shot,
    parts,
    strategy,
)

FAR = 1e4  # taken off the label's logit, so that the unknown is second
KINDS = ("crop", "blur", "erase", "cut", "rotate")


@dataclass(frozen=True)
class FedOVHyper:
    """Hyper-parameters of FedOV."""

    voters: int = hyper(3, "m, clients that vote on a row (ours; the code tries 1 to 10 on test)", low=1)
    lam: float = hyper(0.01, "λ, weight of mixed features as unknown (code: 0.01)", low=0)
    adversarial_steps: int = hyper(5, "sign-gradient steps on destroyed images (code: 5)", low=0)
    adversarial_step: float = hyper(
        0.002, "α, one such step, in units of the input (code: 0.002)", above=0, only="adversarial_steps"
    )
    distill_epochs: int = hyper(100, "passes over D_t", low=1, effort="epochs")
    distill_batch: int = hyper(64, "batch size of distillation", low=1, effort="batch_size")
    distill_lr: float = hyper(1e-3, "Adam's learning rate in distillation", above=0, effort="lr")


def opened(model: Any, z: Tensor) -> Tensor:
    """Logits of C classes and of "unknown" (B × (C + 1)), from features."""
    return torch.cat([model.head(z), model.unknown(z)], 1)


def sampled(x: Tensor, theta: Tensor) -> Tensor:
    """Images (B × c × H × W) seen through affine maps (B × 2 × 3)."""
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def squares(n: int, shape: tuple[int, int], low: float, high: float, draw: torch.Generator) -> Tensor:
    """Masks (n × 1 × H × W) of squares that are a share of the image, uniform in [low, high], each at any place."""
    side = torch.empty(n, 1).uniform_(low, high, generator=draw).sqrt() * torch.tensor(shape)
    side = side.round().clamp_min(1)
    start = (torch.rand(n, 2, generator=draw) * (torch.tensor(shape) - side + 1)).floor()
    rows, columns = (
        (torch.arange(size) >= start[:, i, None]) & (torch.arange(size) < (start + side)[:, i, None])
        for i, size in enumerate(shape)
    )
    return (rows[:, None, :, None] & columns[:, None, None, :]).contiguous()


def destroyed(x: Tensor, kind: str, draw: torch.Generator) -> Tensor:
    """D x of one kind: what is left of images (B × c × H × W)."""
    n, (height, width) = len(x), (x.shape[-2], x.shape[-1])
    if kind == "crop":
        scale = torch.empty(n).uniform_(0.1, 0.33, generator=draw).sqrt()
        shift = (2 * torch.rand(n, 2, generator=draw) - 1) * (1 - scale)[:, None]
        theta = torch.cat([scale[:, None, None] * torch.eye(2), shift[:, :, None]], 2)
        return sampled(x, theta.to(x))
    if kind == "blur":
        sigma = torch.empty(n, 1, 1).uniform_(10, 100, generator=draw)

        def kernel(size: int) -> Tensor:
            place = torch.arange(size)
            near = (-((place[:, None] - place) ** 2) / (2 * sigma**2)).exp()
            return (near / near.sum(2, keepdim=True))[:, None].to(x)

        return kernel(height) @ x @ kernel(width).transpose(2, 3)
    if kind == "erase":
        return x.masked_fill(squares(n, (height, width), 0.33, 0.5, draw).to(x.device), 0.0)
    if kind == "cut":
        mask = squares(n, (height, width), 0.1, 0.33, draw).to(x.device)
        by = torch.randint(1, height * width, (n,), generator=draw)
        moved = torch.stack([one.roll((int(k) // width, int(k) % width), (1, 2)) for one, k in zip(x, by, strict=True)])
        return torch.where(mask, moved, x)
    angle = math.pi / 2 * torch.randint(1, 4, (n,), generator=draw)
    theta = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1)
    return sampled(x, theta.view(n, 2, 3).to(x))


def outliers(x: Tensor, draw: torch.Generator) -> Tensor:
    """D x, a kind a row."""
    kinds, out = torch.randint(len(KINDS), (len(x),), generator=draw), x.clone()
    for i, kind in enumerate(KINDS):
        rows = (kinds == i).nonzero()[:, 0].to(x.device)
        if len(rows):
            out[rows] = destroyed(x[rows], kind, draw)
    return out


def own_loss(logits: Tensor, y: Tensor) -> Tensor:
    """CE(z, y) + CE(z − 10⁴·1_y, C): the label first, and the unknown second (B × (C + 1))."""
    unknown = torch.full_like(y, logits.shape[1] - 1)
    second = logits - FAR * F.one_hot(y, logits.shape[1]).to(logits)
    return F.cross_entropy(logits, y) + F.cross_entropy(second, unknown)


def mixed(h: Tensor, y: Tensor, partner: Tensor, beta: Tensor) -> Tensor:
    """β h_i + (1 − β) h_j of the rows whose partner is of another class."""
    apart = y != y[partner]
    return (beta[:, None] * h + (1 - beta)[:, None] * h[partner])[apart]


def open_vote(p: Tensor, voters: int) -> Tensor:
    """q (T × C): the sum of known-class probabilities of the m most knowing, renormalised, from p (K × T × (C + 1))."""
    known = p[..., :-1]
    chosen = p[..., -1].argsort(dim=0, stable=True)[:voters]
    total = known.gather(0, chosen[..., None].expand(-1, -1, known.shape[2])).sum(0)
    return total / total.sum(1, keepdim=True).clamp_min(1e-300)


class FedOVClient(FusionClient):
    """Learns its classes, and that what it has not seen is unknown."""

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add the output of the unknown."""
        if hasattr(model, "features"):
            with parts.seeded_by(model, "unknown"):
                model.unknown = nn.Linear(int(model.feature_dim), 1)  # type: ignore[arg-type]
        return model

    def fit(self) -> Metrics:
        """The five terms."""
        h, model, draw = self.hyper, self.model, self.generator("outliers")

        def outlying(x: Tensor) -> Tensor:
            z = opened(model, model.features(x))  # type: ignore[operator]
            return F.cross_entropy(z, z.new_full((len(x),), self.classes, dtype=torch.long))

        def loss(out: tuple[Tensor, Tensor], y: Tensor, _: Tensor) -> Tensor:
            x, features = out
            n, strange = len(y), outliers(x, draw)
            value = own_loss(opened(model, features), y) + outlying(strange)
            beta, partner = torch.rand(n, generator=draw).to(x), torch.randperm(n, generator=draw).to(y)
            between = mixed(features, y, partner, beta)
            if len(between):
                unknown = y.new_full((len(between),), self.classes)
                value = value + h.lam * F.cross_entropy(opened(model, between), unknown)
            for _step in range(h.adversarial_steps):
                strange = strange.detach().requires_grad_()
                (slope,) = torch.autograd.grad(outlying(strange), strange)
                strange = strange + h.adversarial_step * slope.sign()
            return value + (outlying(strange.detach()) if h.adversarial_steps else 0)

        return self.train(loss, forward=lambda x: (x, model.features(x)))  # type: ignore[operator]


@strategy("fedov", client=FedOVClient, hyper=FedOVHyper, paper="Diao et al. 2023, ICLR (FedOV)")
class FedOV(OneShotStrategy):
    """Open-set voting: who knows a row teaches it, in one round."""

    transfer = "server"
    distils = whole = True
    needs_features = True
    uncovered = "trains on private examples with a loss of its own"

    def __init__(self, hyper: FedOVHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        data = self.scenario.data.dataset
        if data.kind != "image":
            raise UserError(f"strategy=fedov destroys images, data={data.name} has {data.kind}; allowed: image data")

    def students(self, ensemble: Ensemble) -> dict[str, Arrays]:
        """Distil the vote into each architecture's newest student."""
        h: FedOVHyper = self.hyper
        x, y = self.workspace.tensors("transfer")
        size = self.scenario.config.evaluate.batch_size
        p = one_shot.votes(ensemble, x, size, lambda model, rows: opened(model, model.features(rows)))
        q = open_vote(p.double().softmax(2), h.voters).float()
        taught = {}
        for name in self.names:
            model = self.workspace.loaded(name, self.student(name))
            taught[name] = self.distil(
                model, x, y, self.loss("kl").towards(q), purpose=f"distil {name}", epochs=h.distill_epochs,
                batch_size=h.distill_batch, lr=h.distill_lr, optimizer="adam",
            )  # fmt: skip
        return taught
