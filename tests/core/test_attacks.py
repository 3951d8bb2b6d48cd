"""Lies: what each makes of hand-made rows, who tells them, and that nothing but what leaves is altered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedfuse.config.allowed import no_attack
from fedfuse.config.compose import compose
from fedfuse.config.schema import AttackConfig
from fedfuse.core.attacks import Liar, cpa, distributions, fdla, flipped, lma, pcfdla
from fedfuse.deploy.submit import order_of
from fedfuse.errors import UserError, WorldError
from fedfuse.network.exchange import Patience
from fedfuse.seeding import generator
from fedfuse.wire.records import InvalidArrays, arrays_in, strays, tensors
from fedfuse.wire.records import distributions as checked
from tests.deploy import network
from tests.federations import TINY, federation, intercept, play, scenario_of
from tests.halves import client, random_labels, server

ROW = torch.tensor([[0.1, 0.5, 0.05, 0.35], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)


def liar(name: str, **options) -> Liar:
    """A client that lies, of a model with one array `w`, among four classes."""
    return Liar(AttackConfig(name, **options), (0, "lie", 3, 1, "train"), {"w": ("float32", (2, 4))}, 4)


def test_fdla_moves_every_value_to_the_next_rank_and_keeps_the_multiset() -> None:
    assert fdla(ROW).tolist() == [[0.35, 0.05, 0.1, 0.5], [0.1, 0.4, 0.3, 0.2]]
    many = random_labels(200, 10)
    assert torch.equal(fdla(many).sort(1).values, many.sort(1).values)
    assert bool((fdla(many).argmax(1) != many.argmax(1)).all())
    assert bool((fdla(many).argmax(1) == many.topk(2, 1).indices[:, 1]).all())  # r = 1 goes to the class of rank 2
    ties = torch.ones(3, 4).div(4)
    assert torch.equal(fdla(ties), ties)


def test_pcfdla_points_at_the_second_class_with_positive_s() -> None:
    assert pcfdla(ROW, 3.0).tolist() == [[-3, -3, -3, 3], [-3, 3, -3, -3]]
    made = liar("pcfdla", scale=3.0).altered("labels", {"p": ROW.float()}, {})["p"]
    torch.testing.assert_close(made, pcfdla(ROW, 3.0).softmax(1).float())
    with pytest.raises(UserError, match=r"attack\.scale=-3\.0: allowed is more than 0"):
        compose(["strategy=fedmd", "attack=pcfdla", "attack.scale=-3.0"])


def test_lma_puts_all_on_the_least_class() -> None:
    assert lma(ROW).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert lma(10 * ROW - 2).tolist() == [[-1.5, -1.5, 3, -1.5], [-1, -1, -1, 2]]  # logits: within the row's own range


def test_cpa_puts_all_on_the_class_least_like_the_likeliest() -> None:
    """Classes 0 and 1 rise together where 2 falls, and the other way round: 0 ↔ 2, 1 ↔ 2, and 2 goes to 0."""
    p = torch.tensor([[0.60, 0.35, 0.05], [0.35, 0.30, 0.35], [0.05, 0.15, 0.80]], dtype=torch.float64)
    assert cpa(p).argmax(1).tolist() == [2, 2, 0]
    assert distributions(cpa(p))


@pytest.mark.parametrize("name", ["noise", "sign_flip", "scale", "fdla", "pcfdla", "lma", "cpa"])
def test_a_lie_about_a_distribution_is_one(name: str) -> None:
    honest = random_labels(20, 4).float()
    honest[0] = torch.tensor([1.0, 0, 0, 0])
    made = liar(name).altered("labels", {"p": honest, "held": torch.ones(20, dtype=torch.uint8)}, {})
    assert distributions(made["p"])
    assert not torch.allclose(made["p"], honest)
    assert made["p"].dtype == torch.float32
    assert bool((made["held"] == 1).all())
    assert torch.isfinite(made["p"]).all()


@pytest.mark.parametrize("name", ["noise", "sign_flip", "scale"])
def test_a_lie_about_a_histogram_is_one(name: str) -> None:
    honest = torch.tensor([0.2, 0.5, 0.3])
    made = liar(name, scale=3.0).altered("labels", {"histogram": honest}, {})["histogram"]
    assert distributions(made[None])
    assert not torch.allclose(made, honest)


def test_updates_are_altered_about_what_was_published() -> None:
    w, x = torch.full((2, 4), 2.0), torch.full((2, 4), 3.0)
    known = {"w": w, "counter": torch.tensor(3)}
    for name, scale, expected in (("sign_flip", None, 1.0), ("sign_flip", 4.0, -2.0), ("scale", None, 12.0)):
        made = liar(name, scale=scale).altered("model", {"w": x, "counter": torch.tensor(4)}, known)
        assert bool((made["w"] == expected).all())
        assert int(made["counter"]) == 4
    assert bool((liar("sign_flip").altered("update", {"w": x}, {})["w"] == -3).all())
    assert bool((liar("sign_flip").altered("prototypes", {"means": x}, {"means": w})["means"] == -3).all())
    assert bool((x == 3).all())  # not in place: the client goes on with it


def test_noise_is_as_large_as_it_says_and_seeded() -> None:
    x = {"means": 5 * torch.randn(200, 50, generator=generator(0))}
    first, second = (liar("noise", scale=0.5).altered("prototypes", x, {})["means"] for _ in range(2))
    assert torch.equal(first, second)
    assert float((first - x["means"]).std()) == pytest.approx(2.5, rel=0.05)
    usual = liar("noise").altered("prototypes", x, {})["means"]
    assert float((usual - x["means"]).std()) == pytest.approx(15.0, rel=0.05)  # less is averaged away by ten clients


def test_labels_are_flipped_in_training_alone() -> None:
    assert flipped(torch.tensor([0, 3, 9, -100]), 10).tolist() == [9, 6, 0, -100]
    honest = client("fedavg")
    lying = client("fedavg", "attack=label_flip", "attack.clients=[0]")
    assert torch.equal(lying.y, 9 - honest.y)
    assert torch.equal(lying.x, honest.x)
    for half in (lying, honest):
        half.begin("evaluate")
    assert torch.equal(lying.examples("personal")[1], honest.examples("personal")[1])
    assert torch.equal(client("fedavg", "attack=label_flip", "attack.clients=[1]").y, honest.y)
    assert lying.y is lying.y  # flipped once a message, not at each look


def test_what_is_a_distribution_is_said_once() -> None:
    """Server's check and liar's guess agree, on what is not a number, negative, or of another sum, too."""
    good = random_labels(4, 3)
    for bad in (float("nan"), float("inf"), -0.2, 0.9):
        rows = good.clone()
        rows[1, 0] = bad
        assert strays(rows).tolist() == [False, True, False, False]
        assert not distributions(rows)
        with pytest.raises(InvalidArrays, match="labels: 1 rows are no distributions"):
            checked("labels", rows)
    checked("labels", good)
    assert distributions(good)
    assert not distributions(torch.ones(3, 1))
    assert not distributions(good[:0])


def test_liars_are_drawn_by_the_seed_or_named() -> None:
    def liars(*words: str) -> set[int]:
        return set(scenario_of((*TINY, "strategy=fedavg", "clients=10", *words))[1].liars)

    assert liars() == set()
    drawn = liars("attack=scale", "attack.fraction=0.3")
    assert len(drawn) == 3
    assert drawn == liars("attack=noise", "attack.fraction=0.3")
    assert any(liars("attack=scale", "attack.fraction=0.3", f"seed={s}") != drawn for s in (1, 2, 3))
    assert len(liars("attack=scale", "attack.fraction=0.01")) == 1
    assert liars("attack=scale", "attack.clients=[2,7]") == {2, 7}


@pytest.mark.parametrize("name", ["fedavg", "fedmd", "fedproto", "knfu", "fedit"])
def test_only_what_a_liar_shares_differs(name: str) -> None:
    """In round 1 the others share what they would; the liar's own state is that of an honest client."""
    told = {}
    for attack in ("off", "sign_flip"):
        with federation(name, f"attack={attack}", "rounds=1", grid="serial") as (built, _):

            def listen(reply, attack=attack):
                for key, content in arrays_in(reply.content).items():
                    arrays = tensors(content)
                    told[attack, reply.metadata.src_node_id - 1, key] = {n: v.clone() for n, v in arrays.items()}

            intercept(built, listen, kind="train")
            liars = built.scenario.liars
            built.run()
    assert {client for attack, client, _ in told} == {0, 1, 2}
    assert not liars - {0, 1, 2}
    for (attack, who, key), arrays in told.items():
        if attack == "off":
            same = all(torch.equal(v, told["sign_flip", who, key][n]) for n, v in arrays.items())
            assert same == (who not in liars), (who, key)


