"""FedMKT: language models of different architectures and tokenisers teach each other on public text.

Box (Fan et al., "FedMKT: Federated Mutual Knowledge Transfer for Large and Small Language Models", COLING 2025,
arXiv 2406.02224). In round t, on public rows D_t:

    client m:  trains on private text; sends p_m = the k likeliest next tokens of every place of D_t, and CE_m(x) by row
    server:    aligns every p_m to the other tokenisers; y(x) = p of argmin_m CE_m(x)  (*greater*), or their mean
               weighted by softmax(−CE_m(x)/τ)  (*weighted_mean*, which are PackLLM's weights, arXiv 2404.11531)
               with a model of its own: trains it by L on y, and sends its own p and CE in y's place
    client m:  where CE of what was sent is lower than its own:
               L = α·CE(labels) + (1 − α)·KL(y ‖ softmax z), else α·CE(labels)

Where this differs from the public code, each with a test: texts are aligned by the bytes that tokens end at, not by
edit distances of tokens; a place without a partner is taught the *next* token, not the current one; what the k
likeliest leave of 1 is one more bucket, not lost; CE is bits per byte in float32, comparable between tokenisers, not a
mean over tokens; only places whose label counts are taught; and ids are never taken for logits.

Two places are partners if their tokens cover the same bytes; ids map to the token of the same bytes, else of least edit
distance (MinED), and add up where they meet: `mapping=edit`. `mapping=byte`, ours, takes two places that *start* at the
same byte, and compares what both say of the next byte: a token's probability goes to the byte it starts with. MinED
tells a coarse tokeniser to prefer the single letters that a fine one must; bytes do not. Between equal tokenisers both
are plain distillation of the k likeliest. `mapping=groups` joins tokens until both sides close at the same byte, and
compares the last ones in two vocabularies by `loss=gold` (its default), `uld` or `xtoken`; what the k likeliest leave
is spread evenly over the teacher's other tokens. `byte` and `unmatched` are refused where all have one tokeniser.

Travels, a client and round and each way: T_s·(P·k·(4 + B_id) + 4) bytes, P places a row in the client's own tokens,
B_id 2 up to 32,768 tokens, else 4; with groups 4·T_s·P more up, and down T_s·(P·(8k + 4) + 6). Step (c) of a round
happens at the start of the client's next round. Clients send probabilities, not logits: equal at T = 1. The server
aligns what it sends too, so that a client needs its own tokeniser alone (with groups the teachers' too). All weights
are trained, not adapters. The public texts are the transfer set; in a task of classes it must be labelled, and an
example is a place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedfuse import (
    Arrays,
    FusionClient,
    FusionStrategy,
    Item,
    Records,
    Scenario,
    Scope,
    Shares,
    Topic,
    UserError,
    Workspace,
    hyper,
    merged_text,
    public_text,
    strategy,
    transfer_rows,
    without_effect,
)


@dataclass(frozen=True)
class FedMKTHyper:
    """Hyper-parameters of FedMKT.

    Raises
    ------
    UserError
        If there is a temperature of a mixture, and no mixture.
    """

    subset: int | None = hyper(None, "|D_t|, rows redrawn each round; null: the whole transfer set", low=1)
    k: int = hyper(16, "k, likeliest tokens of a place that travel (paper: 128)", low=1)
    alpha: float = hyper(0.9, "α, weight of the labels beside what is taught", low=0, high=1, only="epochs")
    select: str = hyper("greater", "the best row of all, or a mixture", choices=("greater", "weighted_mean"))
    tau: float = hyper(1.0, "τ of weighted_mean, in nats per byte", above=0)
    mapping: str = hyper(
        "edit",
        "between tokenisers: edit (MinED, the paper), byte (ours), groups (for loss=gold, uld, xtoken)",
        choices=("edit", "byte", "groups"),
    )
    unmatched: str = hyper("label", "a place without a partner is taught", choices=("label", "nothing"))
    server: str | None = hyper(None, "architecture of the server's own model; null: it passes clients' knowledge on")
    epochs: int = hyper(1, "passes over D_t each round", low=0, effort="epochs")
    batch: int = hyper(16, "rows a step on D_t", low=1, only="epochs", effort="batch_size")

    def __post_init__(self) -> None:
        if self.select != "weighted_mean":
            without_effect(self, "tau", f"with strategy.select={self.select}, which takes one row")


def lesson(h: FedMKTHyper, places: Any, taught: Arrays, rows: Tensor, pieces: Any, loss: Any) -> Callable[..., Tensor]:
    """L of a batch; `rows` (n, bool) are those that have something to teach."""
    return public_text.lesson(places, taught, rows, pieces, loss, h.alpha, 1 - h.alpha)


def exchange(h: FedMKTHyper) -> Any:
    """How records are made and read, by the mapping."""
    return merged_text if h.mapping == "groups" else public_text


ACROSS = ("gold", "uld", "xtoken")  # losses between vocabularies


def teaching(half: Any, name: str, places: Any, taught: Arrays, rows: Tensor) -> Callable[..., Tensor]:
    """L for one half of the strategy, whose architecture is `name`, by its mapping."""
    h, texts = half.hyper, half.workspace.texts
    if h.mapping != "groups":
        return lesson(h, places, taught, rows, texts.pieces(name), half.loss("kl"))
    own, losses = texts.vocabulary(name), {}
    for number in sorted(set(taught["teacher"].tolist())):
        other = texts.vocabulary(known(half.scenario, h)[number])
        losses[number] = half.loss("gold").across(own, other), len(other.pieces)
    return merged_text.lesson(places, taught, rows, losses, h.alpha, 1 - h.alpha)


def known(scenario: Scenario, h: FedMKTHyper) -> list[str]:
    """The architectures, by number."""
    return sorted({*scenario.architectures, *([] if h.server is None else [h.server])})


class FedMKTClient(FusionClient):
    """Keeps its own model and tokeniser; learns from public text what others know better."""

    personal = True

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Step (c), on the rows of the lesson's own round."""
        item = knowledge["targets"]
        places = self.workspace.texts.places(self.architecture, self.subset(self.hyper.subset, item.version))
        own = self.said(places)["bits"]
        better = (item.arrays["bits"].to(own.device) < own).to(places.x.device)
        step = teaching(self, self.architecture, places, item.arrays, better)
        self.distil(step, places.x, None, epochs=self.hyper.epochs, batch_size=self.hyper.batch)

    def said(self, places: Any) -> Arrays:
        """p_m, its ids, and the bits of each row."""
        return exchange(self.hyper).said(places, self.predict(places.x), self.hyper.k)

    def share(self) -> Records:
        """What it knows of this round's rows."""
        return {"said": self.said(self.workspace.texts.places(self.architecture, self.subset(self.hyper.subset)))}


