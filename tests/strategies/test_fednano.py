"""FedNano: both halves together are one network, its Fisher weights in closed form, and what travels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedfuse.data import Dataset
from fedfuse.data.dataset import Examples
from fedfuse.errors import UserError
from fedfuse.models import questions, reader
from fedfuse.models.soft_prompt import Adapter
from fedfuse.strategies import fednano
from fedfuse.wire.records import InvalidArrays, Scope, validate
from tests.federations import federation, play
from tests.halves import final_states, server, shares, wake

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


def test_every_class_has_a_question_and_no_more_questions_than_classes() -> None:
    layout = fednano.asked(Scope({"classes": 3}, {}, fednano.FedNanoHyper(width=2, letters=4)))
    told = {"e": torch.zeros(8, 2), "length": torch.tensor([5, 3]), "of": torch.tensor([0, 1, 0])}
    told = {name: value if name == "e" else value.int() for name, value in told.items()}
    validate("question", told, layout)
    for name, wrong in (("of", told["of"][:2]), ("length", told["of"].repeat(2)), ("e", torch.zeros(13, 2))):
        with pytest.raises(InvalidArrays, match=f"question/{name}: shape"):
            validate("question", told | {name: wrong}, layout)


PAIRS = ("What? cat", "What? dog", "Is it a cat? yes", "Is it a cat? no", "What? emu")
ASKED = (
    "data=custom", f"data.load={__name__}:asked", "strategy.tokens=2", "strategy.width=16", "strategy.rank=3",
    "strategy.question=null",
)  # fmt: skip


def asked() -> Dataset:
    """Five numbers an example, and questions of two lengths."""
    draw = np.random.default_rng(0)

    def some(n: int) -> Examples:
        return Examples(draw.normal(size=(n, 5)).astype(np.float32), draw.integers(0, 5, n))

    return Dataset("asked", some(120), some(30), PAIRS, "features")


def exchanged(built, half):
    """One exchange: the client's activations, and its slopes handed back."""
    sent = half.forward()["activations"]
    half.slopes = built.slopes(sent)
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
        h = torch.cat([model.image(half.image("train", rows)), model.text(half.question).expand(len(rows), -1, -1)], 1)
        return built.reader.loss(h, built.questions.answers[y[rows]])

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


