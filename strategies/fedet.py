"""Fed-ET: an ensemble of small client models of many architectures teaches one larger model at the server.

A reconstruction from the abstract and from secondary descriptions, not from the full text (Cho et al., "Heterogeneous
Ensemble Knowledge Transfer for Training Large Models in Federated Learning", IJCAI 2022, arXiv 2204.12703). As read
here, in round t, D_t unlabelled and known to the server only:

    client k:  w_k ← the model of its architecture; E epochs of SGD on its labels; sends w_k
    server:    z_k = f(w_k, x), x ∈ D_t;   a_k(x) = Var_c z_k(x) / Σ_j Var_c z_j(x)          confidence weights
               ŷ(x) = argmax Σ_k a_k z_k                                                     consensus
               K(x) = {k : argmax z_k ≠ ŷ};   z_div = Σ_{k∈K} a_k z_k / Σ_{k∈K} a_k          those who disagree
               larger model:  min CE(h(x), ŷ) + λ·KL(σ(z_div) ‖ σ(h(x)))  (where K is not empty), from its last weights
               with the common layer of all w_k averaged into it; its trained common layer goes back to everybody
               w_p ← mean of the w_k of architecture p, with that layer; sent

Reconstructed, and so ours: which layer is common and its place. Every network, the server's too, is equipped with
encoder → linear to `representation` units → common layer (representation × representation) → output layer, the first
two of these drawn as He et al. (2015) do for rectified units. Client models and layers are averaged by examples. How
long the larger model is taught and with which optimiser: five passes of the clients' own SGD over 100 unlabelled
examples are ten steps, after which it did not even repeat ŷ of those rows, and answered one class for all (10.0 %); so
20 passes of Adam. Travels: P_small·B_f bytes each way. The third-party code (noise as proxy, performance-weighted
logits) is not followed. Clients predict with their small model, the figures on the global set are the large model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse import Arrays, FusionClient, FusionStrategy, Shares, Sum, Workspace, distil, hyper, parts, strategy


@dataclass(frozen=True)
class FedETHyper:
    """Hyper-parameters of Fed-ET."""

    large: str | None = hyper(None, "architecture of the server's model; null: mlp_wide, or cnn_large for images")
    lam: float = hyper(0.05, "λ, weight of the diversity term", low=0, only="distill_epochs")
    representation: int = hyper(64, "units of the common layer", low=1)
    distill_epochs: int = hyper(20, "passes over D_t each round (ours)", low=0, effort="epochs")
    distill_batch: int = hyper(64, "batch size at the server", low=1, only="distill_epochs", effort="batch_size")
    distill_lr: float = hyper(
        1e-3, "Adam's learning rate at the server (ours)", above=0, only="distill_epochs", effort="lr"
    )


def weights_of(logits: Tensor) -> Tensor:
    """a_k(x) (K × T): each client's variance over classes, as a share of all; equal where nobody has any."""
    variance = logits.var(-1, correction=0)
    total = variance.sum(0)
    return torch.where(total > 0, variance / total.clamp_min(1e-300), 1 / len(logits))