@strategy("fedmkt", client=FedMKTClient, hyper=FedMKTHyper, paper="Fan et al. 2025, arXiv 2406.02224 (corrected)")
class FedMKT(FusionStrategy):
    """Language models of any tokeniser teach each other on public text, aligned by bytes."""

    topics = {"targets": Topic("lesson", lambda scope: exchange(scope.hyper).taught_arrays(scope))}
    records = {"said": lambda scope: exchange(scope.hyper).said_arrays(scope)}
    transfer = "both"
    aligns = True
    distils = True
    staleness = "newest"

    def __init__(self, hyper: FedMKTHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        data = self.scenario.data
        if not data.dataset.next_token and not self.scenario.config.transfer.labelled and data.transfer is not None:
            raise UserError("strategy=fedmkt chooses whom to learn from by labels: set transfer.labelled=true")
        if hyper.server is not None:
            self.workspace.initial(hyper.server)  # refuses one that cannot be built
        self.several = len({*map(workspace.texts.pieces, known(self.scenario, hyper))}) > 1
        if hyper.mapping != "groups" and not self.several:
            for key in ("mapping", "unmatched"):
                without_effect(hyper, key, "where all models have one tokeniser")
        if hyper.mapping == "groups":
            name = self.scenario.config.loss.name
            if name is not None and name not in ACROSS:
                raise UserError(
                    f"loss={name} compares one vocabulary; with mapping=groups allowed: {', '.join(ACROSS)}"
                )
            for key, needed in (("select", "greater"), ("unmatched", "label")):
                if getattr(hyper, key) != needed:
                    raise UserError(f"strategy.{key}={getattr(hyper, key)}: with mapping=groups allowed is {needed}")

    @property
    def across(self) -> bool:  # type: ignore[override]
        """Whether groups of tokens of several tokenisers are compared."""
        return self.hyper.mapping == "groups" and self.several

    @classmethod
    def examine(cls, scope: Scope, records: Records) -> None:
        """Probabilities of tokens there are, none twice; bits that are not negative."""
        exchange(scope.hyper).examine("said", records["said"], scope.dims["vocabulary"])

    def fuse(self, shares: Shares) -> None:
        """Select by row, align, and send to each architecture; teach the server's model first, if there is one."""
        names = self.scenario.architectures
        said = [public_text.Said(names[s.client], s.records["said"], s.weight) for s in shares if s.examples]
        if self.hyper.server is not None:
            said = [public_text.Said(self.hyper.server, self.taught(said))]
        for name in sorted(set(names)):
            self.publish("targets", self.targets(name, said), to=name if len(set(names)) > 1 else None)

    @property
    def rows(self) -> Tensor:
        """Rows of this round."""
        return transfer_rows(self.scenario, self.hyper.subset, self.round)

    def taught(self, said: list[public_text.Said]) -> Arrays:
        """Train the server's model on what clients know better, and return what it says then."""
        h, (name, arrays) = self.hyper, self.server_models()["server"]
        places = self.workspace.texts.places(name, self.rows)
        model = self.workspace.loaded(name, arrays)

        def says() -> Arrays:
            logits = self.predict(model, places.x, self.scenario.config.evaluate.batch_size)
            return exchange(h).said(places, logits, h.k)

        own, targets = says()["bits"], self.targets(name, said)
        better = (targets["bits"].to(own.device) < own).to(places.x.device)
        step = teaching(self, name, places, targets, better)
        self.state["server"] = self.distil(
            model, places.x, None, step, purpose="server", epochs=h.epochs, batch_size=h.batch
        )
        return says()

    def targets(self, name: str, said: list[public_text.Said]) -> Arrays:
        """y for one architecture: of each row the best or the mixture, in its own places and tokens."""
        h, texts = self.hyper, self.workspace.texts
        if h.mapping == "groups":
            return merged_text.taught(texts, name, said, self.rows, known(self.scenario, h))
        places = texts.places(name, self.rows)
        bits = torch.stack([one.arrays["bits"].double().cpu() for one in said])
        worth = torch.tensor([one.weight for one in said], dtype=torch.float64)
        sizes = places.ends.amax(1).cpu()
        w = public_text.best(bits) if h.select == "greater" else public_text.by_perplexity(bits, sizes, h.tau, worth)
        alike = {texts.pieces(one.architecture) for one in said} == {texts.pieces(name)}

        def of(one: public_text.Said) -> tuple[Tensor, Tensor]:
            # what is mixed at a place must be of one kind, all bytes or all tokens
            same = alike if h.select != "greater" else texts.pieces(one.architecture) == texts.pieces(name)
            coarse = h.mapping == "byte" and not same
            label = h.unmatched == "label"
            return public_text.aligned(texts, name, one, self.rows, coarse=coarse, unmatched_label=label)

        p, ids = public_text.mixture([of(one) for one in said], w, h.k)
        ids = ids.to(public_text.id_type(places.vocabulary))
        return {"p": p.float(), "ids": ids, "bits": (w * bits).sum(0).float()}

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The server's own model, if it has one."""
        name = self.hyper.server
        if name is None:
            return {}
        return {"server": (name, self.state.get("server", self.workspace.initial(name)))}
