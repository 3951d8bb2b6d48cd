"""Task arithmetic: the sum of everybody's task vectors, times one number.

Box (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089, section 4). In round t, θ₀ the
broadcast:

    client k:  θ_k ← θ₀; E epochs of SGD;   τ_k = θ_k − θ₀
    server:    θ ← θ₀ + λ Σ_k τ_k

Travels: P·B_f bytes each way, a client and round; with `rank=r` LoRA's A and B and the head instead of the network.
λ = 1/K is FedAvg with equal weights; λ·K is the factor on the mean update. The paper takes one pretrained θ₀ and 8
tasks, merges once and finds λ of 0.3 to 0.4 on held-out data: λ·K of 2.4 to 3.2. Here θ₀ is each round's, and such
steps diverge (digits, 10 rounds of 10 clients: 40 % where FedAvg has 92 %), so by default λ·K = 1.2 (ours). A sum needs
no list of task vectors, so it is the same bits for any number of workers. Buffers are averaged, clients alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse import MergingClient, MergingHyper, MergingStrategy, Shares, hyper, strategy


@dataclass(frozen=True)
class TaskArithmeticHyper(MergingHyper):
    """Hyper-parameters of task arithmetic."""

    lam: float | None = hyper(
        None, "λ, factor on the sum of task vectors; null: 1.2/K (paper: 0.3 to 0.4 for 8 tasks, once)", above=0
    )


@strategy(
    "task_arithmetic",
    client=MergingClient,
    hyper=TaskArithmeticHyper,
    paper="Ilharco et al. 2023, arXiv 2212.04089",
)
class TaskArithmetic(MergingStrategy):
    """θ₀ plus λ times the sum of task vectors."""

    sums = {"model": None}

    def fuse(self, shares: Shares) -> None:
        """θ ← θ₀ + λ Σ τ_k."""
        self.fuse_sum(shares, self.hyper.lam)