def consensus(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ŷ (T,), σ(z_div) (T × C) and where somebody disagrees (T,), from logits (K × T × C)."""
    a = weights_of(logits)
    label = (a[..., None] * logits).sum(0).argmax(-1)
    against = a * (logits.argmax(-1) != label)
    total = against.sum(0)
    mixed = (against[..., None] * logits).sum(0) / total.clamp_min(1e-300)[:, None]
    return label, mixed.softmax(-1), total > 0


class Layered(nn.Module):
    """An encoder, a layer to the common width, the common layer, the output layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.neck = nn.Linear(int(encoder.feature_dim), width)  # type: ignore[arg-type]
        self.common, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        self.encoder, self.feature_dim = encoder, width
        encoder.head = nn.Identity()  # its place is taken
        for added in (self.neck, self.common):  # at PyTorch's third of this, ten short rounds stay at chance
            nn.init.kaiming_normal_(added.weight, nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Return what the common layer makes of the encoder's features."""
        return self.common(self.neck(self.encoder.features(x)).relu()).relu()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.features(x))


class FedETClient(FusionClient):
    """FedAvg's client, with the common layer in its model."""

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add the common layer."""
        if not hasattr(model, "features"):
            return model
        with parts.seeded_by(model, "common layer"):
            return Layered(model, hyper.representation, parts.classes_of(model))


def layer(arrays: Arrays) -> Arrays:
    """The common layer's arrays."""
    return {name: value for name, value in arrays.items() if name.startswith("common.")}


@strategy("fedet", client=FedETClient, hyper=FedETHyper, paper="Cho et al. 2022, arXiv 2204.12703 (reconstruction)")
class FedET(FusionStrategy):
    """Small models teach a large one by a confidence-weighted consensus with diversity (reconstruction)."""

    transfer = "server"
    distils = True
    needs_features = True

    def __init__(self, hyper: Any, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        shape = self.scenario.data.dataset.shape
        small = len(shape) != 3 or max(shape[1:]) <= 8
        self.large = hyper.large or ("mlp_wide" if small else "cnn_large")
        workspace.build(self.large)  # says now if there is no such architecture

    @property
    def names(self) -> list[str]:
        """The clients' architectures."""
        return sorted(set(self.scenario.architectures))

    def begin(self) -> None:
        """Publish the initial models, all with the large model's common layer."""
        self.state["large"] = dict(self.workspace.initial(self.large))
        for name in self.names:
            self._publish(name, self.workspace.initial(name))

    def _publish(self, name: str, arrays: Arrays) -> None:
        to = name if len(self.names) > 1 else None
        self.publish("model", {**arrays, **layer(self.state["large"])}, to=to)

    def fuse(self, shares: Shares) -> None:
        """Average by architecture, teach the large model, send its common layer back."""
        h: FedETHyper = self.hyper
        x, _ = self.workspace.tensors("transfer")
        means: dict[str, Sum] = {}
        common, logits = Sum(), []
        for share in shares:
            if share.examples == 0:
                continue
            name, arrays = self.scenario.architectures[share.client], share.records["model"]
            group = share.group
            means.setdefault(name, Sum()).add(group, arrays, share.examples)
            common.add(group, layer(arrays), share.examples)
            if distil.happens(self.scenario.config.distil, h.distill_epochs):
                logits.append(self.predict(self.workspace.loaded(name, arrays), x, h.distill_batch).double())
        self.state["large"] = {**self.state["large"], **common.mean()}
        if logits:
            self.state["large"] = self._teach(x, *consensus(torch.stack(logits)))
        for name in self.names:
            to = name if len(self.names) > 1 else None
            self._publish(name, means[name].mean() if name in means else self.published("model", to))

    def _teach(self, x: Tensor, label: Tensor, diverse: Tensor, there: Tensor) -> Arrays:
        h, loss, diverse = self.hyper, self.loss("kl"), diverse.float()

        def both(out: Tensor, _: Tensor | None, rows: Tensor) -> Tensor:
            value, some = F.cross_entropy(out, label[rows]), there[rows]
            if h.lam and bool(some.any()):
                share = some.double().mean().to(out.dtype)  # rows without disagreement add nothing
                value = value + h.lam * share * loss.from_probabilities(
                    out[some], diverse[rows][some], label[rows][some]
                )
            return value

        model = self.workspace.loaded(self.large, self.state["large"])
        self.log("disagreement", float(there.double().mean()))
        rate = {"lr": h.distill_lr, "optimizer": "adam"}
        passes = {"epochs": h.distill_epochs, "batch_size": h.distill_batch}
        return self.distil(model, x, None, both, purpose="large", **passes, **rate)

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The large model."""
        return {"large": (self.large, self.state["large"])}
