"""Traps that published ports fall into (docs/distillation.md lists them all): those no strategy's own file covers."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from fedfuse.config import registry
from fedfuse.strategies.fedgen import FedGenHyper, Generator, draw_labels
from fedfuse.train import training
from fedfuse.train.losses import loss
from fedfuse.wire.label_code import quantise, unpack
from tests.federations import play
from tests.halves import client, random_labels, server, shares, take

FROZEN = ("train.lr=1e-30", "distil.lr=1e-30", "train.momentum=0", "loss=kl", "transfer.subset=20")
TOPICS = {
    "cfd": ("labels", "code"), "dsfl": ("labels", "p"), "fedmd": ("consensus", "logits"), "knfu": ("soft_labels", "p"),
    "ktpfl": ("target", "p"), "scarlet": ("cache", "p"), "selectivefd": ("ensemble", "p"),
}  # fmt: skip


def watched(half):
    """Values of the loss of each batch, as they come."""
    values, inner = [], half.train

    def train(step, *args, **options):
        def kept(*batch):
            value = step(*batch)
            values.append(value.detach())
            return value

        return inner(kept, *args, **options)

    half.train = train
    return values


def lesson(name, half, wrong):
    """The client's own answers on version 3's rows, as a server would teach them; wrong: each row its neighbour's."""
    from fedfuse.wire.label_code import pack

    rows = half.subset(20, 0 if name == "cfd" else 3)
    z = half.predict(half.transfer[rows]).roll(int(wrong), 0)
    if name == "fedmd":
        return {"logits": z}
    p = (z / (10.0 if name == "ktpfl" else 1.0)).softmax(1)
    if name == "cfd":
        return {"code": pack(p, 32)}
    if name == "selectivefd":
        return {"rows": torch.arange(20, dtype=torch.int32), "p": p}
    if name == "scarlet":
        return {"index": rows.int(), "p": p, "stamp": torch.full((20,), 3, dtype=torch.int32)}
    return {"p": p}


@pytest.mark.parametrize("name", sorted(TOPICS))
def test_every_row_is_taught_its_own_soft_label(name):
    """A student whose own predictions come back, on a redrawn subset and in shuffled batches, has nothing to learn."""
    batch = {"fedmd": "digest_batch", "knfu": "finetune_batch"}.get(name, "distill_batch")
    for wrong in (False, True):
        own = ("strategy.subset=20",) if name == "scarlet" else ()
        half = client(name, *FROZEN, *own, f"strategy.{batch}=7", "distil.epochs=1", round=9)
        values = watched(half)
        take(half, TOPICS[name][0], version=3, **lesson(name, half, wrong))
        assert len(values) == 3  # 7 + 7 + 6 rows
        largest = max(float(value) for value in values)
        assert largest > 1e-4 if wrong else abs(largest) < 1e-6


def test_rows_of_a_subset_are_distinct_ordered_redrawn_and_may_be_kept():
    half, fixed = client("dsfl", "transfer.subset=9"), client("dsfl", "transfer.subset=9", "transfer.redraw=false")
    drawn = [half.subset(None, version) for version in range(20)]
    for rows in drawn:
        assert bool((rows.diff() > 0).all())
        assert int(rows[0]) >= 0
        assert int(rows[-1]) < 24
    assert len({tuple(rows.tolist()) for rows in drawn}) > 15  # FL-bench digests the first batches forever
    assert set(torch.cat(drawn).tolist()) == set(range(24))
    assert len({tuple(fixed.subset(None, version).tolist()) for version in range(20)}) == 1


def test_fedmds_digest_is_the_mean_absolute_error_of_logits():
    half = client("fedmd", "distil.lr=1e-30", "strategy.digest_batch=100")
    logits, values = torch.randn(24, 10), watched(half)
    take(half, "consensus", logits=logits)
    expected = (half.predict(half.transfer).double() - logits.double()).abs().mean()
    assert float(values[0]) == pytest.approx(expected.item(), rel=1e-5)


def test_kt_pfl_distils_with_t_squared_and_means_over_rows_alone():
    """The port divides by rows and classes and leaves T² out: 10 · 100 times less at T = 10."""
    half = client("ktpfl", "distil.lr=1e-30", "strategy.distill_batch=100")
    target, values = random_labels(24, 10), watched(half)
    take(half, "target", p=target.float())
    q = (half.predict(half.transfer).double() / 10).log_softmax(1)
    expected = 100 * (target * (target.log() - q)).sum(1).mean()
    assert float(values[0]) == pytest.approx(expected.item(), rel=1e-4)


def test_cfds_labels_go_down_quantised_by_default():
    """The port leaves the downstream quantisation out."""
    strategy = server("cfd")
    code = {"labels": {"code": _code(quantise(random_labels(24, 10), 1))}}
    strategy.fuse(shares(strategy, code, code))
    levels, bits = unpack(strategy.published("labels")["code"])
    assert bits == 1
    assert levels.dtype == torch.uint8
    assert (levels.sum(1) == 1).all()


def _code(levels):
    from fedfuse.wire.label_code import code_of, encode

    return code_of(encode(levels, 1))


