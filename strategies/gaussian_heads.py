"""Gaussian heads: once, clients tell moments of frozen features; the server's head is the pooled data's own LDA.

Box (GH-OFL, "Gaussian-Head One-shot Federated Learning", ICLR 2026, arXiv 2602.01186). A reconstruction: what travels
is the paper's, the closed form below is the textbook's linear discriminant. z = f(x) ∈ R^d are features of a frozen
encoder that all have alike, K clients, C classes:

    client k:  n_kc = #{y = c};   s_kc = Σ_{y=c} z;   S_k = Σ z zᵀ                       sends (n_k, s_k, S_k), once
    server:    n_c = Σ_k n_kc;  N = Σ_c n_c;  μ_c = Σ_k s_kc / n_c
               Σ = (Σ_k S_k − Σ_c n_c μ_c μ_cᵀ) / (N − C) + ε I
               logit_c(z) = log(n_c/N) + μ_cᵀ Σ⁻¹ z − ½ μ_cᵀ Σ⁻¹ μ_c,   a linear head: publishes its weight and bias

All that is used are sums, so the head is the centralised LDA's for every partition. Travels: up 8·(C·d + d(d+1)/2 + C)
bytes a client, in float64 (features are squared and subtracted); down 4·C·(d + 1). It tells the server how many
examples of each class a client has, and second moments of its features. Nothing is trained: the encoder is the
architecture's initial weights (`model.checkpoint` for a pretrained one), random features without a checkpoint.

Further rounds: a client tells its moments once and zeros from then on, so with `participation` below 1 the sums become
complete as clients come by, and otherwise nothing changes after round 1. Choices: C in N − C counts classes that
anybody holds; one that nobody holds gets weight 0 and bias −10³⁰. The paper's other heads (class-wise diagonal and
full covariances, heads trained on samples drawn from the moments) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedfuse import (
    Arrays,
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
    UserError,
    Workspace,
    WorldError,
    arrays,
    classwise,
    curvature,
    hyper,
    strategy,
)

NOBODY = -1e30  # bias of a class without examples: log 0, as a finite float32


@dataclass(frozen=True)
class GaussianHeadsHyper:
    """Hyper-parameters of Gaussian heads."""

    epsilon: float = hyper(1e-3, "ε, added to the diagonal of the covariance, in squared units of features", low=0)


def moments(z: Tensor, y: Tensor, classes: int) -> Arrays:
    """A client's n (C, int64), s (C × d) and the triangle of S (d(d+1)/2), float64, of features z (B × d)."""
    z = z.double()
    sums = torch.zeros(classes, z.shape[1], dtype=z.dtype, device=z.device).index_add(0, y, z)
    return {"n": torch.bincount(y, minlength=classes), "s": sums, "S": curvature.packed(z.T @ z)}


