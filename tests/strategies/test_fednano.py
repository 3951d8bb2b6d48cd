"""FedNano: both halves together are one network, its Fisher weights in closed form, and what travels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedfuse.errors import UserError
from fedfuse.models import reader
from fedfuse.strategies.fednano import Adapter
from tests.federations import federation, play
from tests.halves import server, shares, wake

SMALL = ("strategy.tokens=2", "strategy.width=16", "strategy.rank=3", "strategy.question=Eh?")


def test_the_slopes_of_each_example_are_autograds() -> None:
    draw = torch.Generator().manual_seed(0)
    adapter = Adapter(5, 2).double()
    adapter.B.data.normal_(generator=draw)
    e, g = (torch.randn(3, 4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    found = adapter.slopes(e, g)
    for i in range(3):
        wanted = torch.autograd.grad((adapter(e[i]) * g[i]).sum(), (adapter.A, adapter.B))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-12, atol=1e-12)


def exchanged(built, half):
    """One exchange: the client's activations, and its slopes handed back."""
    sent = half.forward()["activations"]
    half.slopes = built.slopes(**sent)
    return sent


def test_a_step_through_messages_is_the_whole_networks() -> None:
    words = ("strategy.optimizer=sgd", "strategy.lr=0.1", "train.momentum=0", "train.batch_size=1000")
    built = server("fednano", *SMALL, *words)
    draw = torch.Generator().manual_seed(1)
    start = {n: v + 0.3 * torch.randn(v.shape, generator=draw) for n, v in built.model.items()}
    half = wake(built, model=start)
    model, x, y = half.model, half.x, half.y
    named = dict(model.named_parameters())

    def loss(rows):
        h = torch.cat([model.image(half.image(x[rows])), model.text(half.question).expand(len(rows), -1, -1)], 1)
        return built.reader.loss(h, built.answers[y[rows]])

    slopes = torch.autograd.grad(loss(torch.arange(len(x))).mean(), [named[n] for n in start])
    wanted = {n: start[n] - 0.1 * g for n, g in zip(start, slopes, strict=True)}
    exchanged(built, half)
    exchanged(built, half)  # the step is taken, and F_k's examples are sent
    for name, value in half.weights().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)
    rows = half.plan()[-1]
    squares = [torch.autograd.grad(loss(rows[[i]]).sum(), [named[n] for n in start]) for i in range(len(rows))]
    metrics = half.fit()
    assert (metrics["num-examples"], metrics["steps"]) == (len(x), 1)
    sent = half.share()
    for i, name in enumerate(start):
        f = torch.stack([one[i].square() for one in squares]).mean(0).clamp_min(1e-6)
        torch.testing.assert_close(sent["fisher"][name], f, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(sent["scaled"][name], f * wanted[name], rtol=1e-3, atol=1e-6)
    assert half.state == {}


def contents(built, fishers):
    draw = torch.Generator().manual_seed(2)
    models = [{n: torch.randn(v.shape, generator=draw) for n, v in built.model.items()} for _ in fishers]
    sent = [
        {"fisher": f, "scaled": {n: f[n] * m[n] for n in m}}
        for m, f in zip(models, ({n: torch.rand(v.shape, generator=draw) * a + b for n, v in built.model.items()}
                                 for a, b in fishers), strict=True)
    ]  # fmt: skip
    return models, sent


def test_equal_fishers_are_fedavg_and_others_weigh() -> None:
    built, counts = server("fednano", *SMALL), [1, 2, 7]
    models, sent = contents(built, [(0, 0.3)] * 3)
    built.fuse(shares(built, *sent, examples=counts))
    for name, value in built.model.items():
        mean = sum(n * m[name].double() for n, m in zip(counts, models, strict=True)) / 10
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    built = server("fednano", *SMALL)
    models, sent = contents(built, [(1, 0.1), (5, 0.1), (0.1, 0.1)])
    built.fuse(shares(built, *sent, examples=counts))
    for name, value in built.model.items():
        f = [n * s["fisher"][name].double() for n, s in zip(counts, sent, strict=True)]
        wanted = sum(a * m[name].double() for a, m in zip(f, models, strict=True)) / sum(f)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-5)


def test_activations_and_slopes_are_counted() -> None:
    words = ("train.epochs=2", "train.batch_size=1000", "rounds=1", "strategy.samples=7")
    with federation("fednano", *SMALL, *words) as (built, _):
        built.run()
        traffic, n = built.strategy.outbox.traffic.summary(), [built.scenario.examples(c) for c in range(3)]
    image, text = 2 * 16 * 4, 3 * 16 * 4  # bytes of an example's tokens, and of the question's
    rows = [2 * one + 7 for one in n]
    adapters = 2 * (3 * 16 + 16 * 3) * 4
    assert traffic["up_bytes"] == sum(rows) * (image + 4) + 9 * text + 3 * 2 * adapters
    assert traffic["down_bytes"] == sum(rows) * (image + text + 4) + 3 * adapters


def test_a_share_with_another_question_is_left_out() -> None:
    built = server("fednano", *SMALL)
    built.phase = "forward"
    sent = wake(built).forward()
    sent["activations"]["text"] = sent["activations"]["text"][:-1]
    built.fuse_forward(iter([type("S", (), {"client": 1, "records": sent})()]))
    assert built.inbox.failures["rejected"] == 1
    assert not [topic for topic, _ in built.board.items if topic == "slopes"]


def test_the_reader_scores_answers_by_their_tokens() -> None:
    one = reader.build(None, 16, 0)
    assert not [p for p in one.parameters() if p.requires_grad]
    answers = one.answers(["a", "bcd"])
    prefix = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([prefix, one.embed("bcd")[:2].expand(2, -1, -1)], 1)
    log_p = one.run(whole).log_softmax(-1)
    wanted = log_p[:, 2, ord("b")] + log_p[:, 3, ord("c")] + log_p[:, 4, ord("d")]
    found = one.scores(prefix, answers)
    torch.testing.assert_close(found[:, 1], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found[:, 0], F.log_softmax(one.run(prefix)[:, -1], -1)[:, ord("a")], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match="the same tokens"):
        one.answers(["a", "b", "a"])


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("strategy.letters=2", "has 3 tokens; allowed is 1 to strategy.letters=2"),
        ("strategy.language=/nowhere", "/nowhere is not a directory"),
    ],
)
def test_what_does_not_fit_is_refused(word: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        play("fednano", *SMALL, word)
