"""FedNano: a frozen language model at the server reads what clients' encoders see; only small adapters are trained.

Box, a **reconstruction** (Zhang et al., "FedNano: Toward Lightweight Federated Tuning for Pretrained Multimodal Large
Language Models", arXiv 2506.14824; no code is public). What the abstract and reviews confirm: the language model stays
at the server, frozen; clients hold a frozen encoder and connector and one trainable low-rank NanoAdapter a modality;
the server merges these by their Fisher information. How gradients reach the clients is not said; here the network is
cut and both halves are run through messages. With e the embeddings (d numbers each) of an example's L image tokens,
connector(encoder(x)), or of a question's tokens, which the server sends once:

    adapter:   h = e + B A e, A (r × d) random, B (d × r) zero; one pair for images, one for the text
    step:      client sends h and y of a batch; server runs the language model on [h_image, h_text, answer_y],
               ℓ = −log p(answer_y | h), and sends ∂ℓ/∂h of each example; client: θ ← θ − η·mean ∂ℓ/∂θ
    round:     `train.epochs` passes of such steps from the common θ; then once more at θ_k, for
               F_k = mean (∂ℓ/∂θ_k)² over `samples` examples, the square of one example's slope; sends F_k, F_k θ_k
    server:    θ ← Σ_k n_k F_k θ_k / Σ_k n_k F_k, F_k at least `floor`

Where all F_k are equal this is FedAvg; `mu` adds FedProx's (μ/2)‖θ − θ_t‖² to ℓ, and `merge=local` leaves each client
its own adapters. One question is asked of all images, with the classes for answers; with `question=null` a class is a
question and its answer ("Is this a cat? yes"), and each example is scored among the answers to its own. Travels, a
client and round, P = 4·r·d: 2·P·B_f up, P·B_f down for the adapters, and for each example of each step
(L + L_text)·d·B_f down and L·d·B_f + 4 up, with all questions' tokens up a step: the activations, which the paper's
figure of 0.01 % of the parameters leaves out, are most of it. **Labels and features of private examples leave the
clients**; the run's notes say so. Predicting needs both halves, so evaluation sends the embeddings up, and the server
takes the class whose answer is the likeliest.

Choices: the adapters stand in the language model's embedding space; features(x) is the encoder's output; embeddings are
normalised over d; a client reads each image once a run, with the frozen encoder; the floor in place of an ε in the
denominator, which would draw weights of small F to 0. All clients make as many exchanges as the one with the most
examples; who is done sends nothing. Without `language` the model is a small transformer with random weights: a trial
of the machinery, not of the method. The adapters' own optimiser is Adam
at 0.01 (ours; with plain SGD at the platform's rate they collapse), so `train.lr` is heard with `optimizer=null` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    FusionClient,
    FusionStrategy,
    InvalidArrays,
    Item,
    Layout,
    Metrics,
    Records,
    Scope,
    Share,
    Shares,
    Topic,
    UserError,
    Workspace,
    arrays,
    hyper,
    model_topic,
    questions,
    reader,
    scores,
    soft_prompt,
    strategy,
    training,
    validate,
)


@dataclass(frozen=True)
class FedNanoHyper:
    """Hyper-parameters of FedNano."""

    language: str | None = hyper(None, "folder of the server's language model; null: a small random one", path=True)
    question: str | None = hyper("What is it?", "what is asked of every image; null: what its class says, with '? '")
    tokens: int = hyper(8, "L, embeddings that an image becomes", low=1)
    width: int = hyper(64, "d, numbers in an embedding: the language model's", low=4)
    letters: int = hyper(32, "most tokens of a question", low=1)
    rank: int = hyper(8, "r of the NanoAdapters", low=1)
    optimizer: str | None = hyper("adam", "of the adapters; null: train.optimizer and train.lr")
    lr: float = hyper(0.01, "η of that optimizer", above=0)
    merge: str = hyper("fisher", "weights F_k, or 1: FedAvg, or none", choices=("fisher", "fedavg", "local"))
    mu: float = hyper(0.0, "μ, pull to the round's common adapters: FedProx", low=0)
    samples: int = hyper(64, "most examples that F_k is taken over", low=1)
    floor: float = hyper(1e-6, "least entry of F_k", above=0)


class FedNanoClient(FusionClient):
    """Sends adapted embeddings, takes their slopes, and steps; within a round its adapters are in `state`."""

    model: Any
    start: Arrays
    slopes: Arrays | None = None

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Put connector and adapters behind the encoder; one without features is refused by the platform."""
        if not hasattr(model, "features"):
            return model
        return soft_prompt.SoftPrompt(model, hyper.tokens, hyper.width, hyper.rank)

    @property
    def training(self) -> Any:
        """The adapters' own optimiser, or the user's."""
        h, config = self.hyper, super().training
        return config if h.optimizer is None else replace(config, optimizer=h.optimizer, lr=h.lr)

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """The common adapters, the questions, and the slopes of the last batch if there are new ones."""
        self.start = self.state["own"] if "own" in self.state else knowledge["model"].arrays
        self.load(self.start)
        asked = {name: v.to(self.workspace.device) for name, v in knowledge["question"].arrays.items()}
        self.question, self.length, self.of = asked["e"], asked["length"], asked["of"].long()
        if "slopes" in knowledge:
            self.slopes = {name: v.to(self.workspace.device) for name, v in knowledge["slopes"].arrays.items()}

    def plan(self) -> list[Tensor]:
        """Rows of each step's batch, and last those of F_k."""
        n, t = len(self.x), self.training
        steps = list(training.batches(n, t.batch_size, t.epochs, self.seed, "split", self.client, self.round))
        return [*steps, torch.randperm(n, generator=self.generator("fisher"))[: self.hyper.samples]]

    @torch.no_grad()
    def image(self, split: str, rows: Tensor | None = None) -> Tensor:
        """Embeddings (n × L × d) of a split's images before the adapter; its features are kept while there is room."""
        x = self.examples(split)[0]
        if not len(x):
            return x.new_zeros(0, self.hyper.tokens, self.hyper.width)
        who = () if split == "global" else (self.client,)
        (z,) = self.workspace.kept(("features", split, self.architecture, *who), lambda: (self.embed(x),))
        return self.model.head(z if rows is None else z[rows.to(z.device)])

    @torch.no_grad()
    def forward(self) -> Records:
        """Take the last batch's step, and send the next one's embeddings and labels; none where all is done."""
        self._advance()
        plan, step = self.plan(), self.state["step"]
        rows = plan[step] if step < len(plan) else plan[0][:0]
        self.state["step"], self.state["adapters"] = step + 1, self.weights()
        text = self.model.text(self.question) if len(rows) else self.question[:0]
        image = self.model.image(self.image("train", rows))
        return {"activations": {"image": image, "text": text, "labels": self.y[rows].to(torch.int32)}}

    def _advance(self) -> None:
        """Begin the round, or use the slopes that came: for a step, or of the last batch for F_k."""
        if self.state.get("round") != self.round:
            own = {name: self.state[name] for name in ("own",) if name in self.state}
            self.state.clear()
            self.state |= {"round": self.round, "step": 0, "loss": 0.0, **own}
            return
        self.load(self.state["adapters"])
        plan, last = self.plan(), self.state["step"] - 1
        if self.slopes is None or last >= len(plan):
            return
        rows = plan[last]
        text = questions.spread(self.question, self.length, self.of[self.y[rows]])
        found: Arrays = {}
        for name, e in (("image", self.image("train", rows)), ("text", text)):
            both = getattr(self.model, name).slopes(e, self.slopes[name])
            found |= {f"{name}.{letter}": one for letter, one in zip("AB", both, strict=True)}
        if last == len(plan) - 1:
            self.state["fisher"] = {name: g.square().mean(0) for name, g in found.items()}
            return
        trained = {name: p for name, p in self.model.named_parameters() if name in found}
        for name, p in trained.items():
            p.grad = found[name].mean(0)
            if self.hyper.mu:
                p.grad += self.hyper.mu * (p.detach() - self.start[name])
        optimizer = self._kept_optimizer({"params": list(trained.values())})  # of the round, in `state`
        optimizer.step()
        optimizer.zero_grad()
        self._keep_optimizer(optimizer)
        self.state["loss"] += float(self.slopes["loss"].mean())

    def fit(self) -> Metrics:
        """Take what came last: F_k, or nothing for a client that has it already."""
        self._advance()
        steps = len(self.plan()) - 1
        loss = self.state["loss"] / steps if steps else float("nan")
        return {"num-examples": len(self.x), "steps": steps, "loss": loss}

    def share(self) -> Records:
        """F_k and F_k θ_k; nothing where adapters are not merged."""
        end, found = self.weights(), self.state.get("fisher", {})
        if self.hyper.merge == "local":
            self.state.clear()
            self.state["own"] = end
            return {"fisher": {}, "scaled": {}}
        flat = self.hyper.merge == "fedavg"
        f = {n: torch.ones_like(v) if flat else found.get(n, v * 0).clamp_min(self.hyper.floor) for n, v in end.items()}
        self.state.clear()
        return {"fisher": f, "scaled": {n: f[n] * end[n] for n in end}}

    @torch.no_grad()
    def evaluate(self) -> tuple[Records, Metrics]:
        """Embeddings of test examples for the server to read; labels only of sets that the server does not have."""
        records: Records = {}
        for split in self.splits:
            if (examples := self.examples(split)) is not None:
                image = self.model.image(self.image(split))
                records[split] = {"image": image, "text": self.model.text(self.question)}
                if split != "global":
                    records[split]["labels"] = examples[1].to(torch.int32)
        return records, {}


