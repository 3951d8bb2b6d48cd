"""A curious client: what it has and nothing else, and what it makes of it, in closed form."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from fedfuse.audits import curious, label_prior, others
from fedfuse.audits.adversary import Candidates, Overreach, Sent, log_odds
from fedfuse.audits.curious import CuriousClient, Received, drawn
from fedfuse.audits.truth import Questions
from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.runs.audit import audit
from fedfuse.runs.experiment import run
from fedfuse.wire.knowledge import Item
from tests.audits.test_replayed import figures
from tests.federations import TINY, scenario_of
from tests.halves import random_labels

ROWS = torch.tensor([1, 3, 4, 8])


def client(name: str, *words: str, means: tuple[str, ...] = (), k: int = 1) -> CuriousClient:
    """Client 1 of three, asked about four of ten candidates."""
    _, scenario = scenario_of((*TINY, f"strategy={name}", *words))
    x = torch.randn(10, *scenario.data.dataset.shape, generator=torch.Generator().manual_seed(1))
    asked = Candidates(x, torch.arange(10) % scenario.classes, {k: ROWS})
    return CuriousClient(registry.entry(name), scenario, k, asked, means)


def received(version: int, alone: tuple[str, ...] = (), **known) -> Received:
    return Received(version + 1, 1, {name: Item(arrays, version) for name, arrays in known.items()}, frozenset(alone))


def logits(seed: int, rows: int = 24) -> torch.Tensor:
    return 3 * torch.randn(rows, 10, generator=torch.Generator().manual_seed(seed)).double()


# -- what it has -----------------------------------------------------------------------------------------------


def test_its_own_examples_are_there_and_nobody_elses() -> None:
    who, (_, scenario) = client("fedavg"), scenario_of((*TINY, "strategy=fedavg"))
    for split in ("train", "validation", "personal"):
        for mine, true in zip(who.workspace.tensors(1, split), scenario.data.tensors(1, split), strict=True):
            assert torch.equal(mine, true)
            assert len(mine) > 0
    assert len(who.scenario.data.dataset.train) == sum(who.scenario.data.sizes()[1])
    assert who.scenario.data.sizes()[[0, 2]].sum() == 0  # not even how many they have
    assert torch.equal(who.public(1), scenario.data.transfer_tensors()[0])
    for key in ((0, "train"), (2, "personal"), ("test",), ("pooled",)):
        with pytest.raises(Overreach):
            who.workspace.tensors(*key)


@pytest.mark.parametrize("message", [Sent(1, 0, {}, {}), Received(1, 2, {})])
def test_somebody_elses_message_is_refused(message: Sent | Received) -> None:
    with pytest.raises(Overreach, match=f"client {message.client}'s message: the adversary is client 1"):
        client("fedavg").take(message)


def test_what_has_nothing_new_in_it_is_not_kept_twice() -> None:
    who = client("fedavg")
    for version in (0, 0, 2, 1, 2, 3):
        who.take(received(version, model={"w": torch.zeros(1)}))
    who.take(Received(5, 1, {}))
    assert [curious.version(one) for one in who.received] == [0, 2, 3]


def test_all_are_curious_or_so_many_drawn(monkeypatch) -> None:
    _, scenario = scenario_of((*TINY, "strategy=fedmd"))
    assert drawn(scenario) == [0, 1, 2]
    monkeypatch.setattr(curious, "CURIOUS", 2)
    assert len(drawn(scenario)) == len(set(drawn(scenario))) == 2


# -- what it makes of it ---------------------------------------------------------------------------------------


def test_its_own_logits_are_taken_out_of_the_mean() -> None:
    z, who = [logits(k) for k in range(3)], client("fedmd", means=("logits",))
    fused = received(4, consensus={"logits": torch.stack(z).mean(0)})
    assert torch.equal(who.labels_of_others(fused), fused.known["consensus"].arrays["logits"])  # did not take part
    who.take(Sent(4, 1, {"logits": {"logits": z[1]}}, {}))
    torch.testing.assert_close(who.labels_of_others(fused), (z[0] + z[2]) / 2)
    assert torch.equal(who.labels(fused), fused.known["consensus"].arrays["logits"])
    for other in (received(3, consensus=fused.known["consensus"].arrays),
                  received(4, ("consensus",), consensus=fused.known["consensus"].arrays)):  # fmt: skip
        assert torch.equal(who.labels_of_others(other), who.labels(other))  # another round's; made for it alone
    no_mean = client("fedmd")
    no_mean.take(Sent(4, 1, {"logits": {"logits": z[1]}}, {}))
    assert torch.equal(no_mean.labels_of_others(fused), no_mean.labels(fused))


def test_distributions_stay_distributions() -> None:
    p, who = [random_labels(24, 10, k).double() for k in range(3)], client("dsfl", means=("labels",))
    who.take(Sent(2, 1, {"labels": {"p": p[1]}}, {}))
    rest = who.labels_of_others(received(2, labels={"p": torch.stack(p).mean(0)}))
    torch.testing.assert_close(rest, (p[0] + p[2]) / 2)
    sharp = who.labels_of_others(received(2, labels={"p": (torch.stack(p).mean(0) / 0.01).softmax(1)}))
    torch.testing.assert_close(sharp.sum(1), torch.ones(24, dtype=torch.float64))
    assert float(sharp.min()) >= 0


def test_its_own_weights_are_taken_out_of_the_mean() -> None:
    start = client("fedavg").workspace.initial("mlp_small")
    draw = torch.Generator().manual_seed(3)
    models = [{name: v + torch.randn(v.shape, generator=draw) for name, v in start.items()} for _ in range(3)]
    fused = {name: torch.stack([one[name] for one in models]).mean(0) for name in start}
    for means, expected in ((("model",), {n: (models[0][n] + models[2][n]) / 2 for n in start}), ((), fused)):
        who = client("fedavg", means=means)
        who.take(Sent(1, 1, {"model": models[1]}, {"model": Item(start, 0)}))
        found = who.model_of_others(received(1, model=fused))
        torch.testing.assert_close(dict(found["model"].arrays), expected)
        x = who.candidates.x
        torch.testing.assert_close(who.says(found, x), who.workspace.loaded("mlp_small", expected)(x).detach())
    assert client("fedmd").says({}, who.candidates.x) is None


def test_client_ldia_is_the_mean_over_rows_and_versions() -> None:
    who = client("fedmd")
    attack = others.OthersLabels(who)
    who.take(received(0, consensus={"logits": logits(9)}))  # nobody's knowledge yet
    first, second = logits(1), logits(2)
    who.take(received(1, consensus={"logits": first}))
    who.take(received(3, consensus={"logits": second}))
    found = attack.estimates
    assert set(found) == {1, 3}
    torch.testing.assert_close(found[1], first.softmax(1).mean(0))
    torch.testing.assert_close(found[3], torch.cat([first, second]).softmax(1).mean(0))


def test_a_published_model_is_asked_about_the_public_rows() -> None:
    who = client("fedavg")
    start = who.workspace.initial("mlp_small")
    who.take(received(1, model=start))
    expected = who.workspace.loaded("mlp_small", start)(who.public(1)).detach().double().softmax(1).mean(0)
    torch.testing.assert_close(others.OthersLabels(who).estimates[1], expected)


def test_truth_and_blind_guess_in_closed_form() -> None:
    priors = {0: torch.tensor([1.0, 0.0, 0.0]), 1: torch.tensor([0.0, 0.5, 0.5]), 2: torch.tensor([0.0, 0.0, 1.0])}
    assert label_prior.of_the_others(priors, 0).tolist() == [0.0, 0.25, 0.75]
    assert label_prior.rest_of_alike(priors[0], 3).tolist() == pytest.approx([0.0, 0.5, 0.5])
    rows = label_prior.scored({(2, 0): torch.tensor([0.0, 0.5, 0.5])}, {0: torch.tensor([0.0, 0.25, 0.75])},
                              {0: torch.tensor([0.5, 0.25, 0.25])}, ("client_ldia", "client"))  # fmt: skip
    found = {(row.client, row.metric): row.value for row in rows}
    assert found[0, "tv"] == found[-1, "tv"] == 0.25
    assert found[0, "tv/blind"] == 0.5
    assert {(row.audit, row.adversary, row.round) for row in rows} == {("client_ldia", "client", 2)}


@pytest.mark.parametrize("name", ["fedavg", "fedmd"])
def test_client_lira_finds_what_its_shadows_do_not_know(name: str, monkeypatch) -> None:
    """Published: its own shadows' average but for one candidate, of which the others are sure."""
    monkeypatch.setattr(others, "SHADOWS", 2)
    who = client(name)
    attack = others.OthersMembers(who)
    start = who.workspace.initial("mlp_small")
    assert attack.scores() == {}
    if name == "fedavg":
        who.take(received(0, model=start))
        assert attack.scores() == {}  # version 0 has seen nothing
        model = who.workspace.loaded("mlp_small", start)
    else:
        model = who.workspace.loaded("mlp_small", start)
        with torch.no_grad():
            who.take(Sent(1, 1, {"logits": {"logits": model(who.public(1))}}, {}))
    x, y = who.candidates.x, who.candidates.y
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(model(x[3:4]), y[3:4]) + 0.01 * model(x).square().mean()).backward()
        optimizer.step()
    arrays = {n: v.detach().clone() for n, v in model.named_parameters()}
    if name == "fedavg":
        who.take(received(1, model=arrays))
    else:
        with torch.no_grad():
            who.take(received(1, consensus={"logits": model(who.public(1))}))
    ((round, found),) = attack.scores().items()
    assert (round, set(found)) == (1, {1})
    assert found[1].shape == ROWS.shape
    if name == "fedavg":
        assert int(found[1].argmax()) == 1  # candidate 3 is second among those asked about
    assert torch.equal(others.OthersMembers(who).scores()[1][1], found[1])


