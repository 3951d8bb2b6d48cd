"""Each attack from hand-made messages alone: its rule in closed form, and nothing but what its adversary has."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fedfuse.audits import gradients, inversion, label_prior, membership
from fedfuse.audits.adversary import Adversary, Answer, Candidates, Overreach, Sent, log_odds, withheld
from fedfuse.audits.truth import Questions, matched
from fedfuse.config import registry
from fedfuse.data import FederatedData
from fedfuse.models.in_place import overlay
from fedfuse.wire.knowledge import Item
from tests.federations import TINY, scenario_of
from tests.halves import random_labels

ROWS = torch.tensor([0, 2, 5])  # that client 0 is asked about


def adversary(name: str, *words: str, questions: bool = True) -> Adversary:
    """A curious server over a tiny federation; ten candidates of two pixels' worth of noise."""
    _, scenario = scenario_of((*TINY, f"strategy={name}", *words))
    shape = scenario.data.dataset.shape
    x = torch.randn(10, *shape, generator=torch.Generator().manual_seed(1))
    y = torch.arange(10) % scenario.classes
    asked = Candidates(x, y, {0: ROWS, 1: ROWS, 2: ROWS})
    return Adversary(registry.entry(name), scenario, asked if questions else None)


def message(round: int, client: int, **records) -> Sent:
    return Sent(round, client, records, {})


@pytest.fixture
def alone(monkeypatch):
    """Nobody's examples can be had, whoever asks."""

    def refused(self, *_):
        raise Overreach("private examples")

    for name in ("split", "rows_of", "test_tensors"):
        monkeypatch.setattr(FederatedData, name, refused)


def test_log_odds_of_logits_and_of_distributions_are_the_same() -> None:
    z = 5 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    y, p = torch.tensor([0, 1, 2, 3, 0, 1]), z.softmax(1)
    own = p[torch.arange(6), y]
    torch.testing.assert_close(log_odds(p, y), own.log() - (1 - own).log())
    torch.testing.assert_close(log_odds(z, y), log_odds(p, y))
    sure = torch.tensor([[60.0, 0.0]])
    assert log_odds(sure, torch.tensor([0])).item() == 60.0  # where 1 − p is 0 in any float


def test_ldia_is_the_mean_over_rows_and_rounds(alone) -> None:
    """Distributions as they are, logits by softmax, rows weighed alike; counts are the prior itself."""
    p, z = random_labels(6, 10), torch.randn(2, 10, generator=torch.Generator().manual_seed(0)).double()
    attack = label_prior.LabelDistributions(adversary("fedmd"))
    for sent in (message(1, 0, logits={"p": p}), message(1, 5 % 3, logits={"p": z}), message(2, 0, logits={"p": z})):
        attack.see(sent)
    torch.testing.assert_close(attack.estimates[1, 0], p.mean(0))
    torch.testing.assert_close(attack.estimates[2, 0], torch.cat([p, z.softmax(1)]).mean(0))
    torch.testing.assert_close(attack.estimates[1, 2], z.softmax(1).mean(0))
    counts = torch.tensor([3, 1, *[0] * 8])
    told = label_prior.LabelDistributions(adversary("fedproto"))
    told.see(message(1, 0, prototypes={"means": torch.zeros(10, 32), "counts": counts}))
    assert told.estimates[1, 0].tolist() == [0.75, 0.25, *[0.0] * 8]
    told.see(message(2, 0, prototypes={"means": torch.zeros(10, 32), "counts": torch.zeros_like(counts)}))
    assert set(told.estimates) == {(1, 0)}  # nothing more was said


def test_errors_in_closed_form() -> None:
    found = label_prior.errors(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    assert found == pytest.approx({"kl": 0.6931471805599453, "tv": 0.5, "chebyshev": 0.5})


def test_coop_lira_is_phi_over_the_others(alone) -> None:
    attack = membership.CoopLira(adversary("fedmd"))
    answers = {k: 3 * random_labels(10, 10, k).log() for k in range(3)}
    for k, rows in answers.items():
        attack.answered(Answer(4, k, rows))
    ((round, found),) = attack.scores().items()
    assert round == 4
    phi = {k: log_odds(rows, attack.candidates.y)[ROWS].numpy() for k, rows in answers.items()}
    others = np.stack([phi[1], phi[2]])
    expected = norm.logcdf((phi[0] - others.mean(0)) / others.std(0, ddof=1))
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-9)
    alone_again = membership.CoopLira(attack.adversary)
    for k in (0, 1):  # of two clients, the other is no distribution
        alone_again.answered(Answer(4, k, answers[k]))
    assert alone_again.scores() == {4: {}}


