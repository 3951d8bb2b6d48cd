"""FedGen in closed form: the ensemble of the clients' own heads, per-label weights, diversity, FedAvg without it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedfuse.config import registry
from fedfuse.errors import UserError
from fedfuse.strategies.fedgen import FedGenHyper, Generator, diversity_loss, draw_labels, ensemble_loss
from fedfuse.wire.records import InvalidArrays, Scope
from tests.federations import federation, play
from tests.halves import PLAIN, server, shares, wake


def test_the_ensemble_weighs_each_client_by_its_share_of_the_label():
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(4, 3)) for _ in range(2)]
    labels, counts = np.array([0, 1, 1, 0]), np.array([[3, 0, 0], [1, 5, 0]])
    ce = np.stack([-(z - np.log(np.exp(z).sum(1, keepdims=True)))[np.arange(4), labels] for z in logits])
    expected = (3 / 4 * ce[0, [0, 3]].sum() + 1 / 4 * ce[1, [0, 3]].sum() + ce[1, 1:3].sum()) / 4
    got = ensemble_loss([torch.tensor(z) for z in logits], torch.tensor(labels), torch.tensor(counts))
    assert got.item() == pytest.approx(expected, rel=1e-13)


def test_diversity_by_hand():
    z = torch.tensor([[0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    noise = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    # two ordered pairs of four: mean |z| = 1.5, mean squared noise = 9
    assert diversity_loss(z, noise).item() == pytest.approx(np.exp(-2 * 1.5 * 9 / 4), rel=1e-14)
    assert diversity_loss(z[:1].expand(5, -1), torch.randn(5, 2)).item() == 1  # one point for all noise: the worst


def test_labels_nobody_holds_are_never_drawn():
    held = torch.tensor([False, True, False, True])
    drawn = draw_labels(held, 200, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}


def test_the_generator_is_taught_by_the_clients_own_heads(monkeypatch):
    """Not by the common head N times: the logits of the first step are recomputed from the uploads."""
    from fedfuse.strategies import fedgen

    heads, seen = [], []
    original = fedgen.FedGen.teach

    def teach(self, given, counts, held):
        heads.extend(given)
        original(self, given, counts, held)

    class Net(fedgen.Generator):
        def forward(self, noise, labels):
            seen.append(super().forward(noise, labels))
            return seen[-1]

    def watched(logits, labels, counts):
        for values, mine in zip(heads, logits, strict=True):
            torch.testing.assert_close(mine, F.linear(seen[-1], values["weight"], values["bias"]))
        return ensemble_loss(logits, labels, counts)

    monkeypatch.setattr(fedgen.FedGen, "teach", teach)
    monkeypatch.setattr(fedgen, "Generator", Net)
    monkeypatch.setattr(fedgen, "ensemble_loss", watched)
    play("fedgen", "rounds=1", "strategy.generator_steps=2")
    assert len(heads) == 3
    assert not torch.equal(heads[0]["weight"], heads[1]["weight"])


def test_the_generator_learns_what_the_heads_know():
    losses = []
    with federation("fedgen", "rounds=3", "strategy.generator_lr=0.01", "strategy.generator_steps=100") as (built, _):
        log = built.strategy.log
        built.strategy.log = lambda name, value, **o: (losses.append((name, value)), log(name, value, **o))
        built.run()
    taught = [value for name, value in losses if name == "loss/generator"]
    assert taught[-1] < 0.5 < np.log(10)


def test_without_regularisers_it_is_fedavg():
    plain, free = play("fedavg"), play("fedgen", "strategy.alpha=0", "strategy.beta=0")
    for name, value in plain.strategy.model.items():
        assert torch.equal(value, free.strategy.model[name])
    late = play("fedgen", "strategy.regularised_steps=0")
    for name, value in plain.strategy.model.items():
        assert torch.equal(value, late.strategy.model[name])
    taught = play("fedgen")
    assert any(not torch.equal(value, taught.strategy.model[name]) for name, value in plain.strategy.model.items())


def test_noise_is_gaussian_unless_asked():
    draw = torch.Generator().manual_seed(0)
    eps = Generator(3, 4, FedGenHyper()).draw(2000, draw, torch.device("cpu"))
    assert abs(eps.mean()) < 0.05
    assert abs(eps.std() - 1) < 0.05
    eps = Generator(3, 4, FedGenHyper(noise="uniform")).draw(2000, draw, torch.device("cpu"))
    assert 0 <= eps.min() < eps.max() <= 1


def test_skewed_labels_leave_no_trace_of_absent_classes():
    played = play("fedgen", "partition=shards", "clients=4", "participation=0.25", "rounds=3")
    for item in played.strategy.board.items.values():
        assert all(torch.isfinite(v).all() for v in item.arrays.values() if v.is_floating_point())


def test_a_generator_is_published_for_the_labels_that_somebody_holds():
    for counts in ([0, 3, 0, 5, 0, 0, 0, 0, 0, 1], [0] * 10):
        strategy = server("fedgen", "strategy.generator_steps=1")
        told = {"model": strategy.model, "counts": {"counts": torch.tensor(counts)}}
        strategy.fuse(shares(strategy, told, told))
        made = strategy.board.items.get(("generator", ""))
        assert (None if made is None else made.arrays["held"].tolist()) == (
            [n > 0 for n in counts] if any(counts) else None
        )


def test_a_pool_is_refused_and_so_are_negative_counts():
    with pytest.raises(UserError, match="one architecture"):
        play("fedgen", "model.pool=[mlp_small,mlp,mlp_wide]")
    with pytest.raises(InvalidArrays, match="negative"):
        registry.entry("fedgen").server.examine(
            Scope({"examples": 9}, {}), {"counts": {"counts": torch.tensor([-1, 2])}}
        )


def test_a_clients_loss_in_the_third_round_by_hand(monkeypatch):
    """CE + α·λ³·B/n · CE of generated features + β·λ³ · KL to what the head makes of generated ones of its labels."""
    hypers = {"alpha": 0.7, "beta": 0.3, "decay": 0.5, "generator_batch": 6}
    built = server("fedgen", *PLAIN, "train.epochs=1", *(f"strategy.{key}={value}" for key, value in hypers.items()))
    net = Generator(10, int(built.workspace.model("mlp_small").feature_dim), built.hyper)
    held = torch.arange(10) != 4
    half = wake(built, generator={**net.state_dict(), "held": held})
    half.round = 3
    monkeypatch.setattr(half, "train", lambda loss: {"loss": loss(half.model(half.x), half.y, None).item()})
    draw, n = half.generator("features"), len(half.y)
    net.eval()
    wanted = draw_labels(held, 6, draw)
    with torch.no_grad():
        made = half.model.head(net(net.draw(6, draw, torch.device("cpu")), wanted)).double()
        target = half.model.head(net(net.draw(n, draw, torch.device("cpu")), half.y)).double().log_softmax(1)
        logits = half.model(half.x).double()
    kl = (target.exp() * (target - logits.log_softmax(1))).sum(1).mean()
    fade = 0.5**3
    expected = F.cross_entropy(logits, half.y) + 0.7 * fade * 6 / n * F.cross_entropy(made, wanted) + 0.3 * fade * kl
    assert half.fit()["loss"] == pytest.approx(expected.item(), rel=1e-5)