def test_the_run_says_who_lied_and_scores_the_others() -> None:
    played = play("fedmd", "attack=fdla", "attack.clients=[2]")
    (told,) = [note for note in played.notes if note.startswith("attack")]
    assert told.startswith("attack: fdla: 1 of 3 clients lie whenever they take part, named: 2;")
    scored = played.strategy.inbox.scored
    honest = sum(scored[c]["personal/accuracy"] for c in (0, 1)) / 2
    assert played.federation.headline["accuracy/personal_honest"] == pytest.approx(honest)
    assert "accuracy/personal_honest" not in play("fedmd").federation.headline


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=fedavg", "attack=fdla"), "alters soft labels, and strategy=fedavg shares none"),
        (("strategy=fedproto", "attack=lma"), "alters soft labels, and strategy=fedproto shares none"),
        (("strategy=local", "attack=noise"), "strategy=local shares no arrays"),
        (("strategy=cfd", "attack=sign_flip"), "strategy=cfd shares whole numbers alone"),
        (("strategy=centralized", "attack=label_flip"), "joins all examples"),
        (("strategy=fedavg", "attack=scale", "attack.clients=[3]"), "attack.clients=3: no such client"),
        (("strategy=fedavg", "attack=scale", "attack.clients=[1,1]"), "each once"),
        (("strategy=fedavg", "attack=scale", "attack.fraction=0.0"), "attack.fraction=0.0: allowed is more than 0"),
    ],
)  # fmt: skip
def test_a_lie_that_nobody_can_tell_is_refused(words, said: str) -> None:
    with pytest.raises(UserError, match=said):
        server(words[0].split("=")[1], *words[1:])


def test_sites_do_not_lie(tmp_path: Path) -> None:
    """Refused by who orders and by the server, and by each site of a server that asks all the same."""
    lying = network.tiny("fedavg", "attack=scale")
    with pytest.raises(
        UserError, match="attack=scale: clients lie in simulations only; allowed in a deployment is off"
    ):
        no_attack(lying)
    with pytest.raises(UserError, match="clients lie in simulations only"):
        order_of(lying, Patience())
    with pytest.raises(WorldError, match="attack=scale: clients lie in simulations only"):
        network.run(lying, network.Network(network.seats(tmp_path, 3)), tmp_path / "run", Patience(join=0.2))


def test_a_deployment_defends_itself_as_a_simulation_does(tmp_path: Path) -> None:
    built, _ = network.run(
        network.tiny("fedmd", "defence=expguard"), network.Network(network.seats(tmp_path, 3)), tmp_path / "run"
    )
    assert built.digest == play("fedmd", "defence=expguard", base=network.TINY).digest
    assert built.strategy.state["defence"]["logits"].shape == (3,)
