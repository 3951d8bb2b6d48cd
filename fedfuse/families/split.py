"""What strategies share whose network is cut in two: a client's half sees the examples, the server's half predicts.

To score a model takes both halves: an evaluation sends up what the client's half makes of test examples, with the
labels of sets that the server does not have. Halves that are trained together (`SteppedClient`, `SteppedStrategy`) run
through messages: an exchange (phase `forward`) is a mini-batch, its activations and labels go up, the slopes of its
loss ℓ with respect to these come back, and the client's half takes the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedfuse.core.client import FusionClient
from fedfuse.core.shares import Metrics, Records, Share, Shares
from fedfuse.core.strategy import FusionStrategy
from fedfuse.train import training
from fedfuse.train.batch import count_of
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import Arrays, InvalidArrays, Layout, Scope, validate


class SplitClient(FusionClient):
    """Client half of a cut network: an evaluation sends its activations."""

    def activations(self, split: str) -> Arrays:
        """What this half makes of the examples of a split."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self) -> tuple[Records, Metrics]:
        """Activations of test examples for the server to score; labels only of sets that the server does not have."""
        records: Records = {}
        for split in self.splits:
            examples = self.examples(split)
            if examples is not None:
                records[split] = self.activations(split)
                if split != "global":
                    records[split]["labels"] = examples[1].to(torch.int32)
        return records, {}


class SplitStrategy(FusionStrategy):
    """Server half of a cut network: scores what clients' halves make of test examples."""

    needs_features = True
    discloses = ("labels", "features")

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Labels are classes."""
        for content in records.values():
            if "labels" in content:
                check_labels(content["labels"], scope.dims["classes"])

    def activations(self, rows: int) -> Layout:
        """Layout of an evaluated set of so many examples, without its labels."""
        raise NotImplementedError

    def score(self, content: Arrays, y: Tensor) -> Metrics:
        """Metrics of activations with these labels."""
        raise NotImplementedError

    def judge(self, shares: Iterable[Share]) -> list[tuple[int, Metrics]]:
        """Score each client's activations by the server's half."""
        found = []
        for share in shares:
            metrics: Metrics = {}
            try:
                for split, content in share.records.items():
                    y = self._labels(split, content)
                    metrics |= {f"{split}/{name}": value for name, value in self.score(content, y).items()}
            except InvalidArrays as error:
                self.exclude(share, str(error))
                continue
            found.append((share.client, metrics))
        return found

    def _labels(self, split: str, content: Arrays) -> Tensor:
        """Labels of an evaluated set, once what came is found to be in order."""
        if split == "global":
            y: Tensor = self.workspace.tensors("test")[1].cpu()
        elif split in self.splits and "labels" in content:
            y = content["labels"]
        else:
            raise InvalidArrays(f"{split}: not asked for, or without labels")
        layout = self.activations(len(y))
        validate(split, content, layout if split == "global" else {**layout, "labels": ("int32", (len(y),))})
        check_labels(y, self.classes)
        return y.long()


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise `InvalidArrays` unless labels are classes."""
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise InvalidArrays(f"labels: not in 0 … {classes - 1}")


class SteppedClient(SplitClient):
    """Client half that is trained through messages; within a round its weights and optimiser are in `state`.

    Class attributes
    ----------------
    kept : tuple of str
        What of `state` outlives a round.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    slopes: Arrays | None = None  # of the last batch, once they are there

    def batch(self, rows: Tensor) -> Arrays:
        """Activations of training examples, and their labels."""
        raise NotImplementedError

    def learn(self, place: int, rows: Tensor, slopes: Arrays) -> None:
        """Use the slopes of a batch: `step`."""
        raise NotImplementedError

    def plan(self) -> list[Tensor]:
        """Rows of each exchange's batch."""
        t = self.training
        return list(training.batches(len(self.x), t.batch_size, t.epochs, self.seed, "split", self.client, self.round))

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Hold the slopes of the last batch ready, if there are new ones."""
        if "slopes" in knowledge:
            self.slopes = knowledge["slopes"].arrays

    @torch.no_grad()
    def forward(self) -> Records:
        """Take the last batch's step, and send the next one's activations; none where all is done."""
        self.advance()
        plan, place = self.plan(), self.state["place"]
        self.state["place"], self.state["half"] = place + 1, self.weights()
        return {"activations": self.batch(plan[place] if place < len(plan) else torch.empty(0, dtype=torch.int64))}

    def fit(self) -> Metrics:
        """Take the last step, for a client that has not done so already."""
        self.advance()
        count, loss = self.state["steps"], self.state["loss"]
        return {"num-examples": len(self.x), "steps": count, "loss": loss / count if count else float("nan")}

    def advance(self) -> None:
        """Begin the round, or learn from the slopes that came."""
        if self.state.get("round") != self.round:
            self.forget()
            self.state |= {"round": self.round, "place": 0, "steps": 0, "loss": 0.0}
            return
        self.load(self.state["half"])
        plan, last = self.plan(), self.state["place"] - 1
        if self.slopes is not None and last < len(plan):
            self.learn(last, plan[last], self.slopes)

    def step(self, gradients: Arrays, loss: Tensor) -> None:
        """One step of this round's optimiser on those parameters, by gradients of a batch's mean loss."""
        trained = {name: p for name, p in self.model.named_parameters() if name in gradients}
        for name, p in trained.items():
            p.grad = gradients[name]
        optimizer = self._kept_optimizer({"params": list(trained.values())})
        optimizer.step()
        optimizer.zero_grad()
        self._keep_optimizer(optimizer)
        self.state["loss"] += float(loss.mean())
        self.state["steps"] += 1

    def forget(self) -> None:
        """Drop of `state` what is of one round."""
        for name in self.state.keys() - set(self.kept):
            del self.state[name]


class SteppedStrategy(SplitStrategy):
    """Server half through which clients' halves are trained; publishes `slopes`, a lesson to one client."""

    def slopes(self, content: Arrays) -> Arrays:
        """Slopes of ℓ with respect to a batch's activations.

        Raises
        ------
        InvalidArrays
            If the batch is of the right layout and makes no sense.
        """
        raise NotImplementedError

    @property
    def exchanges(self) -> int:
        """As many as the client with the most examples has batches; who is done sends nothing."""
        train = self.scenario.config.train
        most = max(self.scenario.examples(client) for client in range(self.scenario.clients))
        return train.epochs * count_of(most, train.batch_size)

    def phases(self, round: int) -> tuple[str, ...]:
        """The exchanges, and what `fuse` merges."""
        return ("forward",) * self.exchanges + ("train",)

    def fuse_forward(self, shares: Shares) -> None:
        """Run this half forward and back on each client's batch, and send it its own slopes."""
        version = self.round * len(self.phases(self.round)) + self.place
        for share in shares:
            content = {name: v.to(self.workspace.device) for name, v in share.records["activations"].items()}
            if not len(content["labels"]):
                continue
            try:
                self.publish("slopes", self.slopes(content), to=share.client, version=version)
            except InvalidArrays as error:
                self.exclude(share, str(error))
