"""FedMD: clients agree on the logits of a shared set, each with its own architecture.

Box (Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019, arXiv 1910.03581). Before
round 1 each party trains on the labelled public data (if it is labelled), then on its own. In round t, with D_t ⊂ D_pub
redrawn each round:

    client k:  sends the logits f_k(x), x ∈ D_t
    server:    f̃(x) = (1/m) Σ_k f_k(x)
    client k:  *digest*: fits f_k to f̃ on D_t with mean absolute error; *revisit*: a few epochs on its own data

Travels: |D_t|·C·B_f bytes each way, a client and round. What the paper leaves open, and the reading here: the consensus
of round t is digested at the start of the client's next round (the same order of steps, shifted by half a round), and
stands on its own round's rows; an absent client digests only the newest consensus; one that comes late trains on the
public data before its first digest. The authors score a party after its revisit, before the next digest: that is
`evaluate.moment=trained`; the default scores what has digested. Architectures may differ. The digest has Adam at 10⁻³,
as in the authors' code, unless `distil.*` says otherwise; their 25 epochs of private training before round 1 are not
made. With the clients' SGD at 0.05 and momentum, a consensus of networks that know little yet takes the convolutions'
features to nothing (docs/distillation.md has the figures).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedfuse import (
    FusionClient,
    FusionStrategy,
    Item,
    Metrics,
    Records,
    Shares,
    Topic,
    UserError,
    Workspace,
    arrays,
    hyper,
    strategy,
)


@dataclass(frozen=True)
class FedMDHyper:
    """Hyper-parameters of FedMD."""

    subset: int | None = hyper(
        None, "|D_t|, rows redrawn each round; null: the whole transfer set (paper: 5000)", low=1
    )
    digest_epochs: int | None = hyper(
        None,
        "epochs of the digest; null: as many as make the paper's 40 steps, which are one of 5000 rows",
        low=0,
        effort="epochs",
    )
    digest_batch: int = hyper(128, "batch size of the digest", low=1, only="digest_epochs", effort="batch_size")
    public_epochs: int = hyper(0, "epochs on the labelled transfer set before round 1 (0: none)", low=0)


class FedMDClient(FusionClient):
    """Keeps its own model; digests the consensus, then revisits its own data."""

    personal = True

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Digest: min over own weights of mean |f_k(x) − f̃(x)|, x ∈ the consensus' own rows."""
        h, item = self.hyper, knowledge["consensus"]
        self.learn_public()
        x, y = self.workspace.transfer(self.subset(h.subset, item.version))
        digest = self.loss("mae").towards_logits(item.arrays["logits"].to(self.workspace.device))
        self.distil(
            digest, x, y, epochs=h.digest_epochs, batch_size=h.digest_batch, steps=40, optimizer="adam", lr=1e-3
        )

    def fit(self) -> Metrics:
        """Revisit: cross-entropy on private data."""
        self.learn_public()
        return self.train()

    def learn_public(self) -> None:
        """Train on the labelled transfer set, once and before all else."""
        labels = self.transfer_labels
        if self.hyper.public_epochs and labels is not None and "public" not in self.state:
            self.state["public"] = True
            self.train(x=self.transfer, y=labels, purpose="public", epochs=self.hyper.public_epochs)

    def share(self) -> Records:
        """Logits on this round's rows, in ascending row order."""
        return {"logits": {"logits": self.predict(self.workspace.transfer(self.subset(self.hyper.subset))[0])}}


@strategy("fedmd", client=FedMDClient, hyper=FedMDHyper, paper="Li and Wang 2019, arXiv 1910.03581")
class FedMD(FusionStrategy):
    """Mean logits on a shared set; clients digest them with mean absolute error."""

    topics = {"consensus": Topic("lesson", arrays(logits=("subset", "classes")))}
    records = {"logits": arrays(logits=("subset", "classes"))}
    sums = {"logits": None}
    of_classes = True
    transfer = "clients"
    distils = whole = of_logits = True
    staleness = "newest"

    def __init__(self, hyper: FedMDHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        if hyper.public_epochs and not self.scenario.config.transfer.labelled:
            raise UserError(f"strategy.public_epochs={hyper.public_epochs} needs labels: set transfer.labelled=true")

    def fuse(self, shares: Shares) -> None:
        """f̃ = (1/m) Σ_k f_k, over the m participants that have examples."""
        self.publish("consensus", shares.mean("logits"))