def test_shadows_train_on_its_own_examples_alone(monkeypatch) -> None:
    """80 % of them, as many epochs as the run has had, at most 50; from what all began with."""
    monkeypatch.setattr(others, "SHADOWS", 3)
    seen = []

    def trained(model, x, y, loss, config, seeds, epochs):
        assert torch.equal(next(iter(model.parameters())), next(iter(start.values())))
        seen.append((x, y, epochs))

    monkeypatch.setattr(others.training, "train", trained)
    who = client("fedavg", "train.epochs=20")
    start = {n: v.clone() for n, v in who.workspace.initial("mlp_small").items()}
    for version in (0, 2):
        who.take(received(version, model=start))
    ((_, found),) = others.OthersMembers(who).scores().items()
    x, y = who.workspace.tensors(1, "train")
    assert [epochs for _, _, epochs in seen] == [40] * 3
    for part, labels, _ in seen:
        where = [int((x == one).flatten(1).all(1).nonzero()[0]) for one in part]
        assert len(set(where)) == len(part) == int(0.8 * len(x))
        assert torch.equal(y[where], labels)
    assert len({tuple(labels.tolist()) for _, labels, _ in seen}) == 3
    phi = log_odds(who.workspace.loaded("mlp_small", start)(who.candidates.x).detach(), who.candidates.y)[ROWS]
    torch.testing.assert_close(found[1], torch.full_like(phi, -0.6931471805599453))  # all alike: Φ(0)


