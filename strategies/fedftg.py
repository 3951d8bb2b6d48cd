"""FedFTG: the average is fine-tuned at the server on generated inputs that it and the clients' models disagree on.

Box (Zhang et al., "Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID Federated Learning",
CVPR 2022, arXiv 2203.09249; ZhangLin-PKU/FedFTG, MIT). n_k^y client k's examples of class y, t_k its logits, s the
global model's, K clients in the round; x = G(ε, y), ε ~ N(0, I), y drawn by the total class counts:

    client k:  w_k ← w; E epochs of SGD; sends w_k and (n_k^y)_y
    server:    w ← Σ n_k w_k / Σ n_k;   α_k^y = n_k^y / Σ_j n_j^y;   I iterations of
               for each client k, a step of G (Adam):
                   min  mean_b α_k^{y_b} CE(t_k, y)_b  −  λ·mean_b α_k^{y_b} mean_c |s − t_k|_b
                        +  (η/K)·exp(− mean_ij ‖ε_i − ε_j‖²/d_ε · |x_i − x_j|₁/d)
               I_d steps of w (SGD):  min  − mean_b Σ_k α_k^{y_b} Σ_c softmax(t_k)_c · log softmax(s)_c

Travels: P·B_f bytes and C counts of 8 bytes up, P·B_f down, a client and round. No iteration is FedAvg. The paper's
strategy is for every round, and one round is its one shot: G's weights live on from round to round at the server.
Of the released code: I = 10, I_d = 5, Adam 0.01, SGD 0.1 without momentum. Its defects, absent here: its cross-entropy
is averaged over the batch before α, which belongs to each row, multiplies it; its distillation is divided by C; its
test set is scored inside. Choices: G (linear layers for small images, see `families/synthesis.py`), distances per
dimension in the diversity term, steps on batches of their own; clients without examples take no part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    AveragingStrategy,
    Ensemble,
    FusionClient,
    Records,
    Scope,
    Shares,
    Sum,
    Workspace,
    arrays,
    classwise,
    hyper,
    model_arrays,
    strategy,
    synthesis,
    variable,
)


@dataclass(frozen=True)
class FedFTGHyper:
    """Hyper-parameters of FedFTG."""

    iterations: int = hyper(10, "I, alternations of generator and model a round; 0: FedAvg (code: 10)", low=0)
    distill_steps: int = hyper(5, "I_d, steps of the model an iteration (code: 5)", low=0, only="iterations")
    generator_lr: float = hyper(0.01, "Adam's step size for the generator (code: 0.01)", above=0, only="iterations")
    distill_lr: float = hyper(
        0.1, "SGD's step size for the model (code: 0.1)", above=0, only="iterations with distill_steps"
    )
    batch: int = hyper(128, "B, generated inputs a step", low=2, only="iterations")
    adversarial: float = hyper(1.0, "λ, weight of disagreement (code: 1)", low=0, only="iterations")
    diversity: float = hyper(1.0, "η, weight of the diversity term (code: 1)", low=0, only="iterations")
    noise_dim: int = hyper(64, "d_ε, size of the noise", low=1)
    width: int = hyper(16, "channels of the generator before its last layer; hidden units are 16 times that", low=1)


def shares_of_classes(counts: Tensor) -> Tensor:
    """α (K × C): n_k^y / Σ_j n_j^y; 0 for a class that nobody holds."""
    return counts.double() / counts.sum(0).clamp_min(1)


def diversity(x: Tensor, noise: Tensor) -> Tensor:
    """exp(− mean_ij ‖ε_i − ε_j‖²/d_ε · |x_i − x_j|₁/d)."""
    flat = x.flatten(1)
    far = torch.cdist(flat, flat, 1) / flat.shape[1]
    return (-(far * (noise[:, None] - noise[None]).square().mean(2)).mean()).exp()


def generator_loss(t: Tensor, s: Tensor, y: Tensor, alpha: Tensor, adversarial: float) -> Tensor:
    """A client's first two terms: α of each row times (CE − λ·mean_c |s − t|), then the mean.

    Parameters
    ----------
    t, s : Tensor
        The client's and the model's logits (B × C).
    y : Tensor
        Classes (B).
    alpha : Tensor
        α_k (C).
    adversarial : float
        λ.
    """
    each = F.cross_entropy(t, y, reduction="none") - adversarial * (s - t).abs().mean(1)
    return (alpha[y].to(each) * each).mean()


def student_loss(t: Tensor, s: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """− mean_b Σ_k α_k^{y_b} Σ_c softmax(t_k) log softmax(s), of t (K × B × C), s (B × C) and α (K × C)."""
    target = (alpha[:, y, None].to(t) * t.softmax(2)).sum(0)
    return -(target * s.log_softmax(1)).sum(1).mean()


class FedFTGClient(FusionClient):
    """FedAvg's client, which says how many examples of each class it has."""

    def share(self) -> Records:
        """The model and the counts."""
        return {**super().share(), "counts": {"counts": torch.bincount(self.y, minlength=self.classes)}}