def test_what_weighs_alike_is_sent_as_it_is_and_averaged() -> None:
    words = ("strategy.merge=fedavg", "strategy.optimizer=sgd", "strategy.lr=0.1", "train.batch_size=1000")
    built, counts = server("fednano", *SMALL, *words), [1, 2, 7]
    assert built.phases(1) == ("forward", "train")
    half = wake(built)
    exchanged(built, half)
    metrics = half.fit()  # takes the step: no exchange comes after it
    sent, end = half.share(), half.weights()
    assert metrics["steps"] == 1
    assert sent["fisher"] == half.state == {}
    assert sent["scaled"].keys() == end.keys()
    assert all(torch.equal(value, end[name]) for name, value in sent["scaled"].items())
    assert not torch.equal(end["image.B"], half.start["image.B"])
    models, _ = contents(built, [(0, 1)] * 3)
    built.fuse(shares(built, *({"fisher": {}, "scaled": one} for one in models), examples=counts))
    for name, value in built.model.items():
        mean = sum(n * m[name].double() for n, m in zip(counts, models, strict=True)) / 10
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("merge", "of_f", "times"), [("fisher", 7, 2), ("fedavg", 0, 1), ("local", 0, 0)])
def test_activations_and_slopes_are_counted(merge: str, of_f: int, times: int) -> None:
    """The rule that reads no F makes no exchange for it and sends none: bytes to the last one."""
    words = ("train.epochs=2", "train.batch_size=1000", "rounds=1", f"strategy.merge={merge}")
    words += (f"strategy.samples={of_f}",) if of_f else ()
    with federation("fednano", *SMALL, *words) as (built, _):
        built.run()
        traffic, n = built.strategy.outbox.traffic.summary(), [built.scenario.examples(c) for c in range(3)]
    image, text = 2 * 16 * 4, 3 * 16 * 4  # bytes of an example's tokens, and of the question's
    rows, exchanges = [2 * one + of_f for one in n], 3 if of_f else 2
    adapters = 2 * (3 * 16 + 16 * 3) * 4
    assert traffic["up_bytes"] == sum(rows) * (image + 4) + 3 * exchanges * text + 3 * times * adapters
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
        (
            "strategy.merge=fedavg strategy.samples=7",
            "samples=7 does nothing with strategy.merge=fedavg, .*: 64$",
        ),
        (
            "strategy.merge=local strategy.floor=0.1",
            "floor=0.1 does nothing with strategy.merge=local, .*: 1e-06$",
        ),
    ],
)
def test_what_does_not_fit_is_refused(word: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        play("fednano", *SMALL, *word.split())


def test_each_example_is_asked_its_own_question() -> None:
    """Loss and slopes through messages are the whole network's, each row after its own question and no other."""
    words = ("strategy.optimizer=sgd", "strategy.lr=0.1", "train.momentum=0", "train.batch_size=1000")
    built = server("fednano", *ASKED, *words)
    draw = torch.Generator().manual_seed(1)
    start = {n: v + 0.3 * torch.randn(v.shape, generator=draw) for n, v in built.model.items()}
    half = wake(built, model=start)
    model, y, named = half.model, half.y, dict(half.model.named_parameters())

    def loss(i):
        question, _, answer = PAIRS[y[i]].rpartition("? ")
        e = model.text(built.reader.embed(question + "?"))
        h = torch.cat([model.image(half.image("train", torch.tensor([i]))), e[None]], 1)
        return built.reader.loss(h, built.reader.answers([answer]))[0]

    losses = torch.stack([loss(i) for i in range(len(y))])
    slopes = torch.autograd.grad(losses.mean(), [named[n] for n in start])
    wanted = {n: start[n] - 0.1 * g for n, g in zip(start, slopes, strict=True)}
    sent = exchanged(built, half)
    assert len(sent["text"]) == len("What?") + len("Is it a cat?")
    rows = half.plan()[0]
    torch.testing.assert_close(half.slopes["loss"], losses[rows].detach(), rtol=1e-4, atol=1e-5)
    exchanged(built, half)
    for name, value in half.weights().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_row_is_scored_among_the_answers_to_its_question() -> None:
    built = server("fednano", *ASKED)
    draw = torch.Generator().manual_seed(4)
    image, labels = torch.randn(7, 2, 16, generator=draw), torch.tensor([0, 3, 4, 2, 1, 3, 0])
    own = built.questions
    z = own.scores(image, own.e, labels, 3)
    for row, label in zip(z, labels.tolist(), strict=True):
        among = [0, 1, 4] if label in (0, 1, 4) else [2, 3]
        assert (row != questions.OTHER).nonzero().squeeze(1).tolist() == among
    text = questions.spread(own.e, own.length, own.of[labels])
    torch.testing.assert_close(z[torch.arange(7), labels], -own.loss(image, text, labels), rtol=1e-4, atol=1e-4)
    kinds = built.questions.accuracies(z, labels)
    right = (z.argmax(1) == labels).double()
    what = torch.tensor([c in (0, 1, 4) for c in labels.tolist()])
    assert kinds == {"accuracy_of_2": float(right[~what].mean()), "accuracy_of_3": float(right[what].mean())}
    assert server("fednano", *SMALL).questions.accuracies(z[:, :4], labels.clamp_max(3)) == {}


def test_answers_read_together_are_those_read_one_by_one() -> None:
    one = reader.build(None, 16, 0)
    prefix = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    answers = one.answers(["ab", "a", "abcd", "b", "xyz"])
    torch.testing.assert_close(one._together(prefix, answers), one._one_by_one(prefix, answers), rtol=1e-5, atol=1e-4)
    assert one.minds
    blind = reader.build(None, 16, 0)
    plain = blind.run
    blind.run = lambda e, seen=None, places=None: plain(e)  # a model that minds no mask
    torch.testing.assert_close(blind.scores(prefix, answers), one._one_by_one(prefix, answers), rtol=1e-5, atol=1e-4)
    assert not blind.minds
    asks = [questions.Questions(each, PAIRS, None, 32) for each in (one, blind)]  # questions of two lengths
    labels = torch.tensor([3, 0, 2])
    losses = [q.loss(prefix, questions.spread(q.e, q.length, q.of[labels]), labels) for q in asks]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-4)


