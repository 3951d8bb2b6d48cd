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

Where all F_k are equal this is FedAvg; `merge=fedavg` takes and sends no F_k, and `merge=local` leaves each client its
own adapters; `mu` adds FedProx's (μ/2)‖θ − θ_t‖² to ℓ. One question is asked of all images, with the classes for
answers; with `question=null` a class is a question and its answer ("Is this a cat? yes"), and each example is scored
among the answers to its own. Travels, a client and round, P = 4·r·d: 2·P·B_f up (P·B_f without F_k), P·B_f down for
the adapters, and for each example of each step (L + L_text)·d·B_f down and L·d·B_f + 4 up, with all questions' tokens
up a step: the activations, which the paper's figure of 0.01 % of the parameters leaves out, are most of it. **Labels
and features of private examples leave the clients**; the run's notes say so. Predicting needs both halves, so
evaluation sends the embeddings up, and the server takes the class whose answer is the likeliest.

Choices: the adapters stand in the language model's embedding space; features(x) is the encoder's output; embeddings are
normalised over d; a client reads each image once a run, with the frozen encoder; the floor in place of an ε in the
denominator, which would draw weights of small F to 0. All clients make as many exchanges as the one with the most
examples; who is done sends nothing. Without `language` the model is a small transformer with random weights: a trial
of the machinery, not of the method. The adapters' own optimiser is Adam at 0.01 (ours; with plain SGD at the
platform's rate they collapse), so `train.lr` is heard with `optimizer=null` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    InvalidArrays,
    Item,
    Layout,
    Metrics,
    Records,
    Scope,
    Shares,
    SteppedClient,
    SteppedStrategy,
    Topic,
    Workspace,
    arrays,
    hyper,
    model_topic,
    questions,
    reader,
    scores,
    soft_prompt,
    strategy,
    without_effect,
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
    merge: str = hyper("fisher", "weights F_k, or alike: FedAvg, or none", choices=("fisher", "fedavg", "local"))
    mu: float = hyper(0.0, "μ, pull to the round's common adapters: FedProx", low=0)
    samples: int = hyper(64, "most examples that F_k is taken over", low=1)
    floor: float = hyper(1e-6, "least entry of F_k", above=0)

    def __post_init__(self) -> None:
        if self.optimizer is None:
            without_effect(self, "lr", "with strategy.optimizer=null, where train.lr says it")
        for name in ("samples", "floor") if self.merge != "fisher" else ():
            without_effect(self, name, f"with strategy.merge={self.merge}, which takes no F_k")


class FedNanoClient(SteppedClient):
    """Sends adapted embeddings, takes their slopes, and steps."""

    model: Any
    start: Arrays
    kept = ("own",)

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
        """The common adapters or one's own, the questions, and the slopes of the last batch."""
        super().receive(knowledge)
        self.start = self.state["own"] if "own" in self.state else knowledge["model"].arrays
        self.load(self.start)
        asked = knowledge["question"].arrays
        self.question, self.length, self.of = asked["e"], asked["length"], asked["of"].long()

    def plan(self) -> list[Tensor]:
        """Rows of each step's batch, and last those of F_k."""
        steps = super().plan()
        if self.hyper.merge != "fisher":
            return steps
        return [*steps, torch.randperm(len(self.x), generator=self.generator("fisher"))[: self.hyper.samples]]

    @torch.no_grad()
    def image(self, split: str, rows: Tensor | None = None) -> Tensor:
        """Embeddings (n × L × d) of a split's images before the adapter; its features are kept while there is room."""
        x = self.examples(split)[0]
        if not len(x):
            return x.new_zeros(0, self.hyper.tokens, self.hyper.width)
        who = () if split == "global" else (self.client,)
        (z,) = self.workspace.kept(("features", split, self.architecture, *who), lambda: (self.embed(x),))
        return self.model.head(z if rows is None else z[rows.to(z.device)])

    def activations(self, split: str) -> Arrays:
        """Adapted embeddings of all images of a split, and of all questions."""
        return {"image": self.model.image(self.image(split)), "text": self.model.text(self.question)}

    def batch(self, rows: Tensor) -> Arrays:
        """Adapted embeddings of some training images and of all questions, and labels."""
        text = self.model.text(self.question) if len(rows) else self.question[:0]
        image = self.model.image(self.image("train", rows))
        return {"image": image, "text": text, "labels": self.y[rows].to(torch.int32)}

    def learn(self, place: int, rows: Tensor, slopes: Arrays) -> None:
        """∂ℓ/∂θ of each example: a step by their mean; of the last batch, F_k."""
        text = questions.spread(self.question, self.length, self.of[self.y[rows]])
        found: Arrays = {}
        for name, e in (("image", self.image("train", rows)), ("text", text)):
            both = getattr(self.model, name).slopes(e, slopes[name])
            found |= {f"{name}.{letter}": one for letter, one in zip("AB", both, strict=True)}
        if self.hyper.merge == "fisher" and place == len(self.plan()) - 1:
            self.state["fisher"] = {name: g.square().mean(0) for name, g in found.items()}
            return
        gradients = {name: g.mean(0) for name, g in found.items()}
        if self.hyper.mu:
            here = self.weights()
            gradients = {name: g + self.hyper.mu * (here[name] - self.start[name]) for name, g in gradients.items()}
        self.step(gradients, slopes["loss"])

    def share(self) -> Records:
        """F_k and F_k θ_k; θ_k where all weigh alike; nothing where adapters are not merged."""
        end, found, merge = self.weights(), self.state.get("fisher", {}), self.hyper.merge
        self.forget()
        if merge == "local":
            self.state["own"] = end
        if merge != "fisher":
            return {"fisher": {}, "scaled": end if merge == "fedavg" else {}}
        f = {n: found.get(n, v * 0).clamp_min(self.hyper.floor) for n, v in end.items()}
        return {"fisher": f, "scaled": {n: f[n] * end[n] for n in end}}


