"""FedGKT: small extractors at the clients, a large network on their features at the server, teaching each other.

Box (He et al., "Group Knowledge Transfer: Federated Learning of Large CNNs at the Edge", NeurIPS 2020, arXiv
2007.14513). Client k holds an extractor h_k and a small head of its own; the server holds a tail g. In round t:

    client k:  min CE(f_k(x), y) + α·KL_T(z_s ‖ f_k(x)); sends h_k(x), z_k = f_k(x) and y for each private example
    server:    min KL_T(z_k ‖ g(h)) + α_s·CE(g(h), y) over all clients' examples
               sends z_s = g(h_k(x)) of each example to its client

with KL_T = T²·KL(softmax(teacher/T) ‖ softmax(student/T)). Travels: up |D_k|·(d + C)·B_f + 4·|D_k| bytes, down
|D_k|·C·B_f (unicast). **Labels and features of private examples leave the clients**: the run's notes say so.
Predicting needs both halves, so evaluation sends the features (and personal labels) of test examples up, counted as
evaluation traffic, and the server scores them.

Soft labels belong to a *sample's index*: row i is training example i, whatever order a loader draws. The released code
keys them by batch number, so that a shuffling loader pairs each with another example, and records server logits while
the tail still moves; here they are computed after training, in evaluation mode. Its α stands on KL at the client and
on CE at the server: two fields here. Choices: the cut is at `features(x)` (a vector of size d, the same for all
architectures), not at a feature map as in the paper's ResNet pair; the tail is any architecture of the zoo on vectors.
In the first round there are no server logits and clients train with cross-entropy alone. `distil.*` is the tail's
training, on all clients' features; what clients do is `train.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    Item,
    Layout,
    Metrics,
    Records,
    Shares,
    SplitClient,
    SplitStrategy,
    Topic,
    arrays,
    hyper,
    models,
    scores,
    strategy,
    training,
)


@dataclass(frozen=True)
class FedGKTHyper:
    """Hyper-parameters of FedGKT."""

    temperature: float = hyper(3.0, "T of both divergences", above=0)
    alpha: float = hyper(1.0, "α, weight of KL to the server's logits at the client", low=0)
    alpha_server: float = hyper(1.0, "α_s, weight of cross-entropy at the server", low=0, only="server_epochs")
    tail: str = hyper("mlp_wide", "the server's network: an architecture that takes feature vectors")
    server_epochs: int = hyper(1, "epochs of the tail on all clients' features each round", low=0, effort="epochs")
    server_batch: int = hyper(128, "batch size at the server", low=1, only="server_epochs", effort="batch_size")


class FedGKTClient(SplitClient):
    """Keeps extractor and head; learns from its labels and from the server's logits of its own examples."""

    personal = True
    teacher: Tensor | None = None

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Hold z_s ready for `fit`: row i is training example i."""
        self.teacher = knowledge["logits"].arrays["z"].to(self.workspace.device)

    def fit(self) -> Metrics:
        """CE + α·KL_T(z_s ‖ f), each example with its own row of z_s."""
        teacher, alpha = self.teacher, self.hyper.alpha
        distance = self.loss("kl", temperature=self.hyper.temperature)

        def step(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            value = F.cross_entropy(logits, y)
            return value if teacher is None else value + alpha * distance(logits, teacher[rows], y)

        return self.train(step)

    def share(self) -> Records:
        """Features, logits and labels of every training example, in index order."""
        labels = self.y.to(torch.int32)
        return {"knowledge": {"features": self._features(self.x), "logits": self.predict(self.x), "labels": labels}}

    def activations(self, split: str) -> Arrays:
        """Features of a split's examples."""
        return {"features": self._features(self.examples(split)[0])}

    def _features(self, x: Tensor) -> Tensor:
        return training.predict(self.model, x, self.scenario.config.evaluate.batch_size, features=True)


@strategy("fedgkt", client=FedGKTClient, hyper=FedGKTHyper, paper="He et al. 2020, arXiv 2007.14513")
class FedGKT(SplitStrategy):
    """Split learning by mutual distillation: small client networks, one large server tail on their features."""

    topics = {"logits": Topic("state", arrays(z=("examples", "classes")))}
    records = {
        "knowledge": arrays(
            features=("examples", "features"), logits=("examples", "classes"), labels=("int32", "examples")
        )
    }
    same_features = True
    distils = of_logits = True

    def tail(self) -> nn.Module:
        """The server's network g, holding its newest weights."""
        if not hasattr(self, "_tail"):
            built = models.build(
                self.hyper.tail,
                shape=(self._width,),
                classes=self.classes,
                seed=self.scenario.seed,
            )
            self._tail = built.to(self.workspace.device)
        if "tail" in self.state:
            self._tail.load_state_dict(self.state["tail"])
        return self._tail

    @property
    def _width(self) -> int:
        return int(self.workspace.model(self.architecture).feature_dim)  # type: ignore[arg-type]

    def begin(self) -> None:
        """The tail's initial weights depend on the seed alone."""
        self.state["tail"] = {name: value.detach().clone() for name, value in self.tail().state_dict().items()}

    def fuse(self, shares: Shares) -> None:
        """Train the tail on everybody's examples, then give each client the logits of its own."""
        h, device, tail = self.hyper, self.workspace.device, self.tail()
        known = {share.client: share.records["knowledge"] for share in shares}
        features, logits, labels = (
            torch.cat([content[name] for content in known.values()]).to(device)
            for name in ("features", "logits", "labels")
        )
        distance = self.loss("kl", temperature=h.temperature)

        def step(z: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            return distance(z, logits[rows], y) + h.alpha_server * F.cross_entropy(z, y)

        self.state["tail"] = self.distil(
            tail, features, labels.long(), step, purpose="tail", epochs=h.server_epochs, batch_size=h.server_batch
        )
        for client, content in known.items():
            self.publish("logits", {"z": self._judge(tail, content["features"])}, to=client)

    def _judge(self, tail: nn.Module, features: Tensor) -> Tensor:
        batch_size = self.scenario.config.evaluate.batch_size
        return self.predict(tail, features.to(self.workspace.device), batch_size).cpu()

    def server_halves(self) -> dict[str, tuple[str, Arrays, tuple[int, ...]]]:
        """The tail g, which takes a client's features."""
        return {"tail": (self.hyper.tail, self.state["tail"], (self._width,))}

    def activations(self, rows: int) -> Layout:
        """Layout of an evaluated set: its features."""
        return {"features": ("float32", (rows, self._width))}

    def score(self, content: Arrays, y: Tensor) -> Metrics:
        """Scores of the server's tail behind a client's extractor."""
        return scores(self._judge(self.tail(), content["features"]), y, self.classes)
