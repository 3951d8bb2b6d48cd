"""Fed-SB: clients train only the small R of W₀ + s·B R A in one common basis, so that averaging is exact.

Box (Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", 2025, arXiv 2502.15436; initialisation of LoRA-SB, arXiv 2411.19557). B
(d × r) and A (r × k) are frozen and orthonormal, s = α/r = 1. Before round 1, with g = Σ dL/dW₀ over a few
training rows (set-up):

    ΔW₀ = −η·sign(g) ≈ U_r S_r V_rᵀ;   B ← U_r,  A ← V_rᵀ,  R ← S_r (`r0=singular`) or 0 (`r0=zero`: the base model)

In round t, for the sampled clients S_t:

    client i:  R_i ← R_t; E epochs of SGD on R_i (and the head)
    server:    R_{t+1} ← R_t + γ·m,  m ← β·m + (Σ_i p_i R_i − R_t)          (β = 0, γ = 1: the mean)

Σ p_i B R_i A = B (Σ p_i R_i) A for any p, so partial participation and server momentum stay exact. Travels:
b·r² (and the head) each way, a client, a layer and a round. One-off: `random_orthonormal` and `weight_svd`
are computed by every site from the run's seed or from W₀, 32 bytes of hash a client; gradient inits send
b·r·(d+k) down, and up b·d·k (`init_from=clients`, per-client gradients whose sum is the pooled one),
b·q·(d+k) (`sketch`, their q leading triples) or nothing (`transfer`: the server's labelled set). A site whose
basis has another hash refuses to take part. The released code pools the clients' training data for the
gradient, which no federation can do; it sends A and B as well, and averages the R of all rounds so far: three
things not done here. The default is the paper's sign of the gradient, by sketch. Clients of smaller rank (`ranks`)
train the leading r_i × r_i block; each entry is averaged over the clients that hold it, and stays as it is where none
took part. The head takes the same server step as R. Choices of ours: R = 0 at the start, because S_r is as small as η;
and `refresh`, after every so many rounds (Δ = 0 before):

    Δ ← Δ + s·B R A,  R ← 0,  m ← 0,  B and A anew, over W₀ + Δ, as `init` says

which leaves the model as it is and lets later rounds learn outside the first basis. A refresh sends each node
2·b·r·(d+k) numbers once (or Δ, once that is smaller); gradient inits ask that round's clients for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse import BasisClient, BasisHyper, BasisStrategy, Shares, hyper, server_step, strategy


@dataclass(frozen=True)
class FedSBHyper(BasisHyper):
    """Hyper-parameters of Fed-SB: those of the basis (`init`, `refresh`, …), and the server's step."""

    server_momentum: float = hyper(0.0, "β", low=0, high=0.999)
    server_lr: float = hyper(1.0, "γ", above=0)


@strategy("fed_sb", client=BasisClient, hyper=FedSBHyper, paper="Singhal et al. 2025, arXiv 2502.15436")
class FedSB(BasisStrategy):
    """Mean of the small R of W₀ + B R A in one hashed basis: r² numbers a layer."""

    def fuse(self, shares: Shares) -> None:
        """Mean of R over its holders, then the server's step; then Δ and a new basis, if it is time."""
        old, momentum = self.state["R"], self.state.get("momentum", {})
        mean = self.mean_over_holders(shares)
        new, self.state["momentum"] = server_step(old, mean, momentum, self.hyper.server_momentum, self.hyper.server_lr)
        self.take_over(new)