@pytest.mark.parametrize("round", [1, 5])
def test_fedgens_client_loss_by_hand(round):
    """CE + α_t·(B_G/B)·CE on generated features + β_t·KL(head of G ‖ own), α_t = 10·0.98^t, β_t = 7·0.98^t."""
    weights = ("strategy.alpha=10", "strategy.beta=7")
    half = client("fedgen", "train.lr=1e-30", "train.batch_size=1000", *weights, round=round)
    h = FedGenHyper()
    net = Generator(10, 32, h).eval()
    held = torch.arange(10) != 3
    values = watched(half)
    half.begin("receive")
    from fedfuse.wire.knowledge import Item

    arrays = {k: v.detach().clone() for k, v in net.state_dict().items()}
    half.receive({"generator": Item({**arrays, "held": held}, 1)})
    half.begin("train")
    order = next(training.batches(len(half.x), 1000, 1, half.seed, "train", half.client, round))
    half.fit()
    draw, head = half.generator("features"), half.model.head
    y = half.y[order]
    with torch.no_grad():
        wanted = draw_labels(held, 32, draw)
        made = head(net(net.draw(32, draw, torch.device("cpu")), wanted)).double()
        target = head(net(net.draw(len(y), draw, torch.device("cpu")), y)).double().softmax(1)
        own = half.predict(half.x)[order].double()
    fade = 0.98**round
    kl = (target * (target.log() - own.log_softmax(1))).sum(1).mean()
    expected = F.cross_entropy(own, y) + 10 * fade * 32 / len(y) * F.cross_entropy(made, wanted) + 7 * fade * kl
    assert not bool((wanted == 3).any())
    assert float(values[0]) == pytest.approx(expected.item(), rel=1e-4)


def test_fedhkds_client_loss_by_hand():
    """CE + λ/(C·|held|)·Σ_c KL(Q_c ‖ softmax(g(H_c)/T)) + γ·‖f(x) − H_y‖²/(B·d): a mean over classes, no T²."""
    half = client(
        "fedhkd", "train.lr=1e-30", "train.batch_size=1000", "strategy.lam=0.7", "strategy.gamma=0.3", round=2
    )
    held = torch.arange(10) % 2 == 0
    known = {"embeddings": torch.randn(10, 32), "predictions": random_labels(10, 10).float(), "held": held}
    values = watched(half)
    take(half, "classes", **known)
    half.fit()
    z, logits = half.embed(half.x).double(), half.predict(half.x).double()
    with torch.no_grad():
        student = half.model.head(known["embeddings"][held]).double()
    q = known["predictions"][held].double()
    taught = (q * (q.log() - (student / 0.5).log_softmax(1))).sum(1).mean() / 10
    mine = held[half.y]
    pull = (z - known["embeddings"][half.y].double())[mine].square().sum() / z.numel()
    expected = F.cross_entropy(logits, half.y) + 0.7 * taught + 0.3 * pull
    assert float(values[0]) == pytest.approx(expected.item(), rel=1e-4)


def test_the_proximal_pull_by_hand():
    model = torch.nn.Linear(2, 1).double()
    anchor = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    model.zero_grad()
    value = model(torch.ones(1, 2, dtype=torch.float64)).sum()
    (value + 0.35 * sum(((p - 0.5) ** 2).sum() for p in model.parameters())).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    training.proximal(anchor, 0.7)(model)
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-14, atol=1e-14)


def test_a_class_that_nobody_holds_makes_nothing_infinite():
    """Trap 12: −∞ for what is absent, times 0, is NaN unless it is masked; for teachers and for class weights."""
    from fedfuse.strategies.cofed import inverse_frequency

    s = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.4, 0.6]] * 4, dtype=torch.float64)
    value = loss("kl")(s, teacher.log())
    value.backward()
    q = s.detach().log_softmax(1)
    expected = (teacher[:, 1:] * (teacher[:, 1:].log() - q[:, 1:])).sum(1).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert bool(torch.isfinite(s.grad).all())
    weight = inverse_frequency(torch.tensor([0, 2, 2]), 3).double()
    assert math.isfinite(F.cross_entropy(s.detach(), torch.tensor([0, 2, 2, 0]), weight).item())


def test_what_discloses_examples_says_so():
    assert registry.entry("fedgkt").server.discloses == ("labels", "features")
    loud = {name for name in registry.listed() if registry.entry(name).server.discloses}
    counting = {name for name in loud if "class counts" in registry.entry(name).server.discloses}
    assert counting == {"fedd2s", "fedftg", "fedgen", "fedhkd", "fedproto", "gaussian_heads"}
    assert loud - counting == {"cofed", "fd", "fedgkt", "fednano", "regmean"}
    assert registry.entry("fd").server.discloses == registry.entry("cofed").server.discloses == ("label sets",)


@pytest.mark.parametrize("name", ["local", "fedavg"])
def test_both_test_sets_and_last_beside_best_are_always_said(name, tmp_path):
    """Traps 9 and 10: the last round is the result, the best stands apart; personal and global never mix."""
    words = ("partition=shards", "clients=4", "rounds=3", "train.lr=0.3")
    played = play(name, *words, path=tmp_path / "run")
    told = json.loads((tmp_path / "run/summary.json").read_text())
    history = played.federation.history
    for key in ("accuracy/global", "accuracy/personal"):
        assert told["final"][key] == history[-1][key]
        assert told["best"][key] == max(h[key] for h in history) >= told["final"][key]
    if name == "local":  # a client that knows two digits: right on its own, wrong on all ten
        assert told["final"]["accuracy/personal"] > told["final"]["accuracy/global"] + 0.2