def test_fedmia_asks_the_models_that_came_and_takes_the_mean_over_rounds(alone) -> None:
    """FedAvg's weights and Fed-SB's R, in the place of what was published: what the client's own model says."""
    who = adversary("fedavg")
    architecture = who.scenario.architectures[0]
    start = who.workspace.initial(architecture)
    known, draws = {"model": Item(start, 0)}, [torch.Generator().manual_seed(s) for s in range(6)]
    attack, expected = membership.FedMIA(who), []
    for round in (1, 2):
        phi = []
        for k in range(3):
            noise = draws[3 * (round - 1) + k]
            mine = {n: v + 0.3 * torch.randn(v.shape, generator=noise) for n, v in start.items()}
            attack.see(Sent(round, k, {"model": mine}, known))
            phi.append(log_odds(who.workspace.loaded(architecture, mine)(who.candidates.x), who.candidates.y)[ROWS])
        others = torch.stack(phi[1:]).detach().numpy()
        expected.append(norm.cdf((phi[0].detach().numpy() - others.mean(0)) / others.std(0, ddof=1)))
    ((round, found),) = attack.scores().items()
    assert round == 2
    np.testing.assert_allclose(found[0].numpy(), np.mean(expected, 0), rtol=1e-6)


def test_fedmia_by_gradients_is_the_cosine_of_a_step_and_an_update(alone, monkeypatch) -> None:
    """Gradients of each example by themselves; the same whether many are taken at once or few."""
    who = adversary("fedavg")
    architecture = who.scenario.architectures[0]
    start = who.workspace.initial(architecture)
    attack, expected, draw = gradients.FedMIAGradient(who), [], torch.Generator().manual_seed(0)
    monkeypatch.setattr(gradients, "ROOM", 4 * sum(v.numel() for v in start.values()))
    for round in (1, 2):
        known = {"model": Item({n: v + 0.1 * torch.randn(v.shape, generator=draw) for n, v in start.items()}, round)}
        model = who.workspace.loaded(architecture, known["model"].arrays)
        steps = []
        for row in ROWS.tolist():
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(who.candidates.x[[row]]), who.candidates.y[[row]]).backward()
            steps.append(-torch.cat([p.grad.flatten() for p in model.parameters()]).double())
        cosines = []
        for k in range(3):
            moved = {n: v + 0.1 * torch.randn(v.shape, generator=draw) for n, v in known["model"].arrays.items()}
            change = torch.cat([(moved[n] - known["model"].arrays[n]).flatten() for n in moved]).double()
            attack.see(Sent(round, k, {"model": moved}, known))
            cosines.append(torch.stack([torch.cosine_similarity(g, change, dim=0) for g in steps]).numpy())
        others = np.stack(cosines[1:])
        expected.append(norm.cdf((cosines[0] - others.mean(0)) / others.std(0, ddof=1)))
    ((round, found),) = attack.scores().items()
    assert round == 2
    np.testing.assert_allclose(found[0].numpy(), np.mean(expected, 0), rtol=1e-4)


def test_an_example_that_an_update_was_made_of_stands_out(alone) -> None:
    """Client 0 took one step on candidate 2, the others on others; adapters alone have gradients."""
    for name, topic in (("fedavg", "model"), ("fedit", "adapter")):
        who = adversary(name)
        model = who.workspace.fresh(who.scenario.architectures[0])
        start = {n: v.clone() for n, v in gradients.trained(model).items()}
        known, attack = {topic: Item(start, 0)}, gradients.FedMIAGradient(who)
        for k, row in ((0, 2), (1, 7), (2, 9)):
            model = who.before(Sent(1, k, {}, known)).model
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(who.candidates.x[[row]]), who.candidates.y[[row]]).backward()
            step = {n: start[n] - 0.1 * p.grad for n, p in model.named_parameters() if n in start}
            attack.see(Sent(1, k, {topic: step}, known))
        attack._compare()
        assert attack.phi[1][0][2] == pytest.approx(1.0, abs=1e-5)
        assert int(attack.phi[1][0].argmax()) == 2
        assert set(attack.phi[1]) == {0, 1, 2}


