"""RoLoRA: one round trains and averages B, the next A; the other factor is frozen and common, so that it is exact.

Box (Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025,
arXiv 2502.01755; read at abstract level). In round t, for the sampled clients S_t:

    odd t:   client i: B_i ← B_t, E epochs of SGD on B_i (and the head);   server: B_{t+1} ← Σ p_i B_i
    even t:  client i: A_i ← A_t, E epochs of SGD on A_i (and the head);   server: A_{t+1} ← Σ p_i A_i

Exact, since the frozen factor is common. B goes first, because it starts at zero. Travels: b·r·d or b·r·k
(and the head) each way, a client, a layer and a round: the frozen factor is sent only to those who missed its
last change.
"""

from __future__ import annotations

from fedfuse import AdapterClient, AdapterHyper, AdapterStrategy, Metrics, Records, Shares, Topic, lora, strategy


def active(round: int) -> str:
    """The factor that a round trains."""
    return "lora_B" if round % 2 else "lora_A"


class RoLoRAClient(AdapterClient):
    """Trains one factor a round."""

    def fit(self) -> Metrics:
        """Train the active factor and the head."""
        kind = (active(self.round),)
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        metrics = self.train(params=[p for n, p in named if lora.is_head(n) or lora.in_parts(n, kind)])
        self.keep()
        return metrics

    def share(self) -> Records:
        """The active factor whole, the other empty, and the head."""
        now = active(self.round)
        other = "lora_A" if now == "lora_B" else "lora_B"
        return {"adapter": self.parts(now) | lora.cut(self.parts(other, head=False), 0)}


@strategy("rolora", client=RoLoRAClient, hyper=AdapterHyper, paper="Chen et al. 2025, arXiv 2502.01755")
class RoLoRA(AdapterStrategy):
    """Mean of B and of A in turn, the other frozen: exact at half of LoRA's bytes."""

    topics = {
        "A": Topic("state", lora.part("lora_A", head=False)),
        "B": Topic("state", lora.part("lora_B", head=False)),
        "head": Topic("state", lora.part()),
    }
    records = {"adapter": lora.at_most(lora.part("lora_A", "lora_B"))}
    sums = {}

    def publish_initial(self) -> None:
        """B = 0 and the head; A is the seed's and known to all."""
        self.publish("B", self.parts("lora_B", head=False))
        if head := self.parts():
            self.publish("head", head)

    def fuse(self, shares: Shares) -> None:
        """Mean of the active factor and of the head."""
        kind = active(self.round)
        wanted = self.parts(kind)

        def whole(share):
            return {name: share.records["adapter"][name] for name in wanted}

        fitting = []
        for share in shares:
            if all(value.shape == wanted[name].shape for name, value in whole(share).items()):
                fitting.append(share)
            else:
                self.exclude(share, f"sent another factor than {kind}")
        mean = self.mean((share, whole(share)) for share in fitting)
        self.publish(kind[-1], {n: v for n, v in mean.items() if not lora.is_head(n)})
        if head := {n: v for n, v in mean.items() if lora.is_head(n)}:
            self.publish("head", head)
