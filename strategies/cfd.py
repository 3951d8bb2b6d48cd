"""CFD, compressed federated distillation: quantised, delta-coded, arithmetically coded soft labels, distilled twice.

Box (Sattler, Marban, Rischke, Samek, "CFD: Communication-Efficient Federated Distillation via Soft-Label Quantization
and Delta Coding", IEEE TNSE 2022, arXiv 2012.00632). X_pub is a fixed subset of the transfer set. In round t:

    client i:  θ_i ← θ_0, distils the server's labels Ŷ_{t−1}, trains on its own data
               Y_i = Q_b(softmax f(θ_i, X_pub)); sends the rows that differ from its last Y_i, arithmetically coded
    server:    Ȳ = mean_i Y_i;  θ_S distils Ȳ (dual distillation);  Ŷ_t = Q_b'(softmax f(θ_S, X_pub)), sent likewise

Q_b maps a row to the L1-nearest one whose entries are multiples of 1/(2^b − 1) and sum to 1; b = 1 is the one-hot
argmax; b = 32 sends floats, uncoded. Travels: about |X_pub|·(H(Y) + η) bits each way, below |X_pub|·log2 C for b = 1
once labels are not uniform; the code *is* the uint8 array on the wire, so counted bytes are true. A row is one flag
(unchanged?) and its entries, each among what the row's sum leaves possible, so that every byte string decodes to valid
rows; one that is not what the coder writes is refused. Down, labels are a folded topic: who was away gets the missed
deltas or the whole, whichever is smaller (7 bytes of header).

Choices: an adaptive binary-exact arithmetic coder stands for CABAC; a client's previous Y_i is its only private state;
training settings are the run's, where the paper has Adam 10⁻³. `reinit=false` (clients keep their weights), `delta`
and `dual` switch ingredients off, as a known port does. Architectures may differ; the server has the first client's.

Clients that start from θ_0 must learn something in one round: where few examples leave them at chance, their one-hot
labels name one class for all rows. On MNIST-M, CNNs, 5 clients of 100 images, five epochs alone take a client to 10 %
of all classes and twenty to 23, and CFD stays at chance. What is taught one class for all rows also runs away under SGD
with momentum (training loss 68 in round 2, 2.5 with `distil.optimizer=adam distil.lr=0.001`, at chance too). Where
there is something to learn SGD does no worse: 55.5 ± 5.4 on MNIST, Adam at 10⁻³ 50.6 ± 4.2, at 3·10⁻³ 42.2 ± 8.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedfuse import (
    Arrays,
    FusionClient,
    InvalidArrays,
    Item,
    Layout,
    Metrics,
    Records,
    Scope,
    Shares,
    StudentStrategy,
    Topic,
    distributions,
    hyper,
    label_code,
    strategy,
    transfer_rows,
    without_effect,
)


@dataclass(frozen=True)
class CFDHyper:
    """Hyper-parameters of CFD.

    Raises
    ------
    UserError
        If it is said how rows that did not change are coded, and nothing is coded.
    """

    bits_up: int = hyper(1, "b of the clients' labels", choices=label_code.BITS)
    bits_down: int = hyper(1, "b of the server's labels", choices=label_code.BITS)
    delta: bool = hyper(True, "send only rows that changed since the last round")
    dual: bool = hyper(True, "the server distils into a model of its own and sends that model's labels")
    reinit: bool = hyper(True, "clients start each round from the common θ_0 (paper; ports: false)")
    subset: int | None = hyper(None, "|X_pub|, drawn once; null: the whole transfer set", low=1)
    distill_epochs: int = hyper(
        20,
        "epochs of distillation, at clients and server (ours; paper: few over up to 80,000 images)",
        low=0,
        effort="epochs",
    )
    distill_batch: int = hyper(64, "batch size of distillation", low=1, only="distill_epochs", effort="batch_size")

    def __post_init__(self) -> None:
        if self.bits_up == self.bits_down == 32:
            without_effect(self, "delta", "with 32 bits both ways, which are floats sent whole")


def fold(value: Arrays, increment: Arrays) -> Arrays:
    """The newest labels, coded whole."""
    levels, bits = label_code.unpack(increment["code"], label_code.unpack(value["code"])[0])
    return {"code": label_code.pack(levels, bits)}


def coded(scope: Scope) -> Layout:
    """A code of any length up to four bytes an entry, which neither floats nor the worst row exceed."""
    return {"code": ("uint8", (-(4 * scope.dims["subset"] * scope.dims["classes"] + 64),))}


class CFDClient(FusionClient):
    """Starts anew from θ_0, takes over the server's labels, trains, and sends what changed in its own."""

    @property
    def public(self) -> Tensor:
        """Rows of X_pub: drawn once."""
        return self.subset(self.hyper.subset, 0)

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Distil Ŷ into θ_0 (or into the kept weights)."""
        h, item = self.hyper, knowledge["labels"]
        if "weights" in self.state:
            self.load(self.state["weights"])
        self.version = item.version  # draws depend on the labels' version, not on the round that brought them
        levels, bits = label_code.unpack(item.arrays["code"].cpu())
        if levels.shape != (len(self.public), self.classes):
            raise InvalidArrays(f"labels: {tuple(levels.shape)}, expected {(len(self.public), self.classes)}")
        x, y = self.workspace.transfer(self.public)
        distil = self.loss("kl").towards(label_code.probabilities(levels, bits).to(self.workspace.device))
        self.distil(distil, x, y, epochs=h.distill_epochs, batch_size=h.distill_batch)

    def fit(self) -> Metrics:
        """Train on own data."""
        metrics = self.train()
        if not self.hyper.reinit:
            self.state["weights"] = self.weights()
        return metrics

    def share(self) -> Records:
        """Q_b of own predictions on X_pub, coded."""
        bits = self.hyper.bits_up
        p = self.predict(self.transfer[self.public]).softmax(1).cpu()
        if bits == 32:
            return {"labels": {"code": label_code.code_of(label_code.encode(p, bits))}}
        levels, sent = label_code.quantise(p, bits), self.state.get("sent")
        previous = None if sent is None else sent.cpu()
        if self.hyper.delta:
            self.state["sent"] = levels
        return {"labels": {"code": label_code.code_of(label_code.encode(levels, bits, previous))}}


@strategy("cfd", client=CFDClient, hyper=CFDHyper, paper="Sattler et al. 2022, arXiv 2012.00632")
class CFD(StudentStrategy):
    """Quantised and entropy-coded soft labels, a few bits each, through a model the server distils."""

    topics = {"labels": Topic("fold", coded, fold, coded)}
    records = {"labels": coded}
    of_classes = True
    transfer = "both"
    distils = whole = True

    @property
    def taught(self) -> bool:
        """Whether there is a θ_S; it starts as θ_0."""
        return self.hyper.dual

    def fuse(self, shares: Shares) -> None:
        """Decode, average, distil, and send the labels of θ_S."""
        h = self.hyper
        rows = transfer_rows(self.scenario, h.subset, 0)
        total, clients, size = torch.zeros(len(rows), self.classes, dtype=torch.float64), 0, 0
        sent = self.state.setdefault("sent", {})
        for share in shares:
            key, code = str(share.client), share.records["labels"]["code"]
            try:
                levels = label_code.decode(label_code.bytes_of(code), len(rows), self.classes, h.bits_up, sent.get(key))
                p = label_code.probabilities(levels, h.bits_up)
                distributions("labels", p)
            except InvalidArrays as error:
                self.exclude(share, str(error))
                continue
            if h.delta and h.bits_up != 32:
                sent[key] = levels
            if share.examples:  # else it has learnt nothing of its own
                total, clients, size = total + p.double(), clients + 1, size + 8 * len(code)
        if clients == 0:
            return
        self.log("bits_per_label/up", size / clients / len(rows))
        soft = (total / clients).float()
        if h.dual:
            soft = self.answers(self.teach(self.loss("kl"), soft, rows), rows)
        new = soft if h.bits_down == 32 else label_code.quantise(soft, h.bits_down)
        old = self.board.items.get(("labels", ""))
        by_delta = old is not None and h.delta and h.bits_down != 32
        code = label_code.pack(
            new, h.bits_down, label_code.unpack(old.arrays["code"])[0] if old is not None and by_delta else None
        )
        self.log("bits_per_label/down", 8 * len(code) / len(rows))
        self.publish("labels", {"code": code})

    def answers(self, student: nn.Module, rows: Tensor) -> Tensor:
        """Dual distillation: what θ_S, having learnt the mean, says itself."""
        x, _ = self.workspace.transfer(rows)
        return self.predict(student, x, self.scenario.config.evaluate.batch_size).softmax(1).cpu()