def test_nothing_moved_is_no_direction() -> None:
    model = torch.nn.Linear(3, 2)
    found = gradients.pulls(model, gradients.trained(model), torch.ones(2, 3), torch.tensor([0, 1]), torch.zeros(1, 8))
    assert found.tolist() == [[0.0], [0.0]]
    tokens = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    values = gradients.trained(tokens)
    x, y = torch.tensor([[0, 1], [2, 3], [4, 4]]), torch.tensor([0, 1, 1])
    tokens.zero_grad()
    torch.nn.functional.cross_entropy(tokens(x[1:2]), y[1:2]).backward()
    step = -torch.cat([p.grad.flatten() for p in tokens.parameters()])
    assert gradients.pulls(tokens, values, x, y, step[None])[1].item() == pytest.approx(1.0)
    assert tokens.training


@pytest.mark.parametrize("name", ["fed_sb", "fedit"])
def test_adapters_make_the_clients_model(name: str, alone) -> None:
    """What is asked is the base with the adapters that came: another R, other outputs; the one published, its own."""
    words = ("strategy.init=random_orthonormal",) if name == "fed_sb" else ()
    who = adversary(name, *words)
    topic = "R" if name == "fed_sb" else "adapter"
    model = who.workspace.fresh(who.scenario.architectures[0])
    adapters = {n: v.clone() for n, v in model.named_parameters() if v.requires_grad}
    known = {topic: Item(adapters, 0)}
    x = who.candidates.x
    same = who.outputs(Sent(1, 0, {topic: adapters}, known), x)
    moved = {n: v + 1 for n, v in adapters.items()}
    other = who.outputs(Sent(1, 0, {topic: moved}, known), x)
    model = who.workspace.fresh(who.scenario.architectures[0])
    overlay(model, adapters, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(same, model(x))
    assert not torch.allclose(same, other)


def test_distill_lira_compares_with_shadows_of_the_client(alone, monkeypatch) -> None:
    """Shadows learn the client's public soft labels, of 80 % of the rows each; a candidate on which the client is surer
    than its imitations stands above those on which it is not."""
    monkeypatch.setattr(membership, "SHADOWS", 3)
    who = adversary("fedmd")
    attack = membership.DistillLira(who)
    with torch.no_grad():
        model = who.workspace.fresh(who.scenario.architectures[0])
        public, answer = model(who.public(1)), model(who.candidates.x)
    attack.see(message(1, 0, logits={"logits": public}))
    answer[2] = -20.0
    answer[2, who.candidates.y[2]] = 20.0
    attack.answered(Answer(1, 0, answer))
    found = attack.scores()[1][0]
    assert int(found.argmax()) == 1  # row 2 is second among those asked about
    assert float(found[1]) > -1e-6
    again = membership.DistillLira(who)
    again.see(message(1, 0, logits={"logits": public}))
    again.answered(Answer(1, 0, answer))
    assert torch.equal(again.scores()[1][0], found)


def test_pli_asks_for_a_class_as_the_paper_writes_it() -> None:
    asked = inversion.sure_of_each(10)
    e = math.exp(1 / 3)
    assert asked.shape == (10, 20)
    assert torch.equal(asked[:, 10:], torch.eye(10))
    assert float(asked[4, 4]) == pytest.approx(e / (9 + e))
    assert float(asked[4, 5]) == pytest.approx(1 / (9 + e))
    torch.testing.assert_close(asked[:, :10].sum(1), torch.ones(10))


def test_pli_paints_what_the_soft_labels_know(alone) -> None:
    """Where soft labels tell two kinds of public images apart, each is painted as its kind, by client 1 upside down."""
    who = adversary("fedmd", "transfer.size=60")
    attack = inversion.PairedLogits(who)
    x = who.public(1)
    bright = (x.flatten(1).mean(1) > x.flatten(1).mean(1).median()).long()
    for client, told in ((0, bright), (1, 1 - bright)):
        attack.see(message(1, client, logits={"logits": 12.0 * torch.nn.functional.one_hot(told, 10)}))
    painted = attack.painted()
    level = {k: one.images.flatten(1).mean(1) for k, one in painted.items()}
    assert level[0][1] > level[0][0]
    assert level[1][1] < level[1][0]


def test_ssim_in_closed_form() -> None:
    a = torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(0))
    assert inversion.ssim(a, a, 1.0) == pytest.approx(1.0)
    flat, c1 = torch.ones(1, 8, 8), 0.01**2
    expected = (2 * 0.5 * 0.2 + c1) / (0.5**2 + 0.2**2 + c1)  # flat images: luminance alone
    assert inversion.ssim(0.5 * flat, 0.2 * flat, 1.0) == pytest.approx(expected)
    assert inversion.ssim(a, 1 - a, 1.0) < 0


