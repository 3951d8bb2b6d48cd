"""Liars that know what the honest share: one lie, from the honest alone, told before any rule and any sum."""

from __future__ import annotations

import pytest
import torch

from fedfuse.core.attacks import cpa, lma
from fedfuse.core.collusion import agreed, hips
from fedfuse.core.shares import Share
from fedfuse.errors import UserError
from tests.federations import federation, intercept, play, uploads
from tests.halves import random_labels, server


def told(strategy, *rows: torch.Tensor) -> list[torch.Tensor]:
    shares = [Share(k, {"logits": {"logits": row}}, {"num-examples": 10}) for k, row in enumerate(rows)]
    return [share.records["logits"]["logits"] for share in agreed(iter(shares), strategy)]


def test_hips_takes_the_honest_row_that_does_most_harm() -> None:
    """The mean's likeliest classes are 0, 1, 2; the least of them is given by clients 2, 0, 1."""
    honest = torch.tensor([
        [[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]],
        [[0.6, 0.3, 0.1], [0.1, 0.9, 0.0], [0.4, 0.3, 0.3]],
        [[0.3, 0.4, 0.3], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]],
    ]).double()  # fmt: skip
    assert torch.equal(hips(honest), torch.stack([honest[2, 0], honest[0, 1], honest[1, 2]]))
    assert torch.equal(hips(3 * honest.clamp_min(1e-9).log()), 3 * hips(honest).clamp_min(1e-9).log())


def test_hips_lies_within_the_honest_rows() -> None:
    honest = torch.stack([random_labels(40, 10, seed) for seed in range(5)])
    found = hips(honest)
    assert bool((found == honest).all(-1).any(0).all())
    assert bool((found.argmax(1) != honest.mean(0).argmax(1)).any())


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("attack=hips",), hips),
        (("attack=lma", "attack.knows=honest"), lambda honest: lma(honest.mean(0))),
        (("attack=cpa", "attack.knows=honest"), lambda honest: cpa(honest.mean(0))),
    ],
)
def test_all_liars_tell_one_lie_made_of_the_honest_alone(words, rule) -> None:
    strategy = server("fedmd", "clients=5", "attack.clients=[1,3]", *words)
    rows = [9 * random_labels(24, 10, seed).float() - 4 for seed in range(5)]
    rows[3] = 1e6 * rows[3]  # what a liar would have shared is in nobody's mean
    out = told(strategy, *rows)
    expected = rule(torch.stack([rows[k] for k in (0, 2, 4)]).double()).float()
    for k in (0, 2, 4):
        assert torch.equal(out[k], rows[k])
    for k in (1, 3):
        torch.testing.assert_close(out[k], expected)
    assert out[1] is not out[3]
    assert torch.equal(rows[1], 9 * random_labels(24, 10, 1).float() - 4)  # not in place


def test_without_anybody_honest_nobody_agrees() -> None:
    strategy = server("fedmd", "attack=hips", "attack.clients=[0,1,2]")
    rows = [random_labels(24, 10, seed).float() for seed in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(told(strategy, *rows), rows, strict=True))


def test_the_lie_is_in_the_mean_and_leaves_no_client() -> None:
    """What travels is honest; FedMD's consensus is the mean of two honest clients and the lie made of them."""
    with federation("fedmd", "attack=hips", "attack.clients=[1]", "rounds=1") as (built, _):
        sent: dict[int, torch.Tensor] = {}

        def listen(reply) -> None:
            from fedfuse.wire.records import tensors

            sent[reply.metadata.src_node_id - 1] = tensors(reply.content["logits"])["logits"].clone()

        intercept(built, listen, kind="train")
        built.run()
        consensus = built.strategy.published("consensus")["logits"]
    honest = torch.stack([sent[0], sent[2]]).double()
    expected = (sent[0].double() + sent[2].double() + hips(honest).float().double()) / 3
    torch.testing.assert_close(consensus, expected.float())
    with federation("fedmd", "rounds=1") as (built, _):
        plain = uploads(built, "logits")
        built.run()
    assert torch.equal(plain[1]["logits"], sent[1])


def test_knowing_the_honest_is_another_attack_and_said() -> None:
    words = ("attack=lma", "attack.clients=[1]")
    alone, agreed_on = play("fedmd", *words), play("fedmd", *words, "attack.knows=honest")
    assert alone.digest != agreed_on.digest
    assert any("named: 1; they know what the honest share, and tell one lie;" in note for note in agreed_on.notes)
    assert not any("they know" in note for note in alone.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=fedavg", "attack=hips"), "attack=hips alters soft labels, and strategy=fedavg shares none"),
        (("strategy=fedmd", "attack=hips", "secure=on"), "attack=hips: with secure=on nobody sees"),
        (("strategy=fedmd", "attack=lma", "attack.knows=honest", "secure=on"), "attack=lma attack.knows=honest: with"),
        (("strategy=fedmd", "attack=hips", "clock=devices", "schedule=fedbuff"), "shares of a round do not meet"),
        (("strategy=fedmd", "attack=lma", "attack.knows=all"), "attack.knows=all"),
    ],
)  # fmt: skip
def test_a_lie_that_nobody_could_tell_is_refused(words, said: str) -> None:
    with pytest.raises(UserError, match=said):
        server(words[0].split("=")[1], *words[1:])
