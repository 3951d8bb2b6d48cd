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

from collections.abc import Callable

from torch import nn

from fedfuse import AdapterClient, AdapterHyper, AdapterStrategy, Records, Topic, lora, strategy


class FFALoRAClient(AdapterClient):
    """Trains B in the rows of a fixed A."""

    @staticmethod
    def equip(model: nn.Module, hyper: AdapterHyper, build: Callable[[str], nn.Module]) -> nn.Module:
        """LoRA with A fixed."""
        return lora.equip(model, hyper, trains=("lora_B",))

    def share(self) -> Records:
        """B and the head."""
        return {"adapter": self.parts("lora_B")}


@strategy("ffa_lora", client=FFALoRAClient, hyper=AdapterHyper, paper="Sun et al. 2024, arXiv 2403.12313")
class FFALoRA(AdapterStrategy):
    """Mean of LoRA's B, with A frozen and common: exact."""

    topics = {"adapter": Topic("state", lora.part("lora_B"))}
    records = {"adapter": lora.part("lora_B")}

    def publish_initial(self) -> None:
        """B = 0 and the head."""
        self.publish("adapter", self.parts("lora_B"))
