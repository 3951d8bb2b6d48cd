"""FedSA-LoRA: A is shared, B stays with each client.

Box (Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv
2410.01463). In round t, for the sampled clients S_t:

    client i:  A_i ← A_t, B_i its own of last time; E epochs of SGD on both (and its own head)
    server:    A_{t+1} ← Σ p_i A_i

A carries what is common, B what is a client's own. There is no global model. Travels: b·r·k each way, a
client, a layer and a round; nothing of the head, which is personal as in the paper's configuration
(`head=aggregated` shares it).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfuse import AdapterClient, AdapterHyper, AdapterStrategy, Arrays, hyper, strategy


@dataclass(frozen=True)
class FedSALoRAHyper(AdapterHyper):
    """Hyper-parameters of FedSA-LoRA."""

    head: str = hyper("personal", "classification heads", choices=("aggregated", "personal", "frozen"))


class FedSALoRAClient(AdapterClient):
    """Trains A and B, keeps B."""

    own = ("lora_B",)


@strategy("fedsa_lora", client=FedSALoRAClient, hyper=FedSALoRAHyper, paper="Guo et al. 2025, arXiv 2410.01463")
class FedSALoRA(AdapterStrategy):
    """Mean of LoRA's A; B and head are personal."""

    kinds = ("lora_A",)

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """None: every client's model is its own."""
        return {}