@strategy("fedftg", client=FedFTGClient, hyper=FedFTGHyper, paper="Zhang et al. 2022, arXiv 2203.09249")
class FedFTG(AveragingStrategy):
    """The average, fine-tuned on generated inputs that clients' models and it disagree on."""

    records = {"model": model_arrays, "counts": arrays(counts=("int64", "classes"))}
    sums = {}  # every model is asked
    discloses = ("class counts",)

    def __init__(self, hyper: FedFTGHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        self._generator()  # refuses inputs that cannot be made

    def _generator(self) -> synthesis.Generator:
        h: FedFTGHyper = self.hyper
        net = synthesis.build(self.workspace, h.noise_dim, h.width, self.classes, "fedftg")
        net.load_state_dict(self.state.get("generator", net.state_dict()))
        return net

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Counts are counts."""
        classwise.check_counts("counts", records["counts"]["counts"], scope.dims["examples"])

    def fuse(self, shares: Shares) -> None:
        """Average, then let generator and model play."""
        total, teachers, counts = Sum(), Ensemble(self.workspace), []
        for share in shares:
            if share.examples:
                total.add(share.group, share.records["model"], float(share.examples))
                teachers.add(self.architecture, share.records["model"])
                counts.append(share.records["counts"]["counts"])
        mean = total.mean()
        seen = torch.stack(counts)
        if self.hyper.iterations and bool(seen.any()):
            mean = self.tuned(mean, teachers, seen)
        self.publish("model", mean)

    def drawn(self, net: nn.Module, counts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Generated inputs, their classes and their noise, again and again."""
        h, draw, device = self.hyper, self.generator("synthesis"), self.workspace.device
        prior = counts.sum(0).double()
        while True:
            y = torch.multinomial(prior, h.batch, replacement=True, generator=draw).to(device)
            noise = torch.randn(h.batch, h.noise_dim, generator=draw).to(device)
            yield net(noise, y), y, noise

    def tuned(self, mean: Arrays, teachers: Ensemble, counts: Tensor) -> Arrays:
        """The averaged model's weights after I iterations."""
        h: FedFTGHyper = self.hyper
        net, model = self._generator().train(), copy.deepcopy(self.workspace.loaded(self.architecture, mean))
        alpha = shares_of_classes(counts).to(self.workspace.device)
        of_net = torch.optim.Adam(net.parameters(), lr=h.generator_lr)
        of_model = torch.optim.SGD(model.parameters(), lr=h.distill_lr)
        batches, value = self.drawn(net, counts), torch.zeros(())
        for _ in range(h.iterations):
            model.eval()
            for k in range(len(teachers)):
                x, y, noise = next(batches)
                value = generator_loss(teachers.member(k, x), model(x), y, alpha[k], h.adversarial)
                value = value + h.diversity / len(teachers) * diversity(x, noise)
                of_net.zero_grad()
                value.backward()
                of_net.step()
            model.train()
            for _step in range(h.distill_steps):
                with torch.no_grad():
                    x, y, _ = next(batches)
                    t = teachers.logits(x)
                of_model.zero_grad()
                student_loss(t, model(x), y, alpha).backward()
                of_model.step()
        self.log("loss/generator", value.item())
        self.state["generator"] = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
        return {name: v.detach().clone() for name, v in variable(model).items()}