def fisher(scope: Scope) -> Layout:
    """Layout of F_k."""
    return scope.model if scope.hyper.merge == "fisher" else {}


def scaled(scope: Scope) -> Layout:
    """Layout of F_k θ_k, or of θ_k."""
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
class FedNano(SteppedStrategy):
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
    records = {"fisher": fisher, "scaled": scaled}
    records_forward = {"activations": activations}
    sums = {"fisher": "num-examples", "scaled": "num-examples"}  # type: ignore[assignment]
    heterogeneous = False

    def __init__(self, hyper: FedNanoHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        self.reader = reader.build(hyper.language, hyper.width, self.scenario.seed).to(workspace.device)
        names = [str(name) for name in self.scenario.data.dataset.classes]
        self.questions = questions.Questions(self.reader, names, hyper.question, hyper.letters)

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Labels are classes, an example each; F is positive."""
        super().examine(scope, records)
        batch = records.get("activations")
        if batch is not None and len(batch["labels"]) != len(batch["image"]):
            raise InvalidArrays(f"labels: {len(batch['labels'])} for {len(batch['image'])} examples")
        for name, value in records.get("fisher", {}).items():
            if bool((value <= 0).any()):
                raise InvalidArrays(f"fisher/{name}: not positive")

    def begin(self) -> None:
        """The initial adapters, and the questions' embeddings."""
        super().begin()
        asked = self.questions
        self.publish("question", {"e": asked.e, "length": asked.length, "of": asked.of})

    @property
    def exchanges(self) -> int:
        """One a step, and one for F_k."""
        return super().exchanges + (self.hyper.merge == "fisher")

    def slopes(self, content: Arrays) -> Arrays:
        """ℓ, and ∂ℓ/∂h of each example's image tokens and of its question's."""
        if len(content["text"]) != len(self.questions.e):
            raise InvalidArrays(f"activations/text: {len(content['text'])} tokens, the questions have others")
        return dict(zip(("loss", "image", "text"), self.questions.slopes(**content), strict=True))

    def fuse(self, shares: Shares) -> None:
        """θ ← Σ n F θ / Σ n F."""
        if self.hyper.merge == "local":
            return
        (f, _), (scaled, weight) = shares.total("fisher"), shares.total("scaled")
        mean = {name: total / (f[name] if f else weight) for name, total in scaled.items()}
        self.publish("model", {name: value.to(self.model[name].dtype) for name, value in mean.items()})

    def activations(self, rows: int) -> Layout:
        """Layout of an evaluated set: its images' embeddings, and all questions'."""
        h = self.hyper
        return {
            "image": ("float32", (rows, h.tokens, h.width)), "text": ("float32", (len(self.questions.e), h.width))
        }  # fmt: skip

    def score(self, content: Arrays, y: Tensor) -> Metrics:
        """The class whose answer is the likeliest, of those to an example's question."""
        image, text = (content[name].to(self.workspace.device) for name in ("image", "text"))
        z = self.questions.scores(image, text, y, self.scenario.config.evaluate.batch_size).cpu()
        return {**scores(z, y, self.classes), **self.questions.accuracies(z, y)}

    def notes(self) -> list[str]:
        """That a random language model is a trial, and what costs the bytes."""
        said = ["fednano: activations and their gradients travel at each step, whatever the adapters' size"]
        if self.hyper.language is None:
            said.append(
                "fednano: without strategy.language the language model has random weights: its figures are a trial of "
                "the machinery, not the method's"
            )
        return said