def test_each_client_is_asked_about_the_next_ones_candidates() -> None:
    _, scenario = scenario_of((*TINY, "strategy=fedmd"))
    asked = Questions(scenario)
    of, truth = asked.about_others([0, 2])
    assert torch.equal(of[2], asked.candidates.of[0])
    assert torch.equal(truth[2], asked.truth[0])
    assert torch.equal(of[0], asked.candidates.of[1])
    assert set(of) == set(truth) == {0, 2}


# -- whole runs ------------------------------------------------------------------------------------------------

TWO = (
    "data=digits", "data.limit=500", "data.test_limit=60", "partition=iid", "clients=2", "rounds=1", "model=mlp",
    "transfer.size=200", "train.epochs=40", "seed=3", "data.validation=0.25", "data.personal_test=0.25",
    "runtime=inline",
)  # fmt: skip


@pytest.mark.parametrize("name", ["fedavg", "fedmd"])
def test_of_two_clients_each_finds_the_others_examples(name: str, tmp_path: Path, monkeypatch) -> None:
    """Above chance where the other learned by heart; about what nobody saw, the interval holds one half."""
    monkeypatch.setattr(others, "SHADOWS", 3)
    monkeypatch.setattr(others, "EPOCHS", 12)
    where = run(compose([*TWO, f"strategy={name}", f"out={tmp_path / 'run'}"]), quiet=True)
    said = audit(where, ["client_lira"])
    assert "by a curious client (each in turn), which sees the soft labels or the model that it was sent" in said
    area = figures(where).filter(metric="auc").row(0, named=True)
    assert area["low"] > 0.5, area
    assert area["adversary"] == "client"
    with mock.patch("fedfuse.runs.audit.Questions", partial(Questions, inside=("validation",), outside=("personal",))):
        audit(where, ["client_lira"])
    area = figures(where).filter(metric="auc").row(0, named=True)
    assert area["low"] < 0.5 < area["high"], area