def discriminant(n: Tensor, s: Tensor, outer: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Weight (C × d) and bias (C) of LDA from summed moments, float64.

    Parameters
    ----------
    n, s, outer : Tensor
        n_c (C), Σ_k s_kc (C × d), Σ_k S_k (d × d), float64.
    epsilon : float
        ε.

    Raises
    ------
    WorldError
        If there are no more examples than classes, or Σ is singular.
    """
    held, total = n > 0, n.sum()
    if total <= held.sum():
        raise WorldError(f"{int(total)} examples of {int(held.sum())} classes: a covariance needs more of them")
    mean = s / n.clamp_min(1)[:, None]
    eye = torch.eye(len(outer), dtype=outer.dtype, device=outer.device)
    covariance = (outer - (mean.T * n) @ mean) / (total - held.sum()) + epsilon * eye
    # scaled to a diagonal of ones, so that a pivot tells whether features depend on each other, in whatever unit
    scale = covariance.diagonal().clamp_min(0).sqrt()
    factor, failed = torch.linalg.cholesky_ex(covariance / scale / scale[:, None])
    least = 0.0 if int(failed) or bool((scale == 0).any()) else float(factor.diagonal().square().min())
    if not least > len(outer) * 1e-14:
        raise WorldError("the covariance of the features is singular: set strategy.epsilon above 0")
    weight = torch.cholesky_solve((mean / scale).T, factor).T / scale
    bias = (n.clamp_min(1) / total).log() - (mean * weight).sum(1) / 2
    return weight * held[:, None], bias.where(held, torch.full_like(bias, NOBODY))


def moment_arrays(scope: Scope) -> Layout:
    """Layout of what a client tells."""
    classes, d = scope.dims["classes"], scope.dims["features"]
    return {"n": ("int64", (classes,)), "s": ("float64", (classes, d)), "S": ("float64", (d * (d + 1) // 2,))}


class GaussianHeadsClient(FusionClient):
    """Tells moments of its features, once; predicts with the encoder and the common head."""

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Put the head on the encoder."""
        if "head" in knowledge:
            self.load({f"head.{name}": value for name, value in knowledge["head"].arrays.items()}, strict=False)

    def fit(self) -> Metrics:
        """Nothing is trained."""
        return {"num-examples": len(self.y)}

    def share(self) -> Records:
        """Moments of the training examples' features; zeros if they have been told before."""
        kept = 0 if self.state.get("told") else len(self.y)
        self.state["told"] = True
        z = self.embed(self.x[:kept]) if kept else self.x.new_zeros(0, int(cast(Any, self.model).feature_dim))
        return {"moments": moments(z, self.y[:kept], self.classes)}


@strategy("gaussian_heads", client=GaussianHeadsClient, hyper=GaussianHeadsHyper, paper="GH-OFL 2026, arXiv 2602.01186")
class GaussianHeads(FusionStrategy):
    """The pooled data's linear discriminant on frozen features, from one message a client."""

    topics = {"head": Topic("state", arrays(weight=("classes", "features"), bias=("classes",)))}
    records = {"moments": moment_arrays}
    sums = {"moments": None}
    heterogeneous = False
    needs_features = True
    discloses = ("class counts", "second moments of features")

    def __init__(self, hyper: GaussianHeadsHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        head = getattr(workspace.model(self.architecture), "head", None)
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise UserError(
                f"model={self.architecture}: gaussian_heads sets a linear head with a bias, and its is "
                f"{type(head).__name__}"
            )

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Counts are counts, and squares are no smaller than the means' (Cauchy and Schwarz), feature by feature."""
        if "moments" not in records:  # summed beside the client, where it was looked at
            return
        told = records["moments"]
        n, s, outer = told["n"], told["s"], curvature.unpacked(told["S"])
        classwise.check_counts("moments/n", n, scope.dims["examples"])
        if bool((s[n == 0] != 0).any()):
            raise InvalidArrays("moments/s: a sum of features of a class without examples")
        least = (s.square() / n.clamp_min(1)[:, None]).sum(0)
        bound = outer.diagonal().clamp_min(0).sqrt()
        if bool((outer.diagonal() < least * (1 - 1e-6)).any()) or bool(
            (outer.abs() > bound * bound[:, None] * (1 + 1e-6)).any()
        ):
            raise InvalidArrays("moments/S: no sum of products of features with these sums")

    def fuse(self, shares: Shares) -> None:
        """Add what was told to what was told before, and solve."""
        told, _ = shares.total("moments")
        known = self.state.get("moments", {})
        self.state["moments"] = sums = {k: v.double() + known.get(k, 0) for k, v in told.items()}
        if not sums or not bool(sums["n"].any()):
            return
        weight, bias = discriminant(sums["n"], sums["s"], curvature.unpacked(sums["S"]), self.hyper.epsilon)
        self.publish("head", {"weight": weight.float().cpu(), "bias": bias.float().cpu()})

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The encoder and the head."""
        arrays = dict(self.workspace.initial(self.architecture))
        if ("head", "") in self.board.items:
            arrays |= {f"head.{name}": value for name, value in self.published("head").items()}
        return {"model": (self.architecture, arrays)}

    def notes(self) -> list[str]:
        """That features of random weights are no pretrained encoder's."""
        if not self.workspace.drawn(self.architecture):
            return []
        return [
            "gaussian_heads: nothing is trained but the head, and the encoder's weights are random: model.checkpoint "
            "or model.path starts from a pretrained one"
        ]
