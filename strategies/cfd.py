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
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedfuse.client import FusionClient, Metrics, transfer_rows
from fedfuse.coding import Counts, Decoder, Encoder
from fedfuse.knowledge import Item, Topic
from fedfuse.records import Arrays, InvalidArrays, Layout, Scope, distributions
from fedfuse.registry import hyper, strategy
from fedfuse.strategy import FusionStrategy, Records, Shares

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 32)
_HEADER = struct.Struct("<BIH")  # bits, and 64 if a delta; rows; classes


@dataclass(frozen=True)
class CFDHyper:
    """Hyper-parameters of CFD."""

    bits_up: int = hyper(1, "b of the clients' labels", choices=BITS)
    bits_down: int = hyper(1, "b of the server's labels", choices=BITS)
    delta: bool = hyper(True, "send only rows that changed since the last round")
    dual: bool = hyper(True, "the server distils into a model of its own and sends that model's labels")
    reinit: bool = hyper(True, "clients start each round from the common θ_0 (paper; ports: false)")
    subset: int | None = hyper(None, "|X_pub|, drawn once; null: the whole transfer set", low=1)
    distill_epochs: int = hyper(1, "epochs of distillation, at clients and server", low=0)
    distill_batch: int = hyper(64, "batch size of distillation", low=1)


def quantise(p: Tensor, bits: int) -> Tensor:
    """Constrained uniform quantisation Q_b, as integer levels.

    Parameters
    ----------
    p : Tensor
        Probabilities (n × C).
    bits : int
        b from 1 to 8; the levels of a row sum to L = 2^b − 1.

    Returns
    -------
    Tensor
        uint8 (n × C); levels / L is the L1-nearest such row. The units that rounding down leaves over go to the
        largest remainders, at a tie to the lower class.
    """
    whole = 2**bits - 1
    scaled = p.double() / p.double().sum(1, keepdim=True) * whole
    floor = scaled.floor()
    left = whole - floor.sum(1, keepdim=True)
    rank = (floor - scaled).argsort(dim=1, stable=True).argsort(dim=1)
    return (floor + (rank < left)).to(torch.uint8)


def encode(levels: Tensor, bits: int, previous: Tensor | None = None) -> bytes:
    """Code levels (n × C uint8), or probabilities (float32) if b = 32; with `previous`, only the rows that differ."""
    if bits == 32:
        return levels.cpu().contiguous().numpy().astype("<f4").tobytes()
    whole, classes = 2**bits - 1, levels.shape[1]
    coder, flags, models = Encoder(), Counts(2), [Counts(whole + 1) for _ in range(classes)]
    same = (levels == previous).all(1).tolist() if previous is not None else None
    for i, row in enumerate(levels.tolist()):
        if same is not None:
            coder.encode(int(not same[i]), flags)
            if same[i]:
                continue
        left = whole
        for c in range(classes - 1):  # the last entry is what is left
            coder.encode(row[c], models[c], left + 1)
            left -= row[c]
    return coder.finish()


def decode(data: bytes, rows: int, classes: int, bits: int, previous: Tensor | None = None) -> Tensor:
    """Undo `encode`.

    Raises
    ------
    InvalidArrays
        If `data` is not what `encode` writes.
    """
    if bits == 32:
        if len(data) != 4 * rows * classes:
            raise InvalidArrays(f"code: {len(data)} bytes for {rows} × {classes} floats")
        floats = np.frombuffer(data, "<f4").astype(np.float32).reshape(rows, classes)
        if not np.isfinite(floats).all():
            raise InvalidArrays("code: not finite")
        return torch.from_numpy(floats)
    whole = 2**bits - 1
    coder, flags, models = Decoder(data), Counts(2), [Counts(whole + 1) for _ in range(classes)]
    levels = [] if previous is None else previous.tolist()
    for i in range(rows):
        if previous is not None and not coder.decode(flags):
            continue
        row, left = [], whole
        for c in range(classes - 1):
            row.append(coder.decode(models[c], left + 1))
            left -= row[-1]
        row.append(left)
        levels[i : i + 1] = [row]
    out = torch.tensor(levels, dtype=torch.uint8).reshape(rows, classes)
    if encode(out, bits, previous) != data:
        raise InvalidArrays("code: not what the coder writes")
    return out


def probabilities(levels: Tensor, bits: int) -> Tensor:
    """Rows that sum to 1, float32."""
    return levels if bits == 32 else (levels.double() / (2**bits - 1)).float()


def _bytes(code: Tensor) -> bytes:
    return code.cpu().numpy().tobytes()