def test_the_pull_to_the_common_adapters_is_fedproxs() -> None:
    """Two steps of plain gradient descent: in the second the adapters have moved, and μ pulls them back."""
    words = ("strategy.optimizer=sgd", "strategy.lr=0.1", "train.momentum=0", "train.batch_size=1000", "train.epochs=2")
    ends = []
    for mu in (0.0, 0.8):
        built = server("fednano", *SMALL, *words, f"strategy.mu={mu}")
        draw = torch.Generator().manual_seed(1)
        half = wake(built, model={n: v + torch.randn(v.shape, generator=draw) for n, v in built.model.items()})
        exchanged(built, half)
        exchanged(built, half)
        first = half.weights()
        exchanged(built, half)
        ends.append((half.start, first, half.weights()))
    (start, first, free), (_, same, pulled) = ends
    for name in free:
        assert torch.equal(first[name], same[name])  # at the start there is nothing to pull to
        want = free[name] - 0.1 * 0.8 * (first[name] - start[name])
        torch.testing.assert_close(pulled[name], want, rtol=1e-5, atol=1e-6)


def test_local_adapters_go_on_and_send_nothing_of_themselves() -> None:
    strategy, states = final_states("fednano", *SMALL, "strategy.merge=local", "train.batch_size=1000")
    assert strategy.inbox.failures["rejected"] == 0
    assert {metric.split("/")[0] for metric in strategy.inbox.scored[0]} >= {"personal"}
    begun = strategy.workspace.initial("mlp_small")
    for name, value in strategy.model.items():
        assert torch.equal(value, begun[name])
    assert all(set(state) == {"own", "seen"} for state in states)
    assert not torch.equal(states[0]["own"]["image.B"], states[1]["own"]["image.B"])
    n = [strategy.scenario.examples(c) for c in range(3)]
    steps = 2 * 3 * 16 * 4  # two rounds, in each the question's tokens once
    up = sum(2 * one * (2 * 16 * 4 + 4) + steps for one in n)
    assert strategy.outbox.traffic.summary()["up_bytes"] == up  # activations, and nothing else


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("strategy.question=null",), "class '0' is no question and answer, as 'Is this a cat"),
        ((*ASKED[:2], *SMALL[:3], "strategy.question=null", "strategy.letters=6"), "'Is it a cat.' has 12 tokens"),
    ],
)
def test_classes_that_ask_nothing_are_refused(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError, match=why):
        server("fednano", *words)


def test_two_questions_may_have_the_same_answers_and_one_may_not() -> None:
    one = reader.build(None, 16, 0)
    asks = questions.Questions(
        one, ("Is it a cat? yes", "Is it a cat? no", "Is it a dog? yes", "Is it a dog? no"), None, 32
    )
    assert asks.of.tolist() == [0, 0, 1, 1]
    assert torch.equal(asks.answers[0], asks.answers[2])
    with pytest.raises(UserError, match="the same tokens"):
        questions.Questions(one, ("Is it? yes", "Is it? no", "Is it? yes"), None, 32)


def test_a_trial_of_the_machinery_says_so() -> None:
    notes = " ".join(server("fednano").notes())
    assert "travel at each step" in notes
    assert "without strategy.language the language model has random weights" in notes