def merged(scope: Scope) -> Layout:
    """Layout of F_k, and of F_k θ_k."""
    return {} if scope.hyper.merge == "local" else scope.model


def asked(scope: Scope) -> Layout:
    """Layout of the questions: at most one a class."""
    most, d = -scope.dims["classes"], scope.hyper.width
    rows = most * scope.hyper.letters
    return {"e": ("float32", (rows, d)), "length": ("int32", (most,)), "of": ("int32", (-most,))}


def activations(scope: Scope) -> Layout:
    """Layout of a batch: its images' embeddings, all questions', labels."""
    most, h = -scope.dims["examples"], scope.hyper
    image = ("float32", (most, h.tokens, h.width))
    return {"image": image, "text": asked(scope)["e"], "labels": ("int32", (most,))}


@strategy("fednano", client=FedNanoClient, hyper=FedNanoHyper, paper="Zhang et al. 2025, arXiv 2506.14824")
class FedNano(FusionStrategy):
    """A frozen language model at the server, small adapters at the clients, merged by Fisher information."""

    topics = {
        "model": model_topic(),
        "question": Topic("state", asked, once=True),
        "slopes": Topic(
            "lesson",
            arrays(
                image=("<=examples", "tokens", "width"), text=("<=examples", "<=letters", "width"), loss=("<=examples",)
            ),
        ),
    }
    records = {"fisher": merged, "scaled": merged}
    records_forward = {"activations": activations}
    sums = {"fisher": "num-examples", "scaled": "num-examples"}  # type: ignore[assignment]
    heterogeneous = False
    needs_features = True
    discloses = ("labels", "features")

    def __init__(self, hyper: FedNanoHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        self.reader = reader.build(hyper.language, hyper.width, self.scenario.seed).to(workspace.device)
        names = [str(name) for name in self.scenario.data.dataset.classes]
        self.questions = questions.Questions(self.reader, names, hyper.question)
        for text, length in zip(self.questions.texts, self.questions.length.tolist(), strict=True):
            if not 0 < length <= hyper.letters:
                raise UserError(
                    f"strategy.question: {text!r} has {length} tokens; allowed is 1 to strategy.letters={hyper.letters}"
                )

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Labels are classes, an example each; F is positive."""
        for content in records.values():
            if "labels" in content:
                _check(content["labels"], scope.dims["classes"], len(content["image"]))
        for name, value in records.get("fisher", {}).items():
            if bool((value <= 0).any()):
                raise InvalidArrays(f"fisher/{name}: not positive")

    def begin(self) -> None:
        """The initial adapters, and the questions' embeddings."""
        super().begin()
        asked = self.questions
        self.publish("question", {"e": asked.e, "length": asked.length, "of": asked.of})

    def phases(self, round: int) -> tuple[str, ...]:
        """As many exchanges as the largest client has batches, one for F_k, and the merging."""
        train = self.scenario.config.train
        most = max(self.scenario.examples(client) for client in range(self.scenario.clients))
        return ("forward",) * (train.epochs * len(training.sizes_of(most, train.batch_size)) + 1) + ("train",)

    def fuse_forward(self, shares: Shares) -> None:
        """Run the language model forward and back on each client's batch, and send it its own slopes."""
        version = self.round * len(self.phases(self.round)) + self.place
        for share in shares:
            content = {name: v.to(self.workspace.device) for name, v in share.records["activations"].items()}
            if not len(content["labels"]):
                continue
            if len(content["text"]) != len(self.questions.e):
                self.exclude(share, f"activations/text: {len(content['text'])} tokens, the questions have others")
                continue
            self.publish("slopes", self.slopes(**content), to=share.client, version=version)

    def slopes(self, image: Tensor, text: Tensor, labels: Tensor) -> Arrays:
        """ℓ (n,), and ∂ℓ/∂h of each example's image tokens (n × L × d) and text tokens (n × L_text × d)."""
        image, own = image.clone().requires_grad_(), self.questions
        text = questions.spread(text, own.length, own.of[labels.long().cpu()]).requires_grad_()
        loss = own.loss(image, text, labels)
        slope_image, slope_text = torch.autograd.grad(loss.sum(), (image, text))
        return {"image": slope_image, "text": slope_text, "loss": loss.detach()}

    def fuse(self, shares: Shares) -> None:
        """θ ← Σ n F θ / Σ n F."""
        if self.hyper.merge == "local":
            return
        (f, weight), (scaled, _) = shares.total("fisher"), shares.total("scaled")
        if weight:  # else nobody has an example: what is published stays
            self.publish("model", {name: (scaled[name] / f[name]).to(self.model[name].dtype) for name in f})

    def judge(self, shares: Iterable[Share]) -> list[tuple[int, Metrics]]:
        """Score each client's embeddings by the language model."""
        found = []
        for share in shares:
            metrics: Metrics = {}
            try:
                for split, content in share.records.items():
                    y = self._labels(split, content)
                    image, text = (content[name].to(self.workspace.device) for name in ("image", "text"))
                    z = self.questions.scores(image, text, y, self.scenario.config.evaluate.batch_size).cpu()
                    for name, value in {**scores(z, y, self.classes), **self._kinds(z, y)}.items():
                        metrics[f"{split}/{name}"] = value
            except InvalidArrays as error:
                self.exclude(share, str(error))
                continue
            found.append((share.client, metrics))
        return found

    def _kinds(self, z: Tensor, y: Tensor) -> Metrics:
        """Accuracy on questions with k answers, by k, where some have more than others."""
        counts = torch.bincount(self.questions.of.long())
        some = counts[self.questions.of[y].long()]
        kinds = some.unique().tolist() if len(counts) > 1 else []
        right = (z.argmax(1) == y).double()
        return {f"accuracy_of_{k}": float(right[some == k].mean()) for k in kinds}

    def _labels(self, split: str, content: Arrays) -> Tensor:
        """Labels of an evaluated set, once what came is found to be in order."""
        if split == "global":
            y = self.workspace.tensors("test")[1].cpu()
        elif split in self.splits and "labels" in content:
            y = content["labels"]
        else:
            raise InvalidArrays(f"{split}: not asked for, or without labels")
        h = self.hyper
        layout: Layout = {
            "image": ("float32", (len(y), h.tokens, h.width)), "text": ("float32", (len(self.questions.e), h.width))
        }  # fmt: skip
        if split != "global":
            layout["labels"] = ("int32", (len(y),))
        validate(split, content, layout)
        _check(y, self.classes, len(y))
        return y.long()


def _check(labels: Tensor, classes: int, rows: int) -> None:
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise InvalidArrays(f"labels: not in 0 … {classes - 1}")
    if len(labels) != rows:
        raise InvalidArrays(f"labels: {len(labels)} for {rows} examples")