def test_paintings_are_scored_against_the_clients_own_means() -> None:
    """One of two nearest to its class: told 1 of 2, by chance 1 of 2."""
    zero, one = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    images = torch.stack([0.1 * one, 0.4 * one])
    rows = inversion.scored(3, {7: inversion.Painted(images, images)}, {7: {0: zero, 1: one}})
    found = {(row.client, row.metric, row.at): row.value for row in rows}
    assert found[-1, "told", None] == found[-1, "told/chance", None] == 0.5
    assert found[7, "ssim", 0] == found[7, "ssim/prior", 0] == pytest.approx(inversion.ssim(images[0], zero, 1.0))
    assert found[-1, "ssim", None] == pytest.approx((found[7, "ssim", 0] + found[7, "ssim", 1]) / 2)


# -- what an adversary has -------------------------------------------------------------------------------------


def test_private_examples_are_not_there_and_reaching_for_them_raises() -> None:
    who = adversary("fedavg")
    assert len(who.scenario.data.dataset.train) == 0
    assert who.scenario.data.dataset.test is None
    for key in ((0, "train"), (1, "personal"), (2, "validation"), ("test",), ("pooled",)):
        with pytest.raises(Overreach, match="the adversary sees messages alone"):
            who.workspace.tensors(*key)
    assert who.public(1).shape[0] == 24
    assert withheld(who.scenario).examples(0) == who.scenario.examples(0)  # which every message says


def test_an_attack_that_reaches_for_a_clients_examples_is_stopped() -> None:
    """A client half that looks at its data while it predicts is none that the server can run."""
    who = adversary("fedavg")

    class Looks(who.entry.client):
        def predict(self, x):
            return super().predict(x) + self.y.sum()

    who.entry = who.entry._replace(client=Looks)
    start = who.workspace.initial(who.scenario.architectures[0])
    with pytest.raises(Overreach):
        who.outputs(Sent(1, 0, {"model": start}, {"model": Item(start, 0)}), who.candidates.x)


def test_questions_are_matched_by_label_and_nobody_trained_on_the_others() -> None:
    _, scenario = scenario_of((*TINY, "strategy=fedmd"))
    asked, data = Questions(scenario), scenario.data
    train = {k: set(map(int, data.rows_of(k, "train"))) for k in range(3)}
    anybody = set.union(*train.values())
    known = sorted({int(r) for k in range(3) for s in ("train", "personal", "validation") for r in data.rows_of(k, s)})
    assert len(known) == 216
    inputs = data.dataset.tensor(data.dataset.train.inputs)
    for k, rows in asked.candidates.of.items():
        member, y = asked.truth[k], asked.candidates.y[rows]
        assert member.sum() * 2 == len(member)
        assert torch.equal(y[member].bincount(minlength=10), y[~member].bincount(minlength=10))
        for row, inside in zip(rows.tolist(), member.tolist(), strict=True):
            same = [r for r in known if torch.equal(inputs[r], asked.candidates.x[row])]
            assert any((r in train[k]) == inside and (inside or r not in anybody) for r in same)
        assert member.tolist() != sorted(member.tolist(), reverse=True)  # the order tells nothing
    assert (asked.asked.targets == -1).all()
    labelled = replace(
        scenario, config=replace(scenario.config, transfer=replace(scenario.config.transfer, labelled=True))
    )
    assert (Questions(labelled).asked.targets >= 0).all()


def test_at_most_so_many_are_asked_about() -> None:
    targets = np.array([0] * 900 + [1] * 300 + [0] * 600 + [1] * 600)
    members, others = matched(np.arange(1200), np.arange(1200, 2400), targets)
    assert len(members) == len(others) == 199
    assert (targets[members] == 0).sum() == (targets[others] == 0).sum() == 133  # as 600 to 300
