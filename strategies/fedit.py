"""FedIT: clients train LoRA, the server averages A and B apart.

Box (Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024, arXiv
2305.05644, and its Shepherd code). In round t, for the sampled clients S_t, every adapted layer being W₀ +
s·B A:

    client i:  (A_i, B_i) ← (A_t, B_t); E epochs of SGD on both (and the head)
    server:    A_{t+1} ← Σ p_i A_i,   B_{t+1} ← Σ p_i B_i

Travels: b·r·(d+k) (and the head) each way, a client, a layer and a round. Not exact: the mean of the products
is not the product of the means, B̄ Ā ≠ Σ p_i B_i A_i, which every exact rule beside this one answers in its
own way.
"""

from __future__ import annotations

from fedfuse import AdapterClient, AdapterHyper, AdapterStrategy, strategy


@strategy("fedit", client=AdapterClient, hyper=AdapterHyper, paper="Zhang et al. 2024, arXiv 2305.05644")
class FedIT(AdapterStrategy):
    """Mean of LoRA's A and of its B."""

    kinds = ("lora_A", "lora_B")
