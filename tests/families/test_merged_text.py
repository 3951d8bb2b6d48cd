"""Groups of tokens that close at the same byte, taught in two vocabularies: in closed form, and in federations."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from fedfuse.data import alignment
from fedfuse.errors import UserError
from fedfuse.families import merged_text
from fedfuse.families.public_text import Said
from fedfuse.train.losses import loss
from fedfuse.train.next_token import chain, merged
from fedfuse.wire.records import InvalidArrays
from tests.federations import play
from tests.strategies.test_fedmkt import server, words  # noqa: F401  (a fixture)

GROUPS = "strategy.mapping=groups"
OWN, RAW = "causal_lm@own", "causal_lm"
KNOWN = [RAW, OWN]


def spoken(texts, name: str, rows: torch.Tensor, seed: int, k: int):
    """Random logits of an architecture, and the record that they make."""
    places = texts.places(name, rows)
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), places.tokens.shape[1] + 1, places.vocabulary, generator=draw, dtype=torch.float64)
    return places, logits, merged_text.said(places, logits, k)


def test_distributions_of_groups_by_hand() -> None:
    p, ids = torch.tensor([[0.5, 0.2], [0.9, 0.0]]), torch.tensor([[3, 0], [1, -1]])
    found = merged_text.whole(p, ids, torch.tensor([1.0, 0.5]), 4)
    assert found[0].tolist() == pytest.approx([0.2, 0.15, 0.15, 0.5, 0])  # what is left goes evenly to the others
    assert found[1].tolist() == pytest.approx([0.1 / 6, 0.45, 0.1 / 6, 0.1 / 6, 0.5])
    every = merged_text.whole(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[2, 0, 1]]), torch.tensor([1.0]), 3)
    assert every[0].tolist() == pytest.approx([0.3, 0.2, 0.5, 0])


@pytest.mark.parametrize("name", ["gold", "uld", "xtoken"])
@pytest.mark.parametrize(("mine", "theirs"), [(OWN, RAW), (RAW, OWN)])
def test_a_lesson_is_the_loss_of_whole_merged_distributions(words, mine, theirs, name) -> None:  # noqa: F811
    """With all tokens sent it is what both sides' own logits would give, group by group."""
    texts, rows = server(words, GROUPS).workspace.texts, torch.arange(3)
    places, logits, _ = spoken(texts, mine, rows, 1, 4)
    others, said, record = spoken(texts, theirs, rows, 2, len(texts.pieces(theirs)))
    lesson = merged_text.taught(texts, mine, [Said(theirs, record)], rows, KNOWN)
    assert lesson["teacher"].tolist() == [KNOWN.index(theirs)] * 3

    def made():
        return loss(name).across(texts.vocabulary(mine), texts.vocabulary(theirs))

    losses = {KNOWN.index(theirs): (made(), others.vocabulary)}
    good = torch.tensor([True, False, True])  # the second row is known better already
    step = merged_text.lesson(places, lesson, good, losses, 0.3, 0.7)
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    several = 0
    for row in (0, 2):
        here, there = (one.counted[row].nonzero()[:, 0] for one in (places, others))
        found = alignment.groups(places.ends[row][here].numpy(), others.ends[row][there].numpy())
        first, last, other_first, other_last, ends = map(torch.from_numpy, found)
        assert int(ends[-1]) == int(places.ends[row].max())
        log_p, log_q = places.log_p(logits)[row][here], others.log_p(said)[row][there]
        tokens, other_tokens = places.tokens[row][here], others.tokens[row][there]
        sides[0].append(merged(log_p, tokens, first, last))
        sides[1].append(merged(log_q, other_tokens, other_first, other_last).exp())
        several += int((other_first < other_last).sum() + (first < last).sum())
        # chain rule: what actually stands there has the product of its tokens' probabilities
        actual = sides[1][-1].log().gather(1, other_tokens[other_last][:, None])[:, 0].sum()
        assert actual.item() == pytest.approx(chain(log_q, other_tokens).sum().item(), rel=1e-6)
    assert several
    want = 0.7 * made().from_probabilities(*(torch.cat(side) for side in sides))
    want = want - 0.3 * chain(places.log_p(logits)[places.counted], places.tokens[places.counted]).mean()
    assert step(logits, None, rows).item() == pytest.approx(want.item(), rel=1e-5)  # what travels is float32
    logits.requires_grad_()
    merged_text.lesson(places, lesson, good, losses, 0.0, 1.0)(logits, None, rows).backward()
    assert logits.grad[1].abs().sum() == 0
    assert logits.grad[0].abs().sum() > 1e-3