def _array(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def pack(levels: Tensor, bits: int, previous: Tensor | None = None) -> Tensor:
    """`encode` with a header, as the array that goes down."""
    header = _HEADER.pack(bits + 64 * (previous is not None), *levels.shape)
    return _array(header + encode(levels, bits, previous))


def unpack(code: Tensor, previous: Tensor | None = None) -> tuple[Tensor, int]:
    """Undo `pack`: levels (or float rows) and b."""
    data = _bytes(code)
    if len(data) < _HEADER.size:
        raise InvalidArrays("code: too short for its header")
    kind, rows, classes = _HEADER.unpack_from(data)
    bits, delta = kind % 64, kind >= 64
    if bits not in BITS or (delta and (previous is None or previous.shape != (rows, classes))):
        raise InvalidArrays("code: a header that does not fit")
    return decode(data[_HEADER.size :], rows, classes, bits, previous if delta else None), bits


def fold(value: Arrays, increment: Arrays) -> Arrays:
    """The newest labels, coded whole."""
    levels, bits = unpack(increment["code"], unpack(value["code"])[0])
    return {"code": pack(levels, bits)}


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
        levels, bits = unpack(item.arrays["code"])
        if levels.shape != (len(self.public), self.classes):
            raise InvalidArrays(f"labels: {tuple(levels.shape)}, expected {(len(self.public), self.classes)}")
        soft, loss, labels = (
            probabilities(levels, bits).to(self.residents.device),
            self.loss("kl"),
            self.transfer_labels,
        )

        def distil(logits: Tensor, y: Tensor | None, i: Tensor) -> Tensor:
            return loss.from_probabilities(logits, soft[i], y)

        y, moment = None if labels is None else labels[self.public], f"labels {item.version}"
        self.train(
            distil, self.transfer[self.public], y, purpose=moment, epochs=h.distill_epochs, batch_size=h.distill_batch
        )

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
            return {"labels": {"code": _array(encode(p, bits))}}
        levels, previous = quantise(p, bits), self.state.get("sent")
        if self.hyper.delta:
            self.state["sent"] = levels
        return {"labels": {"code": _array(encode(levels, bits, previous))}}


@strategy("cfd", client=CFDClient, hyper=CFDHyper, paper="Sattler et al. 2022, arXiv 2012.00632")
class CFD(FusionStrategy):
    """Quantised and entropy-coded soft labels, a few bits each, through a model the server distils."""

    topics = {"labels": Topic("fold", coded, fold, coded)}
    records = {"labels": coded}
    transfer = "both"

    def begin(self) -> None:
        """θ_S starts as θ_0."""
        if self.hyper.dual:
            self.state["model"] = self.residents.initial(self.architecture)

    def fuse(self, shares: Shares) -> None:
        """Decode, average, distil, and send the labels of θ_S."""
        h = self.hyper
        rows = transfer_rows(self.scenario, h.subset, 0)
        total, clients, size = torch.zeros(len(rows), self.classes, dtype=torch.float64), 0, 0
        sent = self.state.setdefault("sent", {})
        for share in shares:
            key, code = str(share.client), share.records["labels"]["code"]
            try:
                levels = decode(_bytes(code), len(rows), self.classes, h.bits_up, sent.get(key))
                p = probabilities(levels, h.bits_up)
                distributions("labels", p)
            except InvalidArrays as error:
                self.exclude(share, str(error))
                continue
            if h.delta and h.bits_up != 32:
                sent[key] = levels
            total, clients, size = total + p.double(), clients + 1, size + 8 * len(code)
        if clients == 0:
            return
        self.log("bits_per_label/up", size / clients / len(rows))
        soft = (total / clients).float()
        if h.dual:
            soft = self._distil(rows, soft.to(self.residents.device)).cpu()
        new = soft if h.bits_down == 32 else quantise(soft, h.bits_down)
        old = self.board.items.get(("labels", ""))
        by_delta = old is not None and h.delta and h.bits_down != 32
        code = pack(new, h.bits_down, unpack(old.arrays["code"])[0] if old is not None and by_delta else None)
        self.log("bits_per_label/down", 8 * len(code) / len(rows))
        self.publish("labels", {"code": code})

    def _distil(self, rows: Tensor, mean: Tensor) -> Tensor:
        """Dual distillation: θ_S learns the mean and answers with its own labels."""
        h, (x, labels), loss = self.hyper, self.residents.tensors("transfer"), self.loss("kl")
        model = self.residents.loaded(self.architecture, self.state["model"])

        def distil(logits: Tensor, y: Tensor | None, i: Tensor) -> Tensor:
            return loss.from_probabilities(logits, mean[i], y)

        y = None if labels is None else labels[rows]
        self.state["model"] = self.train(
            model, x[rows], y, distil, purpose="distil", epochs=h.distill_epochs, batch_size=h.distill_batch
        )
        return self.predict(model, x[rows], self.scenario.config.evaluate.batch_size).softmax(1)

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """θ_S, if the server has one."""
        return {"model": (self.architecture, self.state["model"])} if self.hyper.dual else {}
