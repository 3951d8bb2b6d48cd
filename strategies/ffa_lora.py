"""FFA-LoRA: A is random, frozen and common; clients train B only, so that averaging is exact.

Box (Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313). A ~
Kaiming, drawn from the run's seed by every site, a different draw per layer. In round t, for the sampled
clients S_t:

    client i:  B_i ← B_t; E epochs of SGD on B_i (and the head)
    server:    B_{t+1} ← Σ p_i B_i

Exact: Σ p_i B_i A = (Σ p_i B_i) A. Travels: b·r·d (and the head) each way, a client, a layer and a round; A
never, since one seed makes it.
"""

from __future__ import annotations

from fedfuse import AdapterClient, AdapterHyper, AdapterStrategy, strategy


class FFALoRAClient(AdapterClient):
    """Trains B in the rows of a fixed A."""

    trains = ("lora_B",)


@strategy("ffa_lora", client=FFALoRAClient, hyper=AdapterHyper, paper="Sun et al. 2024, arXiv 2403.12313")
class FFALoRA(AdapterStrategy):
    """Mean of LoRA's B, with A frozen and common: exact."""

    kinds = ("lora_B",)
