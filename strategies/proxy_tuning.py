"""Proxy-tuning: clients tune a small expert, and the server applies what it learned to a large model it never sends.

Box (Liu et al., "Tuning Language Models by Proxy", COLM 2024, arXiv 2401.08565; the dynamic weight and several experts:
Fan et al., "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", NeurIPS 2024, arXiv 2406.15480).
With M⁻ the small model as it was, M⁺ the small model after tuning, z their logits:

    client k:  trains the small model on its own data, from the common one; sends it
    server:    common model ← Σ_k n_k M⁺_k / Σ_k n_k, sent;   predicts with
               z = z_large + Σ_k α_k (z_{M⁺_k} − z_{M⁻})                                  at every place

*mean* has one expert, the common model; *each* has every client's own, as it sent it last, with α_k = α·w_k: equal
weights, or PackLLM's (Mavromatis et al. 2024, arXiv 2404.11531), λ_k = softmax(−CE_k/τ), where CE_k is the expert's
mean over what was read before the place. α = 1 is proxy-tuning. α = null is dynamic: at each place the α of
0, 0.1, …, 2 for which KL(fused ‖ large) is nearest to KL(M⁺ ‖ M⁻): the large model is moved as far as the small one
was. Of several experts `search=apart` finds each its own, α_k = w_k · the α of expert k alone; `together` one that
scales all weights, against Σ_k w_k KL(M⁺_k ‖ M⁻). The paper searches all α_k jointly for KL(fused ‖ large), one number;
many α_k meet it equally well, so that this is not what tells experts apart (both readings are ours).

Travels: P_small·B_f bytes each way, a client and round, and nothing of the large model, whatever its size. Both must
have one vocabulary. Training is federated averaging and does not depend on how the server predicts, so `alpha`,
`search`, `weights` and `tau` change its scores and no digest, nor does `experts` change the common model; what *each*
keeps at the server, every client's newest, is in the digest. Clients predict with the common small model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    AveragingStrategy,
    FusionClient,
    Shares,
    Sum,
    UserError,
    Workspace,
    hyper,
    next_token,
    strategy,
    training,
    without_effect,
)


@dataclass(frozen=True)
class ProxyTuningHyper:
    """Hyper-parameters of proxy-tuning.

    Raises
    ------
    UserError
        If there is a temperature of perplexity, and nobody is weighed by it.
    """

    large: str | None = hyper(None, "architecture of the server's model; null: mlp_wide, or cnn_large for images")
    alpha: float | None = hyper(1.0, "α, weight of what was learned; null: by a search at each place", low=0)
    search: str = hyper(
        "apart", "for α = null and several experts: an α each, or one for all", choices=("apart", "together")
    )
    experts: str = hyper("mean", "the common model, or every client's newest", choices=("mean", "each"))
    weights: str = hyper("uniform", "of `each`: equal, or by perplexity", choices=("uniform", "perplexity"))
    tau: float = hyper(1.0, "τ of perplexity, in nats per token", above=0)

    def __post_init__(self) -> None:
        if self.weights != "perplexity":
            without_effect(self, "tau", f"with strategy.weights={self.weights}, where all count alike")


GRID = torch.arange(21, dtype=torch.float64) / 10  # the α that are tried


def fused(large: Tensor, base: Tensor, experts: Tensor, w: Tensor, alpha: float | None, apart: bool = False) -> Tensor:
    """z = z_large + α Σ_k w_k (z_k − z_base).

    Parameters
    ----------
    large, base : Tensor
        Logits (N × V).
    experts : Tensor
        Logits (K × N × V).
    w : Tensor
        Weights (K × N).
    alpha : float or None
        None: as `searched` finds it.
    apart : bool
        Whether it finds one for each expert, α_k, which then multiplies w_k.
    """
    if alpha is None and apart:
        found = [searched(large, one - base, divergence(one, base)) for one in experts]
        w, alpha = w * torch.stack(found), 1.0
    shift = (w[..., None] * (experts - base)).sum(0)
    if alpha is not None:
        return large + alpha * shift
    moved = (w * divergence(experts, base)).sum(0)
    return large + searched(large, shift, moved)[:, None] * shift


def divergence(z: Tensor, other: Tensor) -> Tensor:
    """KL(softmax z ‖ softmax other) over the last axis."""
    p, q = z.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def searched(large: Tensor, shift: Tensor, moved: Tensor) -> Tensor:
    """The α of `GRID` (N,) for which KL(large + α·shift ‖ large) is nearest to `moved` (N,), the first of equals."""
    best, least = torch.zeros_like(moved), torch.full_like(moved, float("inf"))
    for alpha in GRID.tolist():
        miss = (divergence(large + alpha * shift, large) - moved).square()
        best, least = torch.where(miss < least, alpha, best), torch.minimum(miss, least)
    return best


def by_perplexity(experts: Tensor, tokens: Tensor, tau: float) -> Tensor:
    """λ_k (K × B × T) at each place, from the mean CE of the tokens (B × T) read up to it; equal before any.

    Place t has read tokens 0 … t; token t + 1 is what the logits (K × B × T × V) of place t say.
    """
    ahead = next_token.chain(experts[:, :, :-1].log_softmax(-1), tokens[:, 1:].expand(len(experts), -1, -1))
    count = torch.arange(1, tokens.shape[1], device=tokens.device)
    mean = torch.cat([ahead.new_zeros(*ahead.shape[:2], 1), ahead.cumsum(2) / count], 2)
    return (mean / tau).softmax(0)


class ProxyTuningClient(FusionClient):
    """Federated averaging of the small model."""


@strategy(
    "proxy_tuning",
    client=ProxyTuningClient,
    hyper=ProxyTuningHyper,
    paper="Liu et al. 2024, arXiv 2401.08565; Fan et al. 2024, arXiv 2406.15480",
)
class ProxyTuning(AveragingStrategy):
    """Small experts are tuned and averaged; the server adds what they learned to a large model's logits."""

    def __init__(self, hyper: ProxyTuningHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        shape = self.scenario.data.dataset.shape
        if hyper.large is None and self.scenario.data.dataset.kind == "tokens":
            raise UserError("strategy.large=null: name the server's language model, as causal_lm@<word> (model.paths)")
        flat = len(shape) != 3 or max(shape[1:]) <= 8
        self.large = hyper.large or ("mlp_wide" if flat else "cnn_large")
        texts = self.workspace.texts
        if texts.pieces(self.large) != texts.pieces(self.architecture):
            raise UserError(
                f"strategy.large={self.large}: {self.architecture} has another vocabulary, and logits are added"
            )
        self.workspace.initial(self.large)  # refuses one that cannot be built
        if hyper.weights != "uniform" and (hyper.experts == "mean" or not self.scenario.data.dataset.next_token):
            raise UserError("strategy.weights=perplexity weighs several experts of texts: set strategy.experts=each")
        if hyper.search != "apart" and (hyper.experts == "mean" or hyper.alpha is not None):
            raise UserError(
                "strategy.search=together is of several experts: set strategy.experts=each strategy.alpha=null"
            )

    @property
    def sums(self) -> Mapping[str, str | None]:
        """The mean is all that one expert needs."""
        return super().sums if self.hyper.experts == "mean" else {}

    def fuse(self, shares: Shares) -> None:
        """The common model; and each client's, where they are the experts."""
        if self.hyper.experts == "mean":
            super().fuse(shares)
            return
        total = Sum()
        for share in shares:
            if share.examples:
                total.add(share.group, share.records["model"], share.examples * share.weight)
                self.state[f"expert {share.client}"] = dict(share.records["model"])
        if self.state:
            self.publish("model", total.mean())

    def members(self) -> list[Arrays]:
        """The experts' weights."""
        if self.hyper.experts == "mean" or not self.state:
            return [self.model]
        return [self.state[name] for name in sorted(self.state, key=lambda name: int(name.split()[1]))]

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The large model, which predicts with the experts' help."""
        return {"large": (self.large, self.workspace.initial(self.large))}

    def predict(self, model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
        """Logits of the large model, which `model` holds, and the experts together."""
        small, load = self.architecture, self.workspace.loaded
        said = [training.predict(model, x, batch_size)]
        for arrays in (self.workspace.initial(small), *self.members()):
            said.append(training.predict(load(small, arrays), x, batch_size))
        if small == self.large:  # it stood in the same network
            load(self.large, self.workspace.initial(self.large))
        return self.together(said, x)

    def together(self, logits: list[Tensor], x: Tensor) -> Tensor:
        """The fused logits, from those of the large model, of the base and of each expert."""
        h, size = self.hyper, min(one.shape[-1] for one in logits)
        large, base, *rest = (one[..., :size].double() for one in logits)
        experts = torch.stack(rest)
        w = torch.full(experts.shape[:-1], 1 / len(experts), dtype=torch.float64, device=experts.device)
        if h.weights == "perplexity" and experts.ndim == 4:
            w = by_perplexity(experts, x, h.tau)
        n, flat = len(experts), (-1, size)
        z = fused(large.reshape(flat), base.reshape(flat), experts.reshape(n, *flat), w.reshape(n, -1), h.alpha,
                  h.search == "apart")  # fmt: skip
        return z.reshape(large.shape).float()