def test_between_equal_tokenisers_gold_is_js_of_the_next_tokens(words) -> None:  # noqa: F811
    texts, rows = server(words, GROUPS).workspace.texts, torch.arange(2)
    places, logits, _ = spoken(texts, OWN, rows, 3, 4)
    _, said, record = spoken(texts, OWN, rows, 4, places.vocabulary)
    lesson = merged_text.taught(texts, OWN, [Said(OWN, record)], rows, KNOWN)
    vocabulary = texts.vocabulary(OWN)
    losses = {1: (loss("gold").across(vocabulary, vocabulary), places.vocabulary)}
    found = merged_text.lesson(places, lesson, torch.ones(2).bool(), losses, 0.0, 1.0)(logits, None, rows)
    log_p, log_q = (places.log_p(one)[places.counted] for one in (logits, said))
    assert found.item() == pytest.approx(loss("js")(log_p, log_q).item(), rel=1e-5)


def test_the_best_teaches_each_row(words) -> None:  # noqa: F811
    texts, rows = server(words, GROUPS).workspace.texts, torch.arange(4)
    both = [Said(name, spoken(texts, name, rows, 5, 4)[2]) for name in KNOWN]
    both[0].arrays["bits"], both[1].arrays["bits"] = torch.tensor([1.0, 9, 5, 2]), torch.tensor([2.0, 3, 5, 1])
    found = merged_text.taught(texts, RAW, both, rows, KNOWN)
    assert found["teacher"].tolist() == [0, 1, 0, 1]
    assert found["bits"].tolist() == [1, 3, 5, 1]
    here = texts.places(RAW, rows).counted[0]
    assert torch.equal(found["ids"][0][here], both[0].arrays["ids"][0].int()[here])
    assert bool((found["ids"][0][~here] == -1).all())


def test_an_own_token_likelier_than_certain_is_refused() -> None:
    good = {
        "p": torch.tensor([[[0.5]]]), "ids": torch.tensor([[[3]]]), "bits": torch.tensor([2.0]),
        "own": torch.tensor([[-1.0]]),
    }  # fmt: skip
    merged_text.examine("said", good, 4)
    with pytest.raises(InvalidArrays, match="said/own: no logarithms"):
        merged_text.examine("said", {**good, "own": torch.tensor([[0.5, -1.0]])}, 4)
    with pytest.raises(InvalidArrays, match="said/ids"):
        merged_text.examine("said", {**good, "ids": torch.tensor([[[4]]])}, 4)


def test_each_loss_is_heard_between_tokenisers_and_every_byte_is_counted(words) -> None:  # noqa: F811
    base, digests = (*words, "rounds=1", GROUPS, "strategy.alpha=0.5"), set()
    for objective in (["loss=gold"], ["loss=uld"], ["loss=xtoken"], ["loss=xtoken", "loss.options.kept=1"]):
        run = play("fedmkt", *objective, base=base)
        assert run.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
        assert math.isfinite(run.federation.headline["bits_per_byte/personal"])
        digests.add(run.digest)
    assert len(digests) == 4
    default = play("fedmkt", base=base, grid="serial")
    assert default.digest in digests
    texts, names = default.strategy.workspace.texts, default.strategy.scenario.architectures
    places = [texts.places(name).tokens.shape[1] for name in names]
    total = default.strategy.outbox.traffic.summary()
    assert total["up_bytes"] == sum(12 * (P * 16 * (4 + 2) + 4) + 4 * 12 * P for P in places)
    assert total["evaluate_down_bytes"] == sum(12 * (P * (8 * 16 + 4) + 6) for P in places)


def test_what_groups_do_not_go_with_is_refused(words) -> None:  # noqa: F811
    for word, why in (
        ("loss=kl", "loss=kl compares one vocabulary; with mapping=groups allowed: gold, uld, xtoken"),
        ("strategy.select=weighted_mean", r"strategy\.select=weighted_mean: with mapping=groups allowed is greater"),
        ("strategy.unmatched=nothing", r"strategy\.unmatched=nothing: with mapping=groups allowed is label"),
    ):
        with pytest.raises(UserError, match=why):
            play("fedmkt", GROUPS, word, base=words)
